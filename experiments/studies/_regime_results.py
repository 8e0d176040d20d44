"""What a run of the regime map measured, arm by arm, regime by regime, seed by seed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import run_folder
from experiments.studies import _regime_arms as arms
from experiments.studies import _regime_digits as digits
from experiments.studies import _regime_regression as regression
from optax_cl import metrics

# A loss that is not finite counts as this much, so that it can be averaged and loses.
CEILING = 1e3
_SHARED = ("max 0.5", "max 0.75", "max 0.9", "post 0.5", "post 0.75", "post 0.9")
REGRESSION_ARMS = (
    "vanilla",
    "shared 0.5",
    "max 0.25",
    *_SHARED,
    "post 1",
    "one_minus .5",
    "proportional 1",
    "ratchet 0.75",
    "balance 0.3",
    "balance 1",
    "balance 3",
    "post balance 1",
    "spring 1",
    "replay 0.8",
)
DIGIT_ARMS = (
    "vanilla",
    "raw 0.5",
    "raw balance 3",
    "shared 0.5",
    *_SHARED,
    "post 1",
    "one_minus .5",
    "proportional 1",
    "ratchet 0.5",
    "ratchet 0.75",
    "ratchet 0.9",
    "balance 1",
    "balance 3",
    "balance 10",
    "balance 30",
    "balance 1, T=2",
    "balance 1, T=4",
    "spring 1",
    "replay 0.5",
)
# At other lengths and ranks; two programs, with and without a modifier after Adam.
CORE = (
    "vanilla",
    "max 0.5",
    "max 0.75",
    "post 0.9",
    "ratchet 0.75",
    "balance 1",
    "spring 1",
)
DIGIT_SIDE = (
    "vanilla",
    "max 0.75",
    "max 0.9",
    "post 1",
    "ratchet 0.75",
    "balance 1",
    "balance 10",
    "balance 1, T=4",
)


class Map(NamedTuple):
    """One heat map: a benchmark at one task length and rank."""

    name: str
    part: str
    steps: int
    rank: int
    tasks: int
    regimes: tuple[str, ...]
    rates: tuple[float, ...]
    fixed: int  # index of the fixed rate
    arms: tuple[str, ...]
    measure: str  # "loss" or "error"


class ArmResults(NamedTuple):
    """One arm on one map; arrays are ``[reporting seeds, regimes]``."""

    final: np.ndarray  # mean over tasks at the end
    learning: np.ndarray  # right after learning each task, mean over tasks
    forgetting: np.ndarray  # final minus right after learning, all tasks but the last
    rates: np.ndarray  # [regimes], learning rates
    overlap: np.ndarray  # measured overlap s after the first task
    largest: np.ndarray  # largest step over learning rate; infinite if not a number


class MapResults(NamedTuple):
    """All arms of a map."""

    map: Map
    matched: dict[str, ArmResults]  # by arm, at its tuned rates
    fixed: dict[str, ArmResults]  # by arm, at the fixed rate
    oracle_matched: np.ndarray  # [seeds, regimes], the best constant's final
    oracle_fixed: np.ndarray


def maps(config: Any) -> list[Map]:
    """The maps of a config, the main one of each part first."""
    found = []
    if "regression" in config.parts:
        for steps in config.steps:
            for rank in config.ranks:
                side = bool(found) and config.side_arms == "core"
                found.append(
                    Map(
                        f"regression-{steps}x{rank}",
                        "regression",
                        steps,
                        rank,
                        regression.TASKS,
                        regression.REGIMES,
                        config.rates,
                        config.rates.index(config.fixed_rate),
                        CORE if side else REGRESSION_ARMS,
                        "loss",
                    )
                )
    if "digits" in config.parts:
        for index, rank in enumerate(config.digit_ranks):
            found.append(
                Map(
                    f"digits-{config.digit_steps}x{rank}",
                    "digits",
                    config.digit_steps,
                    rank,
                    digits.TASKS,
                    digits.STREAMS,
                    config.digit_rates,
                    config.digit_rates.index(config.digit_fixed_rate),
                    DIGIT_SIDE if index else DIGIT_ARMS,
                    "error",
                )
            )
    return found


def by_routing(one: Map) -> dict[str, list[str]]:
    """A map's arms by routing: each entry is one program."""
    found: dict[str, list[str]] = {}
    for name in one.arms:
        found.setdefault(arms.ARMS[name].routing, []).append(name)
    return found


def load(folder: Path, config: Any) -> list[MapResults]:
    """Reads all maps of a finished run."""
    return [_load_map(Path(folder), one, config.tuning) for one in maps(config)]


def tuned(finals: np.ndarray, tuning: int) -> np.ndarray:
    """Index of each regime's best rate on the first ``tuning`` seeds, ``[regimes]``.

    Args:
      finals: ``[seeds, regimes, rates]``; the tuning seeds come first.
      tuning: How many they are.
    """
    return finals[:tuning].mean(0).argmin(-1)


def _load_map(folder, one, tuning):
    raw = {}
    for routing, members in by_routing(one).items():
        arrays = run_folder.load_program(folder, f"{one.name}-{routing}")
        for index, name in enumerate(members):
            raw[name] = {
                key: array.reshape(len(members), -1, *array.shape[1:])[index]
                for key, array in arrays.items()
            }
    matched, fixed, finals = {}, {}, {}
    for name in one.arms:
        measures = _measures(raw[name], one.measure)
        finals[name] = measures["final"]
        best = tuned(measures["final"], tuning)
        matched[name] = _at(measures, best, tuning, one.rates)
        level = np.full(len(one.regimes), one.fixed)
        fixed[name] = _at(measures, level, tuning, one.rates)
    constants = [finals[n][tuning:] for n in one.arms if n in arms.CONSTANTS]
    every = np.concatenate(constants, axis=-1)  # [seeds, regimes, constants * rates]
    at_fixed = np.stack([f[..., one.fixed] for f in constants], axis=-1)
    return MapResults(one, matched, fixed, _best(every), _best(at_fixed))


def _best(candidates):
    index = candidates.mean(0).argmin(-1)
    return np.take_along_axis(candidates, index[None, :, None], axis=-1)[..., 0]


def _measures(arrays, measure):
    """Each ``[seeds, regimes, rates]``."""
    # [seeds, T + 1, regimes, rates, T] -> [seeds, regimes, rates, T + 1, T]
    matrix = np.moveaxis(arrays[f"evaluate/{measure}"].astype(np.float64), 1, 3)
    matrix = np.where(np.isfinite(matrix), np.minimum(matrix, CEILING), CEILING)
    largest = arrays["boundary/largest_step"][:, -1]
    return {
        "final": metrics.average_accuracy(matrix),
        "learning": metrics.learning_accuracy(matrix),
        "forgetting": metrics.backward_transfer(matrix),
        "overlap": arrays["boundary/overlap"][:, 1:].mean(1),
        "largest": np.where(np.isnan(largest), np.inf, largest),
    }


def _at(measures, index, tuning, rates):
    def pick(array):
        return np.take_along_axis(array[tuning:], index[None, :, None], -1)[..., 0]

    return ArmResults(
        rates=np.array(rates)[index], **{name: pick(a) for name, a in measures.items()}
    )


# -- numbers for tables ----------------------------------------------------------------


def difference(ours: np.ndarray, theirs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Paired difference over seeds with its standard error, for every regime."""
    return metrics.paired_difference(ours, theirs)


def ratio(ours: np.ndarray, theirs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ratio of means over seeds and its standard error, for every regime.

    Args:
      ours: ``[seeds, regimes]``.
      theirs: ``[seeds, regimes]``.

    Returns:
      Two arrays ``[regimes]``; the error is that of a ratio to first order, which
      keeps the pairing of seeds.
    """
    value = ours.mean(0) / theirs.mean(0)
    return value, _spread(_influence(ours, theirs))


def mean_ratio(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """The mean over regimes of ``ratio``, and its standard error over seeds."""
    value = ours.mean(0) / theirs.mean(0)
    return float(value.mean()), float(_spread(_influence(ours, theirs).mean(1)))


def ratio_gap(
    ours: np.ndarray, other: np.ndarray, theirs: np.ndarray
) -> tuple[float, float]:
    """``mean_ratio`` of ``ours`` minus that of ``other``, with its standard error."""
    gap = mean_ratio(ours, theirs)[0] - mean_ratio(other, theirs)[0]
    influence = _influence(ours, theirs) - _influence(other, theirs)
    return gap, float(_spread(influence.mean(1)))


def worst(values: Sequence[float], errors: Sequence[float]) -> int:
    """Index of the value farthest above zero in units of its error."""
    errors = np.maximum(np.asarray(errors), 1e-12)
    return int(np.argmax(np.asarray(values) / errors))


def _influence(ours, theirs):
    base = theirs.mean(0)
    return (ours - ours.mean(0) / base * theirs) / base


def _spread(values):
    return values.std(0, ddof=1) / np.sqrt(len(values))
