"""Which pairs were mined, and what the warm-up before did: tables and a figure."""

from typing import Any

import numpy as np

from experiments import figures
from experiments.report import Figure, Table


def tables(mined: dict[str, Any]) -> list[Table]:
    """The pairs with their cosines, and the model before and after its warm-up.

    Args:
      mined: The run's ``mined.json``.
    """
    before, after = (np.array(mined[when]["cosines"]) for when in ("before", "after"))
    rows = [
        (
            mined["names"][i],
            mined["names"][j],
            float(before[i, j]),
            float(after[i, j]),
        )
        for i, j in mined["pairs"]
    ]
    pairs = Table(
        "mined",
        "Mined pairs, and the cosine of their gradients",
        ("first", "second", "cosine before the warm-up", "after it"),
        rows,
        f"{_spread('Before the warm-up', before)} {_spread('After it', after)}",
    )
    names = {
        "mass": "probability of yes or no",
        "yes": "share of yes in it",
        "right": "accuracy",
    }
    changed = [
        (name, *(_over_questions(mined[when][key]) for when in ("before", "after")))
        for key, name in names.items()
    ]
    changed.append(
        ("general loss", *(f"{mined[when]['general']:.3f}" for when in _WHEN))
    )
    warm = Table(
        "warm-up",
        "What the model learns of the format",
        ("measure", "before", "after"),
        changed,
        "Mean over the questions of the pool, and their standard deviation. The "
        f"warm-up's loss at the end is {np.mean(mined['losses'][-10:]):.3f}; a coin "
        f"that knows the format has {np.log(2):.3f}.",
    )
    return [pairs, warm]


def figure(mined: dict[str, Any]) -> Figure:
    """Histograms of all pairs' cosines before and after the warm-up."""
    drawn, axes = figures.new()
    bins = np.linspace(-1, 1, 41).tolist()
    for i, when in enumerate(_WHEN):
        axes[0, 0].hist(
            _pairs(np.array(mined[when]["cosines"])),
            bins,
            alpha=0.6,
            color=figures.OKABE_ITO[i],
            label=f"{when} the warm-up",
        )
    axes[0, 0].axvline(0, color="black", linewidth=0.8)
    figures.label(
        axes[0, 0],
        "cosine of two questions' mean gradients",
        "pairs",
        "Do questions conflict?",
    )
    axes[0, 0].legend(fontsize=8)
    return Figure(
        "mined",
        "Cosines of all pairs of questions",
        drawn,
        "Left of zero, a step for one question makes the other's loss larger.",
    )


_WHEN = ("before", "after")


def _pairs(cosines):
    return cosines[np.triu_indices(len(cosines), 1)]


def _spread(when, cosines):
    values = _pairs(cosines)
    return (
        f"{when} the cosine of all {values.size} pairs is {values.mean():.2f} in the "
        f"mean, {values.min():.2f} at least, and below zero for "
        f"{(values < 0).mean():.0%}."
    )


def _over_questions(values):
    return f"{np.mean(values):.3f} (sd {np.std(values):.3f})"
