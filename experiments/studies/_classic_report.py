"""Results, tables, figures and claims of the study of the classic methods."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import figures, run_folder
from experiments.claims import Claim
from experiments.report import Figure, Report, Table
from experiments.studies import _classic_arms as arms
from optax_cl import metrics

_TITLES = {
    "domain": "domain: other pixels in each task",
    "class": "class: two new classes a task, one head",
    "task": "task: the same, the task told",
}


class Measures(NamedTuple):
    """One method in one scenario; arrays are ``[reporting seeds]``."""

    rate: float
    strength: float
    final: np.ndarray  # mean accuracy over the tasks at the end
    learning: np.ndarray  # right after learning a task, mean over tasks
    backward: np.ndarray  # final minus that, mean over all tasks but the last
    first: np.ndarray  # final accuracy on the first task


def settings(
    name: str, scenarios: tuple[str, ...], rates: tuple[float, ...]
) -> list[arms.Setting]:
    """All that is tried for a method."""
    return [
        arms.Setting(scenario, strength, rate)
        for scenario in scenarios
        for strength in arms.METHODS[name].strengths
        for rate in rates
    ]


def best(
    accuracy: np.ndarray, tried: list[arms.Setting], scenarios: tuple[str, ...]
) -> list[arms.Setting]:
    """Of each scenario the setting of the best final accuracy.

    Args:
      accuracy: ``[settings * tuning seeds, T + 1, T]``.
      tried: The settings.
      scenarios: The scenarios.
    """
    finals = np.asarray(metrics.average_accuracy(accuracy.astype(np.float64)))
    finals = finals.reshape(len(tried), -1).mean(1)
    found = []
    for scenario in scenarios:
        own = [i for i, setting in enumerate(tried) if setting.scenario == scenario]
        found.append(tried[max(own, key=lambda i: finals[i])])
    return found


def load(
    folder: Path, config: Any, chosen: dict[str, tuple[str, ...]]
) -> dict[str, dict[str, Measures]]:
    """Reads a finished run: ``{scenario: {method: measures}}``."""
    found: dict[str, dict[str, Measures]] = {s: {} for s in config.scenarios}
    for name, scenarios in chosen.items():
        tuned, reported = (
            run_folder.load_program(Path(folder), program)["evaluate/accuracy"]
            for program in (f"{name}, tuning", name)
        )
        tried = settings(name, scenarios, config.rates)
        reported = reported.astype(np.float64)
        reported = reported.reshape(len(scenarios), -1, *reported.shape[1:])
        for setting, matrix in zip(
            best(tuned, tried, scenarios), reported, strict=True
        ):
            found[setting.scenario][name] = Measures(
                setting.rate,
                setting.strength,
                np.asarray(metrics.average_accuracy(matrix)),
                np.asarray(metrics.learning_accuracy(matrix)),
                np.asarray(metrics.backward_transfer(matrix)),
                matrix[:, -1, 0],
            )
    return {scenario: of for scenario, of in found.items() if of}


def summarize(loaded: dict[str, dict[str, Measures]]) -> dict:
    """Every measure of every method, seed by seed, for ``results.json``."""
    return {
        scenario: {name: m._asdict() for name, m in of.items()}
        for scenario, of in loaded.items()
    }


def report(loaded: dict[str, dict[str, Measures]], config: Any) -> Report:
    """Everything a reader gets to see."""
    tables = [_table(scenario, of) for scenario, of in loaded.items()]
    pictures = [_final_figure(loaded)]
    summary = (
        f"Accuracies on held-out images, mean and standard error over {config.seeds} "
        f"seeds. Learning rates ({', '.join(f'{r:g}' for r in config.rates)}) and "
        f"strengths were chosen on {config.tuning} other seeds."
    )
    return Report(tables, pictures, _claims(loaded), summary)


def _cell(values):
    mean, error = metrics.mean_and_error(values)
    return float(mean), float(error)


def _difference(ours, theirs):
    value, error = metrics.paired_difference(ours, theirs)
    return float(value), float(error)


def _table(scenario, of):
    control = of.get("fine-tuning")
    rows = []
    for name, m in of.items():
        method = arms.METHODS[name]
        gain = None
        if control is not None and m is not control:
            gain = _difference(m.final, control.final)
        rows.append(
            (
                name,
                method.keeps,
                f"{m.rate:g}",
                f"{m.strength:g}" if len(method.strengths) > 1 else "-",
                *(_cell(v) for v in (m.final, m.learning, m.backward, m.first)),
                gain,
            )
        )
    return Table(
        scenario,
        f"Scenario {_TITLES[scenario]}",
        (
            "method",
            "keeps",
            "learning rate",
            "strength",
            "final accuracy",
            "right after learning",
            "backward transfer",
            "first task",
            "final minus fine-tuning",
        ),
        rows,
        "Final accuracy: mean over the tasks at the end. Backward transfer: final "
        "minus right after learning, mean over all tasks but the last. First task: its "
        "accuracy at the end. Differences are paired by seed.",
    )


def _final_figure(loaded):
    names = [n for n in arms.METHODS if any(n in of for of in loaded.values())]
    figure, axes = figures.new(
        1, len(loaded), width=4.2 * len(loaded), height=1.2 + 0.24 * len(names)
    )
    place = {name: len(names) - 1 - i for i, name in enumerate(names)}
    for column, (scenario, of) in enumerate(loaded.items()):
        at, here = [place[name] for name in of], axes[0, column]
        here.plot(
            [m.learning.mean() for m in of.values()],
            at,
            color="black",
            marker="o",
            fillstyle="none",
            linestyle="none",
            markersize=4,
            label="right after learning",
        )
        mean, error = zip(*(_cell(m.final) for m in of.values()), strict=True)
        here.errorbar(
            mean,
            at,
            xerr=error,
            color=figures.OKABE_ITO[0],
            marker="D",
            linestyle="none",
            markersize=5,
            capsize=3,
            label="at the end",
        )
        if "fine-tuning" in of:
            here.axvline(of["fine-tuning"].final.mean(), color="black", linewidth=0.8)
        here.set_yticks(
            list(place.values()), names if column == 0 else [""] * len(names)
        )
        here.set_ylim(-0.6, len(names) - 0.4)
        figures.label(
            here,
            "accuracy, mean over the tasks",
            "method" if column == 0 else " ",
            _TITLES[scenario],
        )
    axes[0, 0].legend(fontsize=8, loc="lower center")
    return Figure(
        "final",
        "Accuracy right after learning a task, and at the end",
        figure,
        "Mean and standard error over seeds; the line is fine-tuning at the end. What "
        "a method forgets is the way from the circle to the diamond; a circle further "
        "left is what its protection, and the learning rate it wants, cost.",
    )


def _claims(loaded):
    rows = [
        _pair(loaded, claim, source, scenario, ours, theirs)
        for claim, source, scenario, ours, theirs in _PAIRS
    ]
    rows += [_useless(loaded, name) for name in ("EWC", "SI", "MAS", "LwF")]
    rows += [_kept(loaded, name) for name in ("PackNet", "Progressive")]
    return [row for row in rows if row is not None]


_VEN = "van de Ven et al, arXiv 1904.07734"
_DER = "Buzzega et al, arXiv 2004.07211"
# What is claimed, by whom, where, and which method is said to end above which.
_PAIRS = (
    ("EWC forgets less", "Kirkpatrick et al, arXiv 1612.00796", "domain", "EWC", None),
    (
        "Kronecker factors are better than a diagonal",
        "Ritter et al, arXiv 1805.07810",
        "domain",
        "Kronecker",
        "EWC",
    ),
    ("SI forgets less", "Zenke et al, arXiv 1703.04200", "domain", "SI", None),
    ("MAS forgets less", "Aljundi et al, arXiv 1711.09601", "domain", "MAS", None),
    ("LwF helps where the task is told", _VEN, "task", "LwF", None),
    (
        "OGD is better than EWC",
        "Farajtabar et al, arXiv 1910.07104",
        "domain",
        "OGD",
        "EWC",
    ),
    ("GPM is better than OGD", "Saha et al, arXiv 2103.09762", "domain", "GPM", "OGD"),
    (
        "GPM is better than A-GEM",
        "Saha et al, arXiv 2103.09762",
        "domain",
        "GPM",
        "A-GEM",
    ),
    ("SGP is better than GPM", "Saha & Roy, arXiv 2302.01386", "domain", "SGP", "GPM"),
    (
        "SGP is better than GPM, one head",
        "Saha & Roy, arXiv 2302.01386",
        "class",
        "SGP",
        "GPM",
    ),
    (
        "A-GEM is better before the moments than behind them",
        "control",
        "domain",
        "A-GEM",
        "A-GEM behind",
    ),
    (
        "A-GEM is better before the moments than behind them, one head",
        "control",
        "class",
        "A-GEM",
        "A-GEM behind",
    ),
    ("GEM is better than A-GEM in one head", _DER, "class", "GEM", "A-GEM"),
    ("replay is better than GEM", _DER, "class", "replay", "GEM"),
    (
        "replay is better than A-GEM",
        "Chaudhry et al, arXiv 1902.10486",
        "class",
        "replay",
        "A-GEM",
    ),
    ("DER++ is better than replay", _DER, "class", "DER++", "replay"),
    ("DER++ is better than replay, other pixels", _DER, "domain", "DER++", "replay"),
    (
        "ER-ACE is better than replay",
        "Caccia et al, arXiv 2104.05025",
        "class",
        "ER-ACE",
        "replay",
    ),
    (
        "iCaRL is better than LwF in one head",
        "Rebuffi et al, arXiv 1611.07725",
        "class",
        "iCaRL",
        "LwF",
    ),
    ("PCGrad is better than plain replay", "control", "domain", "PCGrad", "replay"),
    (
        "a few examples are better than a diagonal penalty",
        "control",
        "domain",
        "replay",
        "MAS",
    ),
    (
        "a few examples are better than Kronecker factors",
        "control",
        "domain",
        "replay",
        "Kronecker",
    ),
    (
        "a few examples are better than Kronecker factors, one head",
        "control",
        "class",
        "replay",
        "Kronecker",
    ),
    ("balance is better than EWC", "control", "domain", "balance", "EWC"),
    (
        "columns, ten times the parameters, are better than packing",
        "control",
        "task",
        "Progressive",
        "PackNet",
    ),
)


def _pair(loaded, claim, source, scenario, ours, theirs):
    of, theirs = loaded.get(scenario, {}), theirs or "fine-tuning"
    if ours not in of or theirs not in of:
        return None
    value, error = _difference(of[ours].final, of[theirs].final)
    return Claim(
        claim,
        source,
        f"{scenario}, final accuracy: {ours} minus {theirs}",
        value,
        error,
        "reproduced" if value > 2 * error else "not reproduced",
        "" if abs(value) > 2 * error else "Not told apart.",
    )


def _useless(loaded, name):
    of = loaded.get("class", {})
    if name not in of or "fine-tuning" not in of:
        return None
    value, error = _difference(of[name].final, of["fine-tuning"].final)
    return Claim(
        f"{name} does not help where classes come one after another",
        _VEN,
        f"class, final accuracy: {name} minus fine-tuning",
        value,
        error,
        "reproduced" if value + 2 * error < 0.05 else "not reproduced",
        "Read as: a gain under .05, by two standard errors.",
    )


def _kept(loaded, name):
    of = loaded.get("task", {})
    if name not in of:
        return None
    value, error = _cell(of[name].backward)
    return Claim(
        f"{name} forgets nothing",
        "by construction",
        "task, backward transfer",
        value,
        error,
        "reproduced" if np.all(of[name].backward == 0) else "not reproduced",
    )
