"""What the claims of the regime map share: numbers, verdicts, and common shapes."""

import numpy as np

from experiments.claims import Claim, Verdict
from experiments.studies import _regime_results as results
from experiments.studies._regime_results import MapResults

SOURCE = "our prototypes"
NOISE = 2.0  # standard errors that count as noise


def verdict(holds: bool) -> Verdict:
    """The verdict on a claim that holds, or does not."""
    return "reproduced" if holds else "not reproduced"


def ran(one: MapResults, which: str = "matched") -> str:
    """What was run, in words."""
    rates = "tuned rates" if which == "matched" else "one rate"
    count = len(one.oracle_matched)
    return (
        f"{one.map.part}, {one.map.steps} steps, rank {one.map.rank}, {rates}, "
        f"{count} seeds"
    )


def final_of(one: MapResults, name: str, which: str = "matched") -> np.ndarray:
    """An arm's mean final loss or error, ``[seeds, regimes]``."""
    return getattr(one, which)[name].final


def gap_of(
    one: MapResults, ours: str, other: str, which: str = "matched"
) -> tuple[float, float]:
    """Difference of two arms' mean ratios to vanilla, with its error."""
    arms = (final_of(one, n, which) for n in (ours, other, "vanilla"))
    return results.ratio_gap(*arms)


def never_worse(one: MapResults, name: str, which: str = "matched") -> Claim:
    """That an arm loses to vanilla in no regime."""
    mean, error = results.difference(
        final_of(one, name, which), final_of(one, "vanilla", which)
    )
    at = results.worst(mean, error)
    scale = 100.0 if one.map.measure == "error" else 1.0
    holds = mean[at] <= NOISE * error[at]
    unit = "points of error" if scale == 100 else "loss"
    return Claim(
        f"{name} is never worse than vanilla beyond noise, both "
        + ("at their best learning rates" if which == "matched" else "at one rate"),
        SOURCE,
        ran(one, which),
        float(scale * mean[at]),
        float(scale * error[at]),
        verdict(bool(holds)),
        f"difference ({unit}) in its worst regime of {len(mean)}, "
        f"{one.map.regimes[at]}; noise is {NOISE:g} standard errors",
    )


def against_oracle(one: MapResults, name: str) -> Claim:
    """That an arm is as good as the best constant of each regime."""
    gap = (final_of(one, name) - one.oracle_matched).mean(1)
    mean, error = float(gap.mean()), float(gap.std(ddof=1) / np.sqrt(len(gap)))
    scale = 100.0 if one.map.measure == "error" else 1.0
    return Claim(
        f"{name} is level with the oracle constant, or better",
        SOURCE,
        ran(one),
        scale * mean,
        scale * error,
        verdict(mean <= NOISE * error),
        "difference, mean over regimes; the oracle is chosen on the reporting seeds",
    )


def less(one: MapResults, ours: str, other: str, text: str) -> Claim:
    """That one arm's mean ratio to vanilla is below another's."""
    gap, error = gap_of(one, ours, other)
    return Claim(
        text,
        SOURCE,
        ran(one),
        gap,
        error,
        verdict(gap < -NOISE * error),
        f"mean ratio to vanilla of {ours}, minus that of {other}",
    )
