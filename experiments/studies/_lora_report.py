"""Tables and figures of the adapter studies."""

from typing import NamedTuple

import numpy as np

from experiments import figures
from experiments.report import Figure, Report, Table
from experiments.studies import _lora_claims as claims
from experiments.studies import _lora_results as results
from experiments.studies._lora_results import ArmResults
from optax_cl import metrics


class Words(NamedTuple):
    """What a study calls its parts."""

    streams: dict[str, str]  # what a stream is, by name
    base: str  # what was known before the sequence
    base_note: str
    groups: dict[str, list[int]]  # which matrices are shown together
    # Whether a higher base is better.
    base_higher: bool = True


_SPECTRA = ("LoRA", "frozen A", "EBLoRA steep", "EBLoRA diagonal", "EBLoRA")
_SURGICAL = ("slice", "slice global", "slice always")
_TRADE = ("LoRA", "O-LoRA .1", "frozen A", "EBLoRA steep", "EBLoRA no memory", "EBLoRA")


def summarize(loaded: dict[str, dict[str, ArmResults]]) -> dict:
    """Every measure of every arm, seed by seed, for ``results.json``."""
    return {
        stream: {
            name: {"rate": r.rates[r.chosen], **r.at_rate._asdict()}
            for name, r in of.items()
        }
        for stream, of in loaded.items()
    }


def report(
    loaded: dict[str, dict[str, ArmResults]], words: Words, summary: str
) -> Report:
    """Everything a reader gets to see."""
    tables, pictures = [], []
    for stream, of in loaded.items():
        trained, starts = _groups(of)
        if trained:
            tables.append(_table(words, stream, "methods", "What is trained", trained))
            pictures.append(_trade_figure(words, stream, trained))
            pictures.append(_spectra_figure(words, stream, trained))
        if starts:
            tables.append(
                _table(words, stream, "starts", "Where adapters start", starts)
            )
            tables += _gate_tables(words, stream, starts)
        pictures.append(_difference_figure(words, stream, of))
    return Report(tables, pictures, claims.claims(loaded, words.base_higher), summary)


def _groups(of: dict[str, ArmResults]):
    starts = {n: r for n, r in of.items() if r.arm.family == "starts"}
    return {n: r for n, r in of.items() if n not in starts}, starts


def _cell(values: np.ndarray) -> tuple[float, float]:
    mean, error = metrics.mean_and_error(values)
    return float(mean), float(error)


def _table(words, stream, kind, title, of):
    control = of.get("LoRA") or of.get("init LoRA")
    rows = []
    for name, r in of.items():
        m = r.at_rate
        matched = None
        if control is not None and r is not control and not r.arm.family == "separate":
            matched = results.difference(
                results.plasticity_matched(r, control), np.zeros_like(m.final)
            )
        rows.append(
            (
                name,
                f"{r.rates[r.chosen]:g}",
                *(_cell(v) for v in (m.final, m.incremental, m.learning, m.backward)),
                matched,
                _cell(m.forward),
                _cell(m.base),
                _cell(m.top_energy),
                _cell(m.norm),
                _cell(m.largest),
                int(r.memory[r.chosen, r.tuning :, -1].sum(-1).mean().round()),
            )
        )
    return Table(
        f"{kind}-{stream}",
        f"{title}: {words.streams[stream]}",
        (
            "arm",
            "learning rate",
            "MFN",
            "MAA",
            "AP",
            "BWT",
            "MFN at equal AP",
            "FWT",
            words.base,
            "top energy",
            "norm",
            "σ₁",
            "memory",
        ),
        rows,
        "MFN: mean accuracy over the tasks at the end. MAA: the mean of that after "
        "each task. AP: accuracy right after learning a task. BWT: final minus AP, "
        "mean over all tasks but the last. MFN at equal AP: difference to plain LoRA "
        "at the learning rate where it learns as well. FWT: accuracy on tasks not "
        f"trained yet. {words.base_note} Top energy: share of the largest singular "
        "value of a task's update in the sum of squares; norm and σ₁ of the update, "
        "mean over kernels and tasks. Memory: columns in use at the end, all kernels.",
    )


def _gate_tables(words, stream, starts):
    surgical = {n: r for n, r in starts.items() if r.arm.start in _SURGICAL}
    if not surgical:
        return []
    rows = []
    for name, r in surgical.items():
        # The first task has no old tasks to conflict with.
        opened = r.opened[r.chosen, r.tuning :, 1:].mean(1)
        cosine = r.cosine[r.chosen, r.tuning :, 1:].mean(1)
        rows.append(
            (
                name,
                *(_cell(opened[:, at].mean(1)) for at in words.groups.values()),
                *(_cell(cosine[:, at].mean(1)) for at in words.groups.values()),
            )
        )
    names = tuple(words.groups)
    return [
        Table(
            f"gates-{stream}",
            f"How often gradients conflict at a task's start: {words.streams[stream]}",
            (
                "arm",
                *(f"gate open, {n}" for n in names),
                *(f"cosine, {n}" for n in names),
            ),
            rows,
            "Share of the later tasks whose gate was open, and the mean cosine between "
            "the new task's gradient and that of the old tasks.",
        )
    ]


def _trade_figure(words, stream, of):
    figure, axes = figures.new()
    shown = [n for n in _TRADE if n in of] or list(of)[:6]
    for i, name in enumerate(shown):
        r = of[name]
        look = figures.style(i)
        each = [r.measures(k) for k in range(len(r.rates))]
        x, xe = zip(*(_cell(m.learning) for m in each), strict=True)
        y, ye = zip(*(_cell(m.final) for m in each), strict=True)
        axes[0, 0].errorbar(
            x,
            y,
            xerr=xe,
            yerr=ye,
            color=look["color"],
            marker=look["marker"],
            capsize=2,
            linewidth=1.2,
            markersize=5,
            label=name,
        )
    figures.label(
        axes[0, 0],
        "accuracy right after learning (AP)",
        "accuracy at the end (MFN)",
        f"Learning against keeping, along the learning rates: {words.streams[stream]}",
    )
    axes[0, 0].legend(fontsize=8)
    return Figure(
        f"trade-{stream}",
        "Learning against keeping",
        figure,
        "Each curve goes through the learning rates of one arm, reporting seeds, with "
        "standard errors. Up and to the right is better.",
    )


def _spectra_figure(words, stream, of):
    shown = [n for n in _SPECTRA if n in of]
    figure, axes = figures.new(1, len(words.groups), width=9.0, height=3.4)
    for column, (name, at) in enumerate(words.groups.items()):
        series = {}
        for arm in shown:
            r = of[arm]
            # [seeds, tasks, matrices, rank], relative to the sum
            values = r.singular[r.chosen, r.tuning :][:, :, at]
            share = values / np.maximum(values.sum(-1, keepdims=True), 1e-30)
            mean, error = figures.mean_and_error(share.mean((1, 2)))
            series[arm] = (np.arange(1, len(mean) + 1), mean, error)
        figures.lines(
            axes[0, column],
            series,
            x="singular value number",
            y="share of the sum" if column == 0 else "share",
            title=name,
            markers=True,
        )
        axes[0, column].xaxis.get_major_locator().set_params(integer=True)
        # One scale for all kernels, so that panels can be compared.
        axes[0, column].set_ylim(-0.03, 1.03)
        if legend := axes[0, column].get_legend():
            legend.remove()
    if len(shown) > 1:
        axes[0, 0].legend(fontsize=7)
    return Figure(
        f"spectra-{stream}",
        "Singular values of a task's update",
        figure,
        "Mean over tasks and seeds; the band is one standard error over seeds.",
    )


def _difference_figure(words, stream, of):
    figure, axes = figures.new(height=4.8)
    trained, starts = _groups(of)
    names, series = [], []
    for group, control in ((trained, "LoRA"), (starts, "init LoRA")):
        if control not in group:
            continue
        for name, r in group.items():
            if name != control:
                names.append(name)
                series.append(
                    results.difference(r.at_rate.final, group[control].at_rate.final)
                )
    if names:
        mean, error = zip(*series, strict=True)
        place = np.arange(len(names))[::-1]
        axes[0, 0].errorbar(
            100 * np.array(mean),
            place,
            xerr=100 * np.array(error),
            color=figures.OKABE_ITO[0],
            marker="o",
            linestyle="none",
            capsize=3,
        )
        axes[0, 0].axvline(0, color="black", linewidth=0.8)
        axes[0, 0].set_yticks(place, names, fontsize=8)
    figures.label(
        axes[0, 0],
        "final accuracy minus plain LoRA's (points)",
        "arm",
        f"Difference at the end: {words.streams[stream]}",
    )
    return Figure(
        f"differences-{stream}",
        "Difference to plain LoRA",
        figure,
        "Paired by seed, with standard errors; each arm at its own learning rate. "
        "Starts are compared with LoRA's start at their own ranks and scales.",
    )
