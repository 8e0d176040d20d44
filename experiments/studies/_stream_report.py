"""Tables and figures of the domain stream."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments import figures, run_folder, scatter
from experiments.report import Figure, Report, Table
from experiments.studies import _stream_claims as claims
from experiments.studies import _stream_results as measured
from experiments.studies._stream_arms import Arm
from experiments.studies._stream_results import ArmResults
from optax_cl import metrics

_METERS = {
    "gain_inflation": "gain inflation R",
    "overlap": "overlap s",
    "strength": "strength",
    "leak": "leak of the update",
}
_SHOWN = 6  # Curves in one figure.
_PER_PANEL = 18  # Named points in one panel.


def summarize(folder: Path, arms: Sequence[Arm]) -> dict:
    """Every measure of every arm and seed, for ``results.json``."""
    results, diverged = measured.split_diverged(measured.load(folder, arms))
    return {name: {"diverged_seeds": r.diverged} for name, r in diverged.items()} | {
        name: {
            "routing": r.arm.routing,
            "second_moment": r.arm.second_moment,
            "strength": r.arm.strength,
            "learning_rate_factor": r.arm.learning_rate,
            "final": r.final,
            "forgetting": None if r.arm.joint else r.forgetting,
            "learning": None if r.arm.joint else r.learning,
            "final_perplexity": r.perplexity.final,
            "forgetting_perplexity": None if r.arm.joint else r.perplexity.forgetting,
            "stability_gap": None if r.arm.joint else r.stability_gap,
            **{meter: r.meter(meter) for meter in _METERS if meter in r.curves},
        }
        for name, r in results.items()
    }


def report(folder: Path, arms: Sequence[Arm]) -> Report:
    """Everything a reader gets to see."""
    results, diverged = measured.split_diverged(measured.load(folder, arms))
    stream = run_folder.read_json(folder / "stream.json")
    tables = [
        _loss_table(results, diverged),
        _perplexity_table(results),
        *_meter_tables(results),
        _divergence_table(stream),
    ]
    pictures = [
        _trade_figure(results),
        _difference_figure(results),
        _gap_figure(results),
        *_trace_figures(results),
    ]
    seeds, rows, tasks = results["vanilla"].matrix.shape
    del rows
    summary = (
        f"{len(results)} arms, {seeds} seeds, {tasks} domains one after another. "
        "Losses are nats per byte on held-out text; differences are taken seed by seed "
        "against plain Adam on the same order and batches, with their standard error."
    )
    return Report(tables, pictures, claims.claims(results), summary)


def _cell(values: np.ndarray | None):
    return None if values is None else tuple(metrics.mean_and_error(values))


def _difference(results: dict[str, ArmResults], name: str, measure: str):
    if name == "vanilla":
        return None
    ours, theirs = (getattr(results[n], measure) for n in (name, "vanilla"))
    return tuple(metrics.paired_difference(ours, theirs))


def _loss_table(
    results: dict[str, ArmResults], diverged: dict[str, ArmResults]
) -> Table:
    controlled = measured.has_learning_rates(results)
    rows = []
    for name, r in results.items():
        sequential = not r.arm.joint
        matched = controlled and sequential and r.arm.family != "plain"
        rows.append(
            (
                name,
                r.arm.routing,
                r.arm.second_moment,
                _cell(r.final),
                _difference(results, name, "final"),
                _cell(measured.learning_rate_matched(results, name))
                if matched
                else None,
                _cell(r.forgetting) if sequential else None,
                _difference(results, name, "forgetting") if sequential else None,
                _cell(r.learning) if sequential else None,
                _difference(results, name, "learning") if sequential else None,
                _cell(r.stability_gap) if sequential else None,
            )
        )
    rows += [
        (
            name,
            r.arm.routing,
            r.arm.second_moment,
            f"diverged on {r.diverged} of {len(r.matrix)} seeds",
            *[None] * 7,
        )
        for name, r in diverged.items()
    ]
    return Table(
        "losses",
        "Losses in nats per byte (mean ± standard error over seeds)",
        (
            "arm",
            "routing",
            "second_moment",
            "final loss",
            "minus vanilla",
            "minus vanilla at the same learning loss",
            "forgetting",
            "minus vanilla",
            "loss right after learning",
            "minus vanilla",
            "stability gap",
        ),
        rows,
        "`second_moment` is what Adam's second moment reads; `same` where no modifier "
        "makes a difference. Lower is better in every column. The stability gap is the "
        "part of the first domain's loss at each switch that comes back.",
    )


def _perplexity_table(results: dict[str, ArmResults]) -> Table:
    rows = []
    for name, r in results.items():
        ppl = r.perplexity
        rows.append(
            (
                name,
                r.arm.second_moment,
                _cell(ppl.final),
                _cell(ppl.forgetting) if not r.arm.joint else None,
                _cell(ppl.learning) if not r.arm.joint else None,
            )
        )
    return Table(
        "perplexities",
        "Perplexities per byte (mean ± standard error over seeds)",
        ("arm", "second_moment", "final", "forgetting", "right after learning"),
        rows,
        "Means of perplexities are ruled by the worst domain; read the nats first.",
    )


def _meter_tables(results: dict[str, ArmResults]) -> list[Table]:
    shown = [m for m in _METERS if any(m in r.curves for r in results.values())]
    rows = [
        (name, r.arm.second_moment, *(_cell(r.meter(meter)) for meter in shown))
        for name, r in results.items()
        if any(meter in r.curves for meter in shown)
    ]
    if not rows:
        return []
    table = Table(
        "meters",
        "Inside the optimizer (mean over the steps after the first domain)",
        ("arm", "second_moment", *(_METERS[meter] for meter in shown)),
        rows,
    )
    return [table]


def _divergence_table(stream: dict) -> Table:
    names = stream["names"]
    matrix = np.array(stream["divergences"])
    pairs = matrix[np.tril_indices(len(names), -1)]
    return Table(
        "divergences",
        "How far the domains lie apart (Jensen-Shannon divergence of byte trigrams)",
        ("bits", *names),
        [(n, *(f"{x:.2f}" for x in row)) for n, row in zip(names, matrix, strict=True)],
        f"Over all pairs: mean {pairs.mean():.2f}, least {pairs.min():.2f}, most "
        f"{pairs.max():.2f}.",
    )


def _trade_figure(results: dict[str, ArmResults]) -> Figure:
    marks = {}
    for name, r in results.items():
        if not r.arm.joint:
            x = metrics.paired_difference(r.learning, results["vanilla"].learning)
            y = metrics.paired_difference(r.forgetting, results["vanilla"].forgetting)
            method = r.arm.family.removesuffix(f"-{r.arm.routing}")
            marks[name] = scatter.Mark(name, r.arm.routing, method, tuple(x), tuple(y))
    plain = [m for m in marks.values() if m.method == "plain"]
    plain.sort(key=lambda m: results[m.name].arm.learning_rate)
    groups = _panels([m for m in marks.values() if m.method != "plain"])
    rows, columns = (1, 1) if len(groups) == 1 else (-(-len(groups) // 2), 2)
    figure, axes = figures.new(
        rows, columns, width=9.0 if columns == 1 else 14.0, height=6.4 * rows
    )
    for at in axes.flat[len(groups) :]:
        at.set_axis_off()
    for at, (title, group) in zip(axes.flat, groups.items(), strict=False):
        # Each panel shows all arms, those of the others in grey.
        others = [m for m in marks.values() if m not in group and m not in plain]
        at.plot(
            [m.x[0] for m in plain],
            [m.y[0] for m in plain],
            color=scatter.ROUTINGS["none"],
            linewidth=1.2,
            zorder=1,
        )
        scatter.draw(at, [*plain, *group], faint=others)
        figures.label(
            at,
            "loss right after learning, minus vanilla (nats per byte)",
            "forgetting, minus vanilla (nats per byte)",
            title,
        )
    limits = [[at.get_xlim(), at.get_ylim()] for at in axes.flat[: len(groups)]]
    low, high = np.min(limits, 0)[:, 0], np.max(limits, 0)[:, 1]
    for at in axes.flat[: len(groups)]:
        at.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
    scatter.explain_marks(figure, list(marks.values()))
    for at, group in zip(axes.flat, groups.values(), strict=False):
        scatter.name_marks(figure, at, [*plain, *group])
    return Figure(
        "trade",
        "Forgetting over learning",
        figure,
        "Paired differences to vanilla with standard errors. To the right an arm "
        "learns less, below it forgets less. The grey line is what a lower learning "
        "rate buys without any method; only arms below it do more than learn less.",
    )


def _panels(marks: list[scatter.Mark]) -> dict[str, list[scatter.Mark]]:
    """The arms in one panel while their names have room, else by kind of method."""
    if len(marks) <= _PER_PANEL:
        return {"Forgetting less, or only learning less?": marks}
    kinds: dict[str, list[scatter.Mark]] = {}
    for mark in marks:
        kind = {
            "constant": "subspace, fixed strength",
            "agem": "A-GEM and EWC",
            "ewc": "A-GEM and EWC",
        }.get(mark.method, "subspace, strength by a rule")
        kind = "replay" if mark.method.startswith("replay") else kind
        kinds.setdefault(kind, []).append(mark)
    return kinds


def _difference_figure(results: dict[str, ArmResults]) -> Figure:
    names = [n for n in results if n != "vanilla"]
    pairs = [
        metrics.paired_difference(results[n].final, results["vanilla"].final)
        for n in names
    ]
    order = np.argsort([p.mean for p in pairs])[::-1]
    figure, axes = figures.new(width=7.5, height=1.2 + 0.3 * len(names))
    at = axes[0, 0]
    at.barh(
        [names[i] for i in order],
        [pairs[i].mean for i in order],
        xerr=[pairs[i].se for i in order],
        color=[
            figures.OKABE_ITO[0] if pairs[i].mean < 0 else figures.OKABE_ITO[1]
            for i in order
        ],
        capsize=2,
    )
    at.axvline(0, color="black", linewidth=0.8)
    figures.label(at, "final loss, minus vanilla (nats per byte)", "arm")
    return Figure(
        "differences",
        "Final loss over all domains, minus vanilla",
        figure,
        "Paired differences with standard errors over seeds; to the left is better.",
    )


def _gap_figure(results: dict[str, ArmResults]) -> Figure:
    figure, axes = figures.new(width=8.0, height=4.4)
    at = axes[0, 0]
    tasks = results["vanilla"].matrix.shape[-1]
    # One arm of each kind: two routings of one method would cover each other.
    kinds: dict[str, str] = {}
    for name, r in results.items():
        kind = (
            "joint" if r.arm.joint else r.arm.family.removesuffix(f"-{r.arm.routing}")
        )
        if r.arm.learning_rate == 1:
            kinds.setdefault(kind, name)
    first = ("plain", "joint", "replay", "balance", "agem", "ewc")
    shown = sorted(kinds, key=lambda k: first.index(k) if k in first else len(first))
    shown = [kinds[kind] for kind in shown[:_SHOWN]]
    series = {}
    for name in shown:
        mean, error = figures.mean_and_error(results[name].curves["first_domain"])
        series[name] = (np.arange(len(mean)), mean, error)
    figures.lines(
        at,
        series,
        x="training step",
        y="loss on the first domain (nats per byte)",
    )
    steps = len(next(iter(series.values()))[0]) // tasks
    # The fall from a random model would flatten everything that follows.
    high = max((mean + error)[steps // 4 :].max() for _, mean, error in series.values())
    at.set_ylim(top=1.02 * high)
    for switch in range(1, tasks):
        at.axvline(switch * steps, color="#bbbbbb", linewidth=0.8, zorder=0)
    return Figure(
        "first_domain",
        "The first domain while the others are learned",
        figure,
        "Held-out loss after every step, one arm of each kind, mean and standard error "
        "over seeds. Every seed has another first domain, hence the wide bands: they "
        "are not the error of a difference. Grey lines are switches of domain.",
    )


def _trace_figures(results: dict[str, ArmResults]) -> list[Figure]:
    meters = [
        m
        for m in ("overlap", "strength", "gain_inflation")
        if any(m in r.curves for r in results.values())
    ]
    if not meters:
        return []
    figure, axes = figures.new(len(meters), width=8.0, height=2.6 * len(meters))
    shown = [n for n, r in results.items() if "overlap" in r.curves][:_SHOWN]
    for at, meter in zip(axes[:, 0], meters, strict=True):
        series = {}
        for name in shown:
            curves = results[name].curves
            # An arm without this meter keeps its place, and so all keep their colours.
            nothing = np.full_like(curves["overlap"], np.nan)
            mean, error = figures.mean_and_error(curves.get(meter, nothing))
            series[name] = (np.arange(len(mean)), mean, error)
        figures.lines(at, series, x="training step", y=_METERS[meter])
        if at.get_legend() is not None:
            at.get_legend().remove()
    # One legend for all: the arms keep their colours.
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper")
    return [
        Figure(
            "traces",
            "Overlap, strength and gain inflation while learning",
            figure,
            "Mean and standard error over seeds.",
        )
    ]
