"""What a run of an adapter study measured, arm by arm and seed by seed."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from experiments import run_folder
from experiments.studies import _lora_arms as arms
from optax_cl import metrics


class ArmResults(NamedTuple):
    """One arm on one stream; arrays are ``[rates, seeds, ...]``, tuning seeds first."""

    arm: arms.Arm
    rates: np.ndarray  # [rates]
    tuning: int  # how many seeds choose the rate
    matrix: np.ndarray  # [rates, seeds, T + 1, T], accuracy; row 0 before training
    base: np.ndarray  # [rates, seeds, T + 1], what was known before the sequence
    singular: np.ndarray  # [rates, seeds, T, matrices, rank], of the scaled update
    memory: np.ndarray  # [rates, seeds, T, matrices], columns in use
    opened: np.ndarray  # [rates, seeds, T, matrices], whether the gate was open
    cosine: np.ndarray  # [rates, seeds, T, matrices], new gradient to the old tasks'

    @property
    def chosen(self) -> int:
        """Index of the best rate on the tuning seeds; the only one without any."""
        if len(self.rates) == 1:
            return 0
        finals = metrics.average_accuracy(self.matrix)[:, : self.tuning].mean(1)
        return int(np.argmax(finals))

    @property
    def at_rate(self) -> "Measures":
        """All measures of the reporting seeds at the chosen rate."""
        return self.measures(self.chosen)

    def measures(self, rate: int) -> "Measures":
        """All measures of the reporting seeds at one rate."""
        own = slice(self.tuning, None)
        matrix, singular = self.matrix[rate, own], self.singular[rate, own]
        energy = singular**2
        total = np.maximum(energy.sum(-1), 1e-30)
        steps = matrix.shape[-1]
        return Measures(
            final=np.asarray(metrics.average_accuracy(matrix)),
            incremental=np.asarray(metrics.average_incremental_accuracy(matrix)),
            learning=np.asarray(metrics.learning_accuracy(matrix)),
            backward=np.asarray(metrics.backward_transfer(matrix)),
            forward=np.mean([matrix[:, i, i:].mean(-1) for i in range(1, steps)], 0),
            base=self.base[rate, own, -1],
            top_energy=(energy[..., 0] / total).mean((1, 2)),
            norm=np.sqrt(energy.sum(-1)).mean((1, 2)),
            largest=singular[..., 0].mean((1, 2)),
        )


class Measures(NamedTuple):
    """Each ``[reporting seeds]``."""

    final: np.ndarray  # MFN: mean accuracy over all tasks at the end
    incremental: np.ndarray  # MAA: the mean of that after each task
    learning: np.ndarray  # AP: accuracy right after learning a task, mean over tasks
    backward: np.ndarray  # BWT: final minus right after learning, without the last task
    forward: np.ndarray  # FWT: accuracy on tasks not yet trained, mean over boundaries
    base: np.ndarray  # what is left of what was known before the sequence
    top_energy: np.ndarray  # share of the largest singular value's square
    norm: np.ndarray  # Frobenius norm of an update
    largest: np.ndarray  # largest singular value of an update


def load(
    folder: Path,
    programs: dict[str, list[tuple[arms.Arm, str]]],
    config: Any,
    scales: Mapping[str, float] = MappingProxyType({}),
) -> dict[str, dict[str, ArmResults]]:
    """Reads a finished run.

    Args:
      folder: The run folder.
      programs: Name of each program to its (arm, stream) pairs, in the order of its
        lanes.
      config: Has ``rates`` and ``tuning``.
      scales: Family to what its learning rates were multiplied with, if they were.

    Returns:
      ``{stream: {arm: results}}``, arms in the order of their table.
    """
    found: dict[str, dict[str, ArmResults]] = {}
    for program, pairs in programs.items():
        arrays = run_folder.load_program(Path(folder), program)
        outer = len(pairs), len(config.rates), -1
        for index, (arm, stream) in enumerate(pairs):

            def own(name, arrays=arrays, outer=outer, index=index):
                array = arrays[name].astype(np.float64)
                return array.reshape(*outer, *array.shape[1:])[index]

            found.setdefault(stream, {})[arm.name] = ArmResults(
                arm,
                scales.get(arm.family, 1.0) * np.array(config.rates),
                config.tuning,
                own("evaluate/accuracy"),
                own("evaluate/base"),
                own("boundary/singular"),
                own("boundary/memory"),
                # The start of a task is recorded by its first step.
                own("step/open")[..., 0, :],
                own("step/cosine")[..., 0, :],
            )
    return {
        stream: {name: of[name] for name in arms.ARMS if name in of}
        for stream, of in found.items()
    }


def plasticity_matched(arm: ArmResults, control: ArmResults) -> np.ndarray:
    """Final accuracy minus the control's where it learns as well, ``[seeds]``.

    A learning rate trades learning a task well against keeping the old ones. For each
    seed the control's final accuracy is interpolated along its learning rates at the
    learning accuracy of the arm; beyond its ends the nearer end counts.
    """
    ours = arm.at_rate
    each = [control.measures(i) for i in range(len(control.rates))]
    learning = np.stack([m.learning for m in each])
    final = np.stack([m.final for m in each])
    matched = np.empty_like(ours.final)
    for seed, wanted in enumerate(ours.learning):
        order = np.argsort(learning[:, seed])
        matched[seed] = np.interp(wanted, learning[order, seed], final[order, seed])
    return ours.final - matched


def difference(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """Paired difference over seeds, with its standard error."""
    value, error = metrics.paired_difference(ours, theirs)
    return float(value), float(error)
