"""All numbers of a matrix, or of a set of curves, in one call."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from optax_cl.metrics import (
    _accuracy_matrix,
    _arrays,
    _boundaries,
    _learning_curves,
    _stability_gap,
    _windows,
)
from optax_cl.metrics._arrays import Array


class Summary(NamedTuple):
    """All numbers of one accuracy (or loss) matrix, each of the batch shape."""

    average: Array  # of the final row, in the matrix's own unit.
    average_incremental: Array  # mean over stages of the mean over tasks seen so far.
    learning: Array  # right after each task was learned.
    backward_transfer: Array  # positive: old tasks got better.
    negated_backward_transfer: Array  # positive: old tasks got worse.
    chaudhry_forgetting: Array  # against the best value seen before the last task.
    forward_transfer: Array  # before a task is learned, against random init.
    gain_over_independent: Array | None  # None without `independent`.
    intransigence: Array | None  # mean over tasks; None without `joint`.
    learning_curve_area: Array | None  # None without `learning_curves`.


class CurveSummary(NamedTuple):
    """All numbers of one set of curves, each of the batch shape."""

    min_accuracy: Array
    worst_case_accuracy: Array
    windowed_forgetting: Array  # [..., W], one per window.
    windowed_plasticity: Array  # [..., W], one per window.
    gap_depth: Array  # mean over pairs of switch and old task, as the next two.
    gap_recovered: Array
    gap_area: Array
    gap_recovery_rate: Array  # share of the pairs that recover before the next switch.
    gap_recovery_steps: (
        Array  # mean; a pair that doesn't recover counts its whole time.
    )


def summary(
    matrix: Array,
    *,
    independent: Array | None = None,
    joint: Array | None = None,
    learning_curves: Array | None = None,
    beta: int = 10,
    higher_is_better: bool = True,
) -> Summary:
    """All numbers of one matrix.

    NumPy in, NumPy (float64) out; JAX in, JAX out, also under ``jit`` and ``vmap``.

    Args:
      matrix: ``[..., T + 1, T]`` with at least two tasks, see
        :func:`average_accuracy`; every row also measures the tasks still to come.
      independent: ``[T]`` or ``[..., T]``, see :func:`gain_over_independent`.
      joint: ``[T]`` or ``[..., T]``, see :func:`intransigence`.
      learning_curves: ``[..., T, B]``, see :func:`learning_curve_area`.
      beta: Number of batches of the learning curves that count.
      higher_is_better: False for losses. Levels (the two averages, learning, the area)
        keep their unit; transfer stays positive where old or new tasks gained, and
        forgetting and intransigence where they lost.

    Returns:
      A :class:`Summary`, each field of shape ``[...]``, or None where its reference was
      not given.

    Raises:
      TypeError: If an argument does not hold real numbers.
      ValueError: If a shape is wrong, there is one task only, or an entry is not
        finite.

    Example:
      >>> from optax_cl import metrics
      >>> matrix = [[0.5, 0.25], [0.9, 0.4], [0.7, 0.8]]
      >>> numbers = metrics.summary(matrix)
      >>> round(float(numbers.average), 6), round(float(numbers.forward_transfer), 6)
      (0.75, 0.15)
    """
    kwargs = {"higher_is_better": higher_is_better}
    return Summary(
        average=_accuracy_matrix.average_accuracy(matrix),
        average_incremental=_accuracy_matrix.average_incremental_accuracy(matrix),
        learning=_accuracy_matrix.learning_accuracy(matrix),
        backward_transfer=_accuracy_matrix.backward_transfer(matrix, **kwargs),
        negated_backward_transfer=_accuracy_matrix.negated_backward_transfer(
            matrix, **kwargs
        ),
        chaudhry_forgetting=_accuracy_matrix.chaudhry_forgetting(matrix, **kwargs),
        forward_transfer=_accuracy_matrix.forward_transfer(matrix, **kwargs),
        gain_over_independent=(
            None
            if independent is None
            else _accuracy_matrix.gain_over_independent(matrix, independent, **kwargs)
        ),
        intransigence=(
            None
            if joint is None
            else _accuracy_matrix.intransigence(matrix, joint, **kwargs).mean(-1)
        ),
        learning_curve_area=(
            None
            if learning_curves is None
            else _learning_curves.learning_curve_area(learning_curves, beta=beta)
        ),
    )


def curve_summary(
    curves: Array,
    boundaries: Sequence[int],
    *,
    windows: Sequence[int] = (10, 100),
    target: str = "switch",
    tolerance: float = 0.0,
    higher_is_better: bool = True,
) -> CurveSummary:
    """All numbers of one set of per-evaluation curves.

    NumPy in, NumPy (float64) out; JAX in, JAX out, also under ``jit`` and ``vmap``.

    Args:
      curves: ``[..., T, N]``, see :func:`min_accuracy`. What was measured before the
        beginning of a task's training is not read and may be NaN.
      boundaries: ``T - 1`` indices on the evaluation axis, see :func:`min_accuracy`.
      windows: Lengths for :func:`windowed_forgetting` and :func:`windowed_plasticity`,
        which count the evaluations of a task :func:`since_started`.
      target: See :func:`stability_gap`.
      tolerance: See :func:`stability_gap`.
      higher_is_better: False for losses.

    Returns:
      A :class:`CurveSummary`. All fields are finite, so that they can be averaged over
      seeds: a pair of switch and old task that does not recover enters
      ``gap_recovery_steps`` with the whole length of the next task, which makes the
      mean a lower bound, to be read with ``gap_recovery_rate``.

    Raises:
      TypeError: If an argument is of the wrong kind.
      ValueError: If a shape, boundary, window, the target or the tolerance is wrong,
        there is one task only, or an evaluation read is not finite.

    Example:
      >>> from optax_cl import metrics
      >>> curves = [[0.0, 1.0, 0.25, 1.0, 1.0], [0.0, 0.0, 0.5, 1.0, 1.0]]
      >>> numbers = metrics.curve_summary(curves, [1], windows=(2,))
      >>> print(numbers.min_accuracy, numbers.gap_depth, numbers.gap_recovery_steps)
      0.25 0.75 2.0
    """
    if not len(windows):
        raise ValueError("`windows` must name at least one window length; got none.")
    kwargs = {"higher_is_better": higher_is_better}
    gap = _stability_gap.stability_gap(
        curves, boundaries, target=target, tolerance=tolerance, **kwargs
    )
    curves, ends = _boundaries.read_curves(curves, boundaries, "curve_summary")
    xp = _arrays.namespace(*gap)
    mask = _boundaries.since_started(ends[:-1], curves.shape[-1])

    def per_window(metric):
        return xp.stack([metric(curves, w, mask=mask, **kwargs) for w in windows], -1)

    pairs = np.nonzero(_boundaries.old_task_pairs(len(ends)))

    def mean(field):
        return field[(..., *pairs)].mean(-1)

    never = xp.isinf(gap.recovery_steps)
    longest = np.broadcast_to(np.diff(ends)[:, None], gap.depth.shape)
    return CurveSummary(
        min_accuracy=_stability_gap.min_accuracy(curves, ends[:-1], **kwargs),
        worst_case_accuracy=_stability_gap.worst_case_accuracy(
            curves, ends[:-1], **kwargs
        ),
        windowed_forgetting=per_window(_windows.windowed_forgetting),
        windowed_plasticity=per_window(_windows.windowed_plasticity),
        gap_depth=mean(gap.depth),
        gap_recovered=mean(gap.recovered),
        gap_area=mean(gap.area),
        gap_recovery_rate=1 - mean(never.astype(gap.depth.dtype)),
        gap_recovery_steps=mean(xp.where(never, longest, gap.recovery_steps)),
    )
