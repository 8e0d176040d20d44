"""Differences between arms of the domain stream, over the seeds that they share."""

from typing import NamedTuple

import numpy as np

from experiments.claims import format_number
from experiments.studies._stream_results import ArmResults
from optax_cl import metrics

Results = dict[str, ArmResults]


class Pair(NamedTuple):
    """A mean over seeds and its standard error."""

    mean: float
    se: float

    def __str__(self):
        return ("" if self.mean < 0 else "+") + format_number(*self)


def over_seeds(values: np.ndarray) -> Pair:
    mean, se = metrics.mean_and_error(values)
    return Pair(float(mean), float(se))


def forgetting(results: Results, name: str, other: str = "vanilla") -> Pair:
    return over_seeds(results[name].forgetting - results[other].forgetting)


def learning(results: Results, name: str, other: str = "vanilla") -> Pair:
    return over_seeds(results[name].learning - results[other].learning)


def final(results: Results, name: str, other: str = "vanilla") -> Pair:
    return over_seeds(results[name].final - results[other].final)


def beside(results: Results, name: str, other: str = "vanilla") -> str:
    """What a difference in forgetting means nothing without."""
    return (
        f"the same in loss right after learning: {learning(results, name, other)}, in "
        f"final loss: {final(results, name, other)}"
    )
