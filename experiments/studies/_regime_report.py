"""Tables and heat maps of the regime map."""

from pathlib import Path
from typing import Any

import numpy as np

from experiments import figures, run_folder, scatter
from experiments.report import Figure, Report, Table
from experiments.studies import _configs as configs
from experiments.studies import _regime_claims as claims
from experiments.studies import _regime_regression as regression
from experiments.studies import _regime_results as results
from experiments.studies._regime_arms import ARMS
from experiments.studies._regime_results import ArmResults, MapResults


def summarize(folder: Path, config: Any) -> dict:
    """Every number of every map for ``results.json``, seed by seed."""
    found = {}
    for one in results.load(folder, config):
        found[one.map.name] = {
            "regimes": one.map.regimes,
            "matched": {n: _plain(a) for n, a in one.matched.items()},
            "fixed": {n: _plain(a) for n, a in one.fixed.items()},
            "oracle_matched": one.oracle_matched,
            "oracle_fixed": one.oracle_fixed,
        }
    return found


def _plain(arm: ArmResults) -> dict:
    # JSON knows no infinity.
    largest = np.nan_to_num(arm.largest, posinf=np.finfo(np.float32).max)
    return {**arm._asdict(), "largest": largest}


def report(folder: Path, config_class: type) -> Report:
    """Everything a reader gets to see."""
    saved = run_folder.read_record(folder)["config"]
    config = config_class(
        **{k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}
    )
    loaded = results.load(folder, config)
    tables, pictures = [], []
    parts = [
        [one for one in loaded if one.map.part == part]
        for part in ("regression", "digits")
    ]
    for maps in filter(None, parts):
        main = maps[0]
        pictures += [_heat_figure(main, "matched"), _trade_figure(main)]
        tables += [
            _regimes_table(main, config),
            _difference_table(main, "matched"),
            _oracle_table(main, "matched"),
            _rates_table(main),
            _difference_table(main, "fixed"),
        ]
        pictures.append(_heat_figure(main, "fixed"))
        if len(maps) > 1:
            tables.append(_settings_table(maps))
            pictures.append(_settings_figure(maps))
            pictures += [_heat_figure(one, "matched") for one in maps[1:]]
            for one in maps[1:]:
                tables += [_difference_table(one, "matched"), _rates_table(one)]
    tuning, reported = configs.seeds(config)
    summary = (
        f"Every arm runs in every regime at every learning rate, on {len(reported)} "
        f"seeds that are reported and {len(tuning)} others that choose learning rates. "
        "Ratios are mean final losses (digits: error rates) over plain Adam's, below 1 "
        "is better; differences are paired by seed, with their standard error."
    )
    return Report(tables, pictures, claims.claims(loaded), summary)


def _where(one: MapResults) -> str:
    return f"{one.map.part}, {one.map.steps} steps a task, rank {one.map.rank}"


def _rates_words(which: str) -> str:
    return "learning rates tuned" if which == "matched" else "one learning rate for all"


def _pairs(mean: np.ndarray, error: np.ndarray) -> list[tuple[float, float]]:
    return [(float(m), float(e)) for m, e in zip(mean, error, strict=True)]


def _sign(one: MapResults) -> float:
    """Digits are told in points of accuracy, where more is better."""
    return -100.0 if one.map.measure == "error" else 1.0


def _oracle(one: MapResults, which: str) -> np.ndarray:
    return one.oracle_matched if which == "matched" else one.oracle_fixed


def _mean(values: np.ndarray) -> tuple[float, float]:
    mean, error = figures.mean_and_error(values.mean(1))
    return float(mean), float(error)


def _difference_table(one: MapResults, which: str) -> Table:
    by_arm: dict[str, ArmResults] = getattr(one, which)
    base = by_arm["vanilla"].final
    scale = 100.0 if one.map.measure == "error" else 1.0
    rows = []
    for name, arm in by_arm.items():
        mean, error = results.difference(arm.final, base)
        ratios, _ = results.ratio(arm.final, base)
        cells = _pairs(_sign(one) * mean, scale * error)
        if name == "vanilla":
            cells = _pairs(*figures.mean_and_error(scale * arm.final))
        gap = results.difference(arm.final, _oracle(one, which))[0]
        rows.append(
            (
                name,
                *cells,
                results.mean_ratio(arm.final, base),
                float(ratios.max()),
                float(_sign(one) * gap.mean()),
                _mean(scale * arm.learning),
                _mean(scale * arm.forgetting),
            )
        )
    kind = "mean loss" if one.map.measure == "loss" else "error rate in percent"
    return Table(
        f"{one.map.name}-{which}",
        f"{_where(one)}: {_rates_words(which)}",
        (
            "arm",
            *one.map.regimes,
            "mean ratio",
            "worst ratio",
            "minus oracle constant",
            "right after learning",
            "forgetting",
        ),
        rows,
        f"Row `vanilla`: final {kind}. Other rows: difference to it"
        + (", lower is better." if scale == 1 else " in points of accuracy.")
        + " Learning and forgetting are means over the regimes.",
    )


def _oracle_table(one: MapResults, which: str) -> Table:
    by_arm: dict[str, ArmResults] = getattr(one, which)
    scale = abs(_sign(one))
    rows = []
    for name, arm in by_arm.items():
        mean, error = results.difference(arm.final, _oracle(one, which))
        rows.append((name, *_pairs(_sign(one) * mean, scale * error)))
    ratios, _ = results.ratio(_oracle(one, which), by_arm["vanilla"].final)
    rows.insert(0, ("oracle constant / vanilla", *(float(r) for r in ratios)))
    return Table(
        f"{one.map.name}-oracle",
        f"{_where(one)}: difference to the oracle constant, {_rates_words(which)}",
        ("arm", *one.map.regimes),
        rows,
        "The oracle takes the best strength, placement and rate of each regime on the "
        "reporting seeds themselves: a hard bar, and nothing that one could use.",
    )


def _rates_table(one: MapResults) -> Table:
    ends = min(one.map.rates), max(one.map.rates)
    rows = [
        (name, *(f"{rate:.2g}{'*' if rate in ends else ''}" for rate in arm.rates))
        for name, arm in one.matched.items()
    ]
    return Table(
        f"{one.map.name}-rates",
        f"{_where(one)}: learning rates chosen on the tuning seeds",
        ("arm", *one.map.regimes),
        rows,
        f"From {', '.join(f'{rate:.2g}' for rate in one.map.rates)}; a star marks an "
        "end of this grid, beyond which a better rate may lie.",
    )


def _regimes_table(one: MapResults, config: Any) -> Table:
    arm = one.fixed["vanilla"]
    rows = [("measured overlap s", *_pairs(*figures.mean_and_error(arm.overlap)))]
    if one.map.part == "regression":
        _, reported = configs.seeds(config)
        best = regression.joint_optimum(regression.make_data(reported))
        rows.append(("joint optimum", *_pairs(*figures.mean_and_error(best))))
    for which in ("matched", "fixed"):
        final = getattr(one, which)["vanilla"].final
        rows.append((f"vanilla, {which}", *_pairs(*figures.mean_and_error(final))))
    return Table(
        f"{one.map.name}-regimes",
        f"{_where(one)}: the regimes",
        ("quantity", *one.map.regimes),
        rows,
        "s is the share of the raw gradient's energy inside the protected subspace "
        "while plain Adam trains at the fixed rate, after the first task; the joint "
        "optimum is the least mean loss that any one model has.",
    )


def _by_size(maps: list[MapResults]) -> list[MapResults]:
    return sorted(maps, key=lambda one: (one.map.steps, one.map.rank))


def _settings_table(maps: list[MapResults]) -> Table:
    ordered, rows = _by_size(maps), []
    for name in maps[0].map.arms:
        cells: list[Any] = []
        for which in ("matched", "fixed"):
            for one in ordered:
                by_arm = getattr(one, which)
                if name not in by_arm:
                    cells += [None, None]
                    continue
                base = by_arm["vanilla"].final
                ratios, _ = results.ratio(by_arm[name].final, base)
                mean = results.mean_ratio(by_arm[name].final, base)
                cells += [mean, float(ratios.max())]
        rows.append((name, *cells))
    columns = [
        f"{one.map.steps} x {one.map.rank}, {which}, {kind}"
        for which in ("matched", "fixed")
        for one in ordered
        for kind in ("mean", "worst")
    ]
    return Table(
        f"{maps[0].map.part}-settings",
        f"{maps[0].map.part}: steps a task x rank, ratio to vanilla over the regimes",
        ("arm", *columns),
        rows,
    )


def _heat_figure(one: MapResults, which: str) -> Figure:
    by_arm: dict[str, ArmResults] = getattr(one, which)
    base = by_arm["vanilla"].final
    names = [n for n in by_arm if n != "vanilla"]
    values = np.array([results.ratio(by_arm[n].final, base)[0] for n in names])
    oracle = results.ratio(_oracle(one, which), base)[0]
    values = np.vstack([values, oracle])
    values = np.hstack([values, values.mean(1, keepdims=True)])
    labels = [*names, "oracle constant"]
    figure, axes = figures.new(
        width=3.2 + 0.75 * values.shape[1], height=1.9 + 0.3 * len(labels)
    )
    columns = [r.replace(" ", "\n") for r in one.map.regimes]
    kind = "final loss" if one.map.measure == "loss" else "error rate"
    figures.heat_map(
        axes[0, 0],
        values,
        labels,
        [*columns, "mean"],
        x="regime",
        y="arm",
        title=f"{_where(one)}\n{_rates_words(which)}",
        colour_label=f"{kind} / vanilla's",
        diverging_at=1.0,
    )
    caption = (
        f"Ratio of the mean {kind} over all tasks at the end to plain Adam's; below 1 "
        "(orange) is better, above 1 (purple) worse."
    )
    if one.map.part == "regression":
        caption += " Regimes: agreement of the targets, and overlap rho of the inputs."
    return Figure(
        f"{one.map.name}-{which}",
        f"{_where(one)}: {_rates_words(which)}",
        figure,
        caption,
    )


def _settings_figure(maps: list[MapResults]) -> Figure:
    common = [n for n in maps[-1].map.arms if n != "vanilla"]
    ordered = _by_size(maps)
    values = np.array(
        [
            [
                results.mean_ratio(one.matched[n].final, one.matched["vanilla"].final)[
                    0
                ]
                if n in one.matched
                else np.nan
                for one in ordered
            ]
            for n in common
        ]
    )
    figure, axes = figures.new(width=6.4, height=1.5 + 0.3 * len(common))
    figures.heat_map(
        axes[0, 0],
        values,
        common,
        [f"{one.map.steps}\nx {one.map.rank}" for one in ordered],
        x="steps a task x rank",
        y="arm",
        colour_label="mean ratio to vanilla",
        diverging_at=1.0,
    )
    return Figure(
        f"{maps[0].map.part}-settings",
        f"{maps[0].map.part}: task length and rank",
        figure,
        "Mean over the regimes of the ratio to plain Adam, learning rates tuned for "
        "every arm, regime, length and rank.",
    )


def _trade_figure(one: MapResults) -> Figure:
    base = one.fixed["vanilla"]
    scale = 100.0 if one.map.measure == "error" else 1.0
    marks = []
    for name, result in one.fixed.items():
        if name.startswith("raw"):
            continue
        arm = ARMS[name]
        marks.append(
            scatter.Mark(
                name,
                "none" if name == "vanilla" else arm.routing,
                "plain"
                if name == "vanilla"
                else "replay"
                if arm.routing == "replay"
                else arm.rule,
                _mean(scale * (result.learning - base.learning)),
                _mean(scale * (result.forgetting - base.forgetting)),
            )
        )
    figure, axes = figures.new(width=9.0, height=6.4)
    at = axes[0, 0]
    scatter.draw(at, marks)
    unit = "loss" if scale == 1 else "points of error"
    figures.label(
        at,
        f"right after learning, minus vanilla ({unit})",
        f"forgetting, minus vanilla ({unit})",
    )
    scatter.explain_marks(figure, marks)
    scatter.name_marks(figure, at, marks)
    return Figure(
        f"{one.map.name}-trade",
        f"{_where(one)}: forgetting less, or only learning less?",
        figure,
        "Means over the regimes at one learning rate for all, paired differences with "
        "standard errors. To the right an arm learns less, below it forgets less.",
    )
