"""Tables and figures of the adapter study."""

from pathlib import Path
from typing import Any

import numpy as np

from experiments import figures, run_folder
from experiments.report import Figure, Report, Table
from experiments.studies import _lora_claims as claims
from experiments.studies import _lora_results as results
from experiments.studies._lora_results import ArmResults
from optax_cl import metrics

QUICK = (
    "LoRA",
    "frozen A",
    "EBLoRA",
    "EBLoRA steep",
    "EBLoRA no memory",
    "init LoRA",
    "init LoRA-GA",
    "SLICE 1",
)
_WORDS = {
    "pixels": "pixels exchanged",
    "labels": "pixels exchanged and classes renamed",
}
_SPECTRA = ("LoRA", "frozen A", "EBLoRA steep", "EBLoRA diagonal", "EBLoRA")
_TRADE = ("LoRA", "O-LoRA .1", "frozen A", "EBLoRA steep", "EBLoRA no memory", "EBLoRA")


def summarize(folder: Path, config: Any) -> dict:
    """Every measure of every arm, seed by seed, for ``results.json``."""
    return {
        stream: {
            name: {"rate": r.rates[r.chosen], **r.at_rate._asdict()}
            for name, r in of.items()
        }
        for stream, of in results.load(folder, config).items()
    }


def report(folder: Path, config_class: type) -> Report:
    """Everything a reader gets to see."""
    saved = run_folder.read_record(folder)["config"]
    config = config_class(
        **{k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}
    )
    loaded = {s: of for s, of in results.load(folder, config).items() if of}
    tables, pictures = [], []
    for stream, of in loaded.items():
        trained, starts = _groups(of)
        if trained:
            tables.append(_table(stream, "methods", "What is trained, how", trained))
            pictures.append(_trade_figure(stream, trained))
            pictures.append(_spectra_figure(stream, trained))
        if starts:
            tables.append(_table(stream, "starts", "Where adapters start", starts))
            tables += _gate_tables(stream, starts)
        pictures.append(_difference_figure(stream, of))
    tuning, reported = results.seeds(config)
    summary = (
        f"Accuracies on held-out images, mean and standard error over {len(reported)} "
        f"seeds. Learning rates were chosen on {len(tuning)} other seeds, from "
        f"{', '.join(f'{r:g}' for r in config.rates)}."
    )
    return Report(tables, pictures, claims.claims(loaded), summary)


def _groups(of: dict[str, ArmResults]):
    starts = {n: r for n, r in of.items() if r.arm.family == "starts"}
    return {n: r for n, r in of.items() if n not in starts}, starts


def _cell(values: np.ndarray) -> tuple[float, float]:
    mean, error = metrics.mean_and_error(values)
    return float(mean), float(error)


def _table(stream, kind, title, of):
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
        f"{title}: {_WORDS[stream]}",
        (
            "arm",
            "learning rate",
            "MFN",
            "MAA",
            "AP",
            "BWT",
            "MFN at equal AP",
            "FWT",
            "base task",
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
        "trained yet. Top energy: share of the largest singular value of a task's "
        "update in the sum of squares; norm and σ₁ of the update, mean over kernels "
        "and tasks. Memory: columns in use at the end, all kernels.",
    )


def _gate_tables(stream, starts):
    surgical = {n: r for n, r in starts.items() if r.arm.start.startswith("slice")}
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
                *(_cell(opened[:, i]) for i in range(opened.shape[1])),
                *(_cell(cosine[:, i]) for i in range(cosine.shape[1])),
            )
        )
    names = results.layers()
    return [
        Table(
            f"gates-{stream}",
            f"How often gradients conflict at a task's start: {_WORDS[stream]}",
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


def _trade_figure(stream, of):
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
        f"Learning against keeping, along the learning rates: {_WORDS[stream]}",
    )
    axes[0, 0].legend(fontsize=8)
    return Figure(
        f"trade-{stream}",
        "Learning against keeping",
        figure,
        "Each curve goes through the learning rates of one arm, reporting seeds, with "
        "standard errors. Up and to the right is better.",
    )


def _spectra_figure(stream, of):
    shown = [n for n in _SPECTRA if n in of]
    figure, axes = figures.new(1, 3, width=9.0, height=3.4)
    for layer, name in enumerate(results.layers()):
        series = {}
        for arm in shown:
            r = of[arm]
            # [seeds, tasks, rank] -> each seed's mean over tasks, relative to the sum
            values = r.singular[r.chosen, r.tuning :, :, layer]
            share = values / np.maximum(values.sum(-1, keepdims=True), 1e-30)
            mean, error = figures.mean_and_error(share.mean(1))
            series[arm] = (np.arange(1, len(mean) + 1), mean, error)
        figures.lines(
            axes[0, layer],
            series,
            x="singular value number",
            y="share of the sum" if layer == 0 else "share",
            title=name,
            markers=True,
        )
        if layer and axes[0, layer].get_legend():
            axes[0, layer].get_legend().remove()
        elif axes[0, layer].get_legend():
            axes[0, layer].legend(fontsize=7)
    return Figure(
        f"spectra-{stream}",
        "Singular values of a task's update",
        figure,
        "Mean over tasks and seeds; the band is one standard error over seeds.",
    )


def _difference_figure(stream, of):
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
        f"Difference at the end: {_WORDS[stream]}",
    )
    return Figure(
        f"differences-{stream}",
        "Difference to plain LoRA",
        figure,
        "Paired by seed, with standard errors; each arm at its own learning rate. "
        "Starts are compared with LoRA's start at their own ranks and scales.",
    )
