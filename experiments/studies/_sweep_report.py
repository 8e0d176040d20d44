"""Tables and figures of a finished sweep."""

from pathlib import Path
from typing import Any

import numpy as np

from experiments import figures, report, run_folder
from experiments.studies import _sweep_claims as claims
from experiments.studies import _sweep_laws as laws
from experiments.studies._sweep_cases import EPS_RATIOS, FEW_STRENGTHS, ROUTINGS


def make_report(folder: Path) -> report.Report:
    """Tables, figures and claims of a finished sweep.

    Args:
      folder: the run folder.

    Returns:
      The report.
    """
    config = run_folder.read_record(folder)["config"]
    results = run_folder.read_json(folder / "results.json")["cases"]
    parts: dict[str, list] = {}
    for case in results:
        parts.setdefault(case["part"], []).append(case)
    return report.Report(
        tables=[
            _law_table(parts),
            _eps_table(parts["eps"]),
            _switch_table(parts["switch"], config["b2"]),
            _moved_table(parts["aligned"]),
            _leak_table(parts["leak"]),
        ],
        figures=[
            report.Figure(
                "law",
                "Gain inflation under shared routing",
                _law_figure(parts),
                "Points: measured, mean and standard error over seeds (mostly smaller "
                "than the marker). Lines: the laws, without a fitted parameter. The "
                "naive law holds for an axis-aligned subspace only.",
            ),
            report.Figure(
                "eps_and_switch",
                "What hides the inflation",
                _eps_switch_figure(parts, config["b2"]),
                "Left: an eps as large as the gradient removes it. Right: after a "
                "switch that keeps Adam's state it builds up over several 1 / (1 - b2) "
                "steps, so that short tasks do not show it; dashed: the formula.",
            ),
            report.Figure(
                "routings",
                "What each routing does to the distance moved",
                _routing_figure(parts),
                "Left: distance along an axis-aligned protected direction over that of "
                "Adam without a modifier. Right: at full strength and with a rotated "
                "subspace, share of the updates' energy inside it; only a projection "
                "after the moments gives zero.",
            ),
        ],
        claims=claims.judge(parts, config),
        summary="Adam's second moment shrinks with an attenuated gradient and gives "
        "the attenuation back. How much is a matter of algebra: this study measures "
        "it against closed formulas that have nothing to fit.",
    )


def _law_table(parts: dict) -> report.Table:
    rows = []
    for case in [*parts["aligned"], *parts["rotated"]]:
        a, naive = case["strength"], float(laws.naive_law(case["strength"]))
        rows.append(
            (
                "axis-aligned" if case["aligned"] else "rotated",
                tuple(case["measured_overlap"]),
                a,
                tuple(case["gain"]),
                naive,
                f"{100 * laws.error(case, naive)[0]:+.1f} %",
                laws.law_of(case),
                f"{100 * laws.error(case, laws.law_of(case))[0]:+.1f} %",
            )
        )
    columns = (
        "subspace",
        "measured s",
        "strength a",
        "measured R",
        "1/(1-a)",
        "its error",
        "refined law",
        "its error ",
    )
    note = "The refined law of an axis-aligned subspace is the naive one."
    return report.Table("law", "Gain inflation R by strength", columns, rows, note)


def _eps_table(cases: list[dict]) -> report.Table:
    rows = [
        (c["strength"], c["ratio"], tuple(c["gain"]), laws.eps_of(c)) for c in cases
    ]
    columns = ("strength a", "eps / rms gradient", "measured R", "formula")
    return report.Table("eps", "The effect of eps", columns, rows)


def _switch_table(cases: list[dict], b2: float) -> report.Table:
    rows = []
    for case in cases:
        times, mean, _, law = laws.switch_curve(case, b2)
        final = laws.naive_law(case["strength"])
        late = np.flatnonzero(mean - 1 >= 0.9 * (final - 1))
        exact = np.arange(1, times[-1] + 1)
        curve = laws.switch_law(case["strength"], case["q"], b2, exact) - 1
        reached = np.flatnonzero(curve >= 0.9 * (final - 1))
        constants = lambda t: f"{t * (1 - b2):.2g}"  # noqa: E731
        rows.append(
            (
                case["strength"],
                case["q"],
                constants(times[late[0]]) if late.size else "not reached",
                constants(exact[reached[0]]) if reached.size else "not reached",
                f"{100 * np.abs(law / mean - 1).max():.1f} %",
            )
        )
    columns = (
        "strength a",
        "q",
        "90 % reached after",
        "by the formula",
        "worst error of the formula",
    )
    note = (
        "Times in units of 1 / (1 - b2) steps; q is the old second moment over the new."
    )
    title = "Transient after a switch that keeps Adam's state"
    return report.Table("switch", title, columns, rows, note)


def _moved_table(cases: list[dict]) -> report.Table:
    rows = [
        (c["strength"], *zip(*c["moved"], strict=True), 1 - c["strength"])
        for c in cases
    ]
    title = "Distance moved along an axis-aligned subspace, over vanilla's"
    return report.Table(
        "moved", title, ("strength a", *ROUTINGS, "intended (1-a)"), rows
    )


def _leak_table(cases: list[dict]) -> report.Table:
    rows = [
        (tuple(c["measured_overlap"]), *zip(*c["leak"], strict=True)) for c in cases
    ]
    title = "Share of the updates' energy inside a rotated subspace, strength 1"
    note = "The coordinates' scales are spread over a decade."
    return report.Table("leak", title, ("measured s", *ROUTINGS), rows, note)


def _law_figure(parts: dict) -> Any:
    figure, axes = figures.new()
    axes = axes[0, 0]
    grid = np.linspace(0, max(c["strength"] for c in parts["aligned"]), 100)
    groups = {"axis-aligned": parts["aligned"]}
    for case in parts["rotated"]:
        groups.setdefault(f"rotated, s = {case['overlap']:g}", []).append(case)
    for i, (name, group) in enumerate(groups.items()):
        look = figures.style(i)
        s = np.mean([c["measured_overlap"][0] for c in group])
        law = laws.naive_law(grid) if i == 0 else laws.refined_law(grid, s)
        axes.plot(grid, law, color=look["color"], linewidth=1.2)
        _measured(axes, group, "strength", look, name)
    axes.legend(title="line: law, point: measured")
    figures.label(axes, "strength a", "gain inflation R")
    return figure


def _measured(axes: Any, group: list[dict], x: str, look: dict, label: str) -> None:
    """Measured gains with their errors, over an entry of the cases."""
    mean, se = np.array([case["gain"] for case in group]).T
    axes.errorbar(
        [case[x] for case in group],
        mean,
        yerr=se,
        color=look["color"],
        marker=look["marker"],
        linestyle="none",
        capsize=3,
        label=label,
    )


def _eps_switch_figure(parts: dict, b2: float) -> Any:
    figure, axes = figures.new(1, 2, width=10)
    left, right = axes[0]
    ratios = np.geomspace(EPS_RATIOS[0], EPS_RATIOS[-1], 200)
    for i, a in enumerate(FEW_STRENGTHS):
        look = figures.style(i)
        group = [c for c in parts["eps"] if c["strength"] == a]
        left.plot(ratios, laws.eps_law(a, ratios), color=look["color"], linewidth=1.2)
        _measured(left, group, "ratio", look, f"a = {a:g}")
        [case] = [c for c in parts["switch"] if c["strength"] == a and c["q"] == 1]
        times, mean, se, law = laws.switch_curve(case, b2)
        constants = times * (1 - b2)
        right.plot(
            constants, mean, color=look["color"], linewidth=3, label=f"a = {a:g}"
        )
        right.plot(
            constants,
            law,
            color="black",
            linestyle="--",
            linewidth=0.9,
            # An underscore keeps a line out of the legend: one entry stands for all.
            label="law" if a == FEW_STRENGTHS[-1] else "_law",
        )
        right.fill_between(
            constants, mean - se, mean + se, color=look["color"], alpha=0.25, lw=0
        )
    left.set_xscale("log")
    figures.label(left, "eps / rms gradient", "gain inflation R", "effect of eps")
    title = "second moment kept over a switch (q = 1)"
    figures.label(right, "steps after the switch x (1 - b2)", "gain inflation R", title)
    left.legend(title="line: law, point: measured")
    right.legend()
    return figure


def _routing_figure(parts: dict) -> Any:
    figure, axes = figures.new(1, 2, width=10)
    names = [r.replace(" ", "\n", 1) for r in ROUTINGS]
    moved = {
        f"a = {c['strength']:g}": c["moved"]
        for c in parts["aligned"]
        if c["strength"] in FEW_STRENGTHS
    }
    y = "distance moved / vanilla's"
    figures.points(axes[0, 0], moved, names, x="routing", y=y)
    leak = {f"s = {c['overlap']:g}": c["leak"] for c in parts["leak"]}
    y = "share of energy inside"
    figures.points(axes[0, 1], leak, names, x="routing", y=y)
    for one in axes[0]:
        one.tick_params(axis="x", labelsize=8, rotation=0)
        for text in one.get_xticklabels():
            text.set_ha("center")
    return figure
