"""What a run of the adapter study measured, arm by arm and seed by seed."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import run_folder
from experiments.studies import _lora_arms as arms
from experiments.studies import _lora_data as data
from optax_cl import metrics


class ArmResults(NamedTuple):
    """One arm on one stream; arrays are ``[rates, seeds, ...]``, tuning seeds first."""

    arm: arms.Arm
    rates: np.ndarray  # [rates]
    tuning: int  # how many seeds choose the rate
    matrix: np.ndarray  # [rates, seeds, T + 1, T], accuracy; row 0 before training
    base: np.ndarray  # [rates, seeds, T + 1], accuracy on the base task
    singular: np.ndarray  # [rates, seeds, T, layers, rank], of the scaled update
    memory: np.ndarray  # [rates, seeds, T, layers], columns in use
    opened: np.ndarray  # [rates, seeds, T, layers], whether the gate was open
    cosine: np.ndarray  # [rates, seeds, T, layers], new gradient to the old tasks'

    @property
    def chosen(self) -> int:
        """Index of the best rate on the tuning seeds."""
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
            final=metrics.average_accuracy(matrix),
            incremental=metrics.average_incremental_accuracy(matrix),
            learning=metrics.learning_accuracy(matrix),
            backward=metrics.backward_transfer(matrix),
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
    base: np.ndarray  # accuracy on the base task at the end
    top_energy: np.ndarray  # share of the largest singular value's square
    norm: np.ndarray  # Frobenius norm of an update
    largest: np.ndarray  # largest singular value of an update


def members(config: Any, family: str) -> list[tuple[arms.Arm, str]]:
    """The (arm, stream) pairs of a family, in the order of its lanes."""
    return [
        (arm, stream)
        for name in config.arms or arms.ARMS
        for arm in [arms.ARMS[name]]
        if arm.family == family
        for stream in arm.streams
        if stream in config.streams
    ]


def seeds(config: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tuning and the reporting seeds."""
    tuning = range(config.first_tuning_seed, config.first_tuning_seed + config.tuning)
    reported = range(config.first_seed, config.first_seed + config.seeds)
    return tuple(tuning), tuple(reported)


def load(folder: Path, config: Any) -> dict[str, dict[str, ArmResults]]:
    """Reads a finished run: ``{stream: {arm: results}}``."""
    found: dict[str, dict[str, ArmResults]] = {s: {} for s in config.streams}
    rates = np.array(config.rates)
    for family in arms.FAMILIES:
        pairs = members(config, family)
        if not pairs:
            continue
        arrays = run_folder.load_program(Path(folder), family)
        shape = len(pairs), len(rates), -1

        def own(name, arrays=arrays, shape=shape):
            array = arrays[name]
            return array.reshape(*shape, *array.shape[1:]).astype(np.float64)

        for index, (arm, stream) in enumerate(pairs):
            found[stream][arm.name] = ArmResults(
                arm,
                rates,
                config.tuning,
                own("evaluate/accuracy")[index],
                own("evaluate/base")[index],
                own("boundary/singular")[index],
                own("boundary/memory")[index],
                # The start of a task is recorded by its first step.
                own("step/open")[index][..., 0, :],
                own("step/cosine")[index][..., 0, :],
            )
    order = list(config.arms or arms.ARMS)
    return {
        stream: {name: of[name] for name in order if name in of}
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


def layers() -> tuple[str, ...]:
    """The adapted layers, in the order of the arrays."""
    return tuple(f"layer{i}" for i in range(len(data.SIZES) - 1))
