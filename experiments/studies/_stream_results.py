"""What a run of the domain stream measured, arm by arm and seed by seed."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments import run_folder
from experiments.studies._stream_arms import Arm
from optax_cl import metrics


class ArmResults(NamedTuple):
    """Measurements of one arm; the leading axis of each array are the seeds."""

    arm: Arm
    matrix: np.ndarray  # [S, T + 1, T], nats per byte; row 0 before training
    curves: dict[str, np.ndarray]  # per-step curves, each [S, T * steps]

    @property
    def diverged(self) -> int:
        """Seeds on which some loss is not finite."""
        return int((~np.isfinite(self.matrix)).any((1, 2)).sum())

    @property
    def final(self) -> np.ndarray:
        """Mean loss over all domains at the end, ``[S]``."""
        return metrics.average_accuracy(self.matrix)

    @property
    def forgetting(self) -> np.ndarray:
        """Final minus best loss before the last domain, ``[S]``."""
        return metrics.chaudhry_forgetting(self.matrix, higher_is_better=False)

    @property
    def learning(self) -> np.ndarray:
        """Loss on each domain right after learning it, mean over domains, ``[S]``."""
        return metrics.learning_accuracy(self.matrix)

    @property
    def perplexity(self) -> "ArmResults":
        """The same with perplexities per byte in the matrix."""
        return self._replace(matrix=np.exp(self.matrix))

    @property
    def stability_gap(self) -> np.ndarray:
        """Loss on the first domain that each switch costs and gives back, ``[S]``.

        Its highest value while the next domain is learned, above both its value at the
        switch and its value at the end; mean over switches.
        """
        tasks = self.matrix.shape[-1]
        curve = self.curves["first_domain"]
        curve = curve.reshape(len(curve), tasks, -1)
        before, end = curve[:, :-1, -1], curve[:, 1:, -1]
        peak = curve[:, 1:].max(-1)
        return np.maximum(0.0, peak - np.maximum(before, end)).mean(-1)

    def meter(self, name: str) -> np.ndarray | None:
        """Mean of a meter over all steps after the first domain, ``[S]``, if read."""
        if name not in self.curves:
            return None
        curve = self.curves[name]
        return curve[:, curve.shape[1] // self.matrix.shape[-1] :].mean(-1)

    def settled(self, name: str) -> np.ndarray:
        """Mean of a meter over the steps of the last domain, ``[S]``.

        Adam's state is carried, so what a routing does to the second moment takes
        several times ``1 / (1 - b2)`` steps to show in full.
        """
        curve = self.curves[name]
        return curve[:, -(curve.shape[1] // self.matrix.shape[-1]) :].mean(-1)


def load(folder: Path, arms: Sequence[Arm]) -> dict[str, ArmResults]:
    """Reads the raw arrays of a run folder.

    Args:
      folder: The run folder.
      arms: The arms that were run, in the order of the run.

    Returns:
      The measurements by the arm's name, in the same order.
    """
    found = {}
    for family in dict.fromkeys(arm.family for arm in arms):
        arrays = run_folder.load_program(folder, family)
        members = [arm for arm in arms if arm.family == family]
        for index, arm in enumerate(members):
            found[arm.name] = _one(arrays, arm, index, len(members))
    return {arm.name: found[arm.name] for arm in arms}


def _one(arrays, arm, index, count):
    def own(array):
        """The seeds of this arm; arms are the outer part of the lane axis."""
        return array.reshape(count, -1, *array.shape[1:])[index]

    curves = {
        name.removeprefix("step/"): own(array).reshape(len(own(array)), -1)
        for name, array in arrays.items()
        if name.startswith("step/")
    }
    matrix = own(arrays["evaluate/loss"]).astype(np.float64)
    return ArmResults(arm, matrix, curves)


def split_diverged(
    results: dict[str, ArmResults],
) -> tuple[dict[str, ArmResults], dict[str, ArmResults]]:
    """Arms that are finite on all seeds, and those that are not.

    Raises:
      RunError: If vanilla is not, since everything is measured against it.
    """
    if "vanilla" in results and results["vanilla"].diverged:
        raise run_folder.RunError(
            "plain Adam diverged, so there is nothing to compare with; run again with "
            "a lower --learning-rate in a new folder."
        )
    sound = {name: r for name, r in results.items() if not r.diverged}
    return sound, {name: r for name, r in results.items() if r.diverged}


def learning_rate_matched(results: dict[str, ArmResults], name: str) -> np.ndarray:
    """Final loss minus that of vanilla slowed down to the same learning loss.

    Lowering the learning rate of plain Adam trades loss right after learning for less
    forgetting, without any method. For each seed the final loss of vanilla is
    interpolated along that trade at the learning loss of the arm; an arm that learns
    better than vanilla at its full rate, or worse than at its lowest, is compared with
    the nearer end.

    Args:
      results: All arms, among them vanilla at full and lowered rates.
      name: The arm.

    Returns:
      Differences ``[S]``; negative where the arm is better than learning less.
    """
    trade = [
        r
        for r in results.values()
        if r.arm.family == "plain" and not r.arm.joint and r.arm.learning_rate <= 1
    ]
    learning = np.stack([r.learning for r in trade])
    final = np.stack([r.final for r in trade])
    arm = results[name]
    matched = np.empty_like(arm.final)
    for seed, wanted in enumerate(arm.learning):
        order = np.argsort(learning[:, seed])
        matched[seed] = np.interp(wanted, learning[order, seed], final[order, seed])
    return arm.final - matched


def has_learning_rates(results: dict[str, ArmResults]) -> bool:
    """Whether vanilla ran at a lowered learning rate too."""
    rates = [r.arm.learning_rate for r in results.values() if r.arm.family == "plain"]
    return min(rates) < 1
