"""Metrics of evaluations made during training, not only at its task boundaries."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from optax_cl._core import checks
from optax_cl.metrics import _arrays, _boundaries
from optax_cl.metrics._arrays import Array


class StabilityGap(NamedTuple):
    """What each switch of task did to each old task.

    Entry ``[k, i]`` of every field is task ``i`` at the switch from task ``k`` to
    ``k + 1`` (from 0), followed until the end of task ``k + 1``. It means something for
    ``i <= k`` only, see :func:`old_task_pairs`; elsewhere it is 0.
    """

    depth: Array  # [..., T-1, T-1], how far the value falls below that at the switch.
    recovered: Array  # [..., T-1, T-1], how much of the depth the end has regained.
    recovery_steps: Array  # [..., T-1, T-1], evaluations after the switch, or inf.
    area: Array  # [..., T-1, T-1], sum over evaluations of the value missing.


def min_accuracy(
    curves: Array, boundaries: Sequence[int], *, higher_is_better: bool = True
) -> Array:
    r"""Mean over old tasks of the worst value since each was learned (min-ACC).

    .. math::
      \frac{1}{T-1} \sum_{i<T} \min_{s_i < n \le N} A_i(n)

    A level: it keeps the unit of the curves. What was measured before a task was
    learned is not read and may be NaN. For the value at an earlier time, pass the
    curves and boundaries up to it.

    Args:
      curves: ``[..., T, N]``: task ``i`` measured at evaluation ``n``.
      boundaries: ``T - 1`` strictly increasing indices :math:`s_i` on the evaluation
        axis: the last evaluation of every task but the last, made after its last
        update. The last task ends with the curves. Integers known at trace time.
      higher_is_better: False for losses, whose worst is the highest.

    Returns:
      ``[...]``.

    Raises:
      TypeError: If the boundaries are not integers known at trace time.
      ValueError: If a shape or boundary is wrong, there is one task only, or an
        evaluation read is not finite.

    Example:
      >>> from optax_cl import metrics
      >>> curves = [[0.0, 1.0, 0.25, 0.75], [0.0, 0.0, 0.5, 1.0]]
      >>> print(metrics.min_accuracy(curves, [1]))
      0.25

    References:
      De Lange et al., `Continual evaluation for lifelong learning: Identifying the
      stability gap <https://arxiv.org/abs/2205.13452>`_, 2023.
    """
    curves, ends = _boundaries.read_curves(curves, boundaries, "min_accuracy")
    sign = _arrays.sign(higher_is_better)
    worst = [
        (sign * curves[..., i, end + 1 :]).min(-1) for i, end in enumerate(ends[:-1])
    ]
    return sign * _arrays.namespace(curves).stack(worst, -1).mean(-1)


def worst_case_accuracy(
    curves: Array, boundaries: Sequence[int], *, higher_is_better: bool = True
) -> Array:
    r"""The final value of the last task, weighed with :func:`min_accuracy` (WC-ACC).

    .. math::
      \frac1T A_T(N) + \Bigl(1 - \frac1T\Bigr) \text{min-ACC}

    A lower bound of the average accuracy at the end (for losses, an upper one).

    Args:
      curves: ``[..., T, N]``, see :func:`min_accuracy`.
      boundaries: ``T - 1`` indices on the evaluation axis, see :func:`min_accuracy`.
      higher_is_better: False for losses.

    Returns:
      ``[...]``.

    Raises:
      TypeError: As :func:`min_accuracy`.
      ValueError: As :func:`min_accuracy`.

    Example:
      >>> from optax_cl import metrics
      >>> curves = [[0.0, 1.0, 0.25, 0.75], [0.0, 0.0, 0.5, 1.0]]
      >>> print(metrics.worst_case_accuracy(curves, [1]))
      0.625

    References:
      De Lange et al., `Continual evaluation for lifelong learning: Identifying the
      stability gap <https://arxiv.org/abs/2205.13452>`_, 2023.
    """
    worst = min_accuracy(curves, boundaries, higher_is_better=higher_is_better)
    curves, _ = _boundaries.read_curves(
        curves, boundaries, "worst_case_accuracy", last=True
    )
    tasks = curves.shape[-2]
    return curves[..., -1, -1] / tasks + (1 - 1 / tasks) * worst


def stability_gap(
    curves: Array,
    boundaries: Sequence[int],
    *,
    target: str = "switch",
    tolerance: float = 0.0,
    higher_is_better: bool = True,
) -> StabilityGap:
    r"""How far old tasks fall after each switch, and how they come back.

    For a switch at evaluation :math:`s`, followed until the end :math:`e` of the next
    task, and a task learned before it with curve :math:`A`:

    .. math::
      \text{depth} &= \max\bigl(0, A(s) - \min_{s < n \le e} A(n)\bigr) \\
      \text{recovered} &=
        \max\bigl(0, \min(A(s), A(e)) - \min_{s < n \le e} A(n)\bigr) \\
      \text{area} &= \sum_{s < n \le e} \max\bigl(0, A(s) - A(n)\bigr)

    So depth is what was recovered plus what the whole of the next task cost,
    :math:`\max(0, A(s) - A(e))`. Recovery steps are :math:`n - s` for the first
    :math:`n` after the (first) minimum with :math:`A(n)` back at the target, infinite
    if there is none, and 0 for a curve that is nowhere below the target. Steps and area
    count evaluations; multiply by the steps between two evaluations for training steps.

    Args:
      curves: ``[..., T, N]``, see :func:`min_accuracy`. What was measured on a task
        before its own boundary is not read and may be NaN.
      boundaries: ``T - 1`` indices on the evaluation axis, see :func:`min_accuracy`.
      target: What a task must come back to: ``"switch"``, its value :math:`A(s)` at the
        switch, or ``"end"``, the value :math:`A(e)` it settles on.
      tolerance: How far below the target counts as back, in the unit of the curves.
      higher_is_better: False for losses, whose gap is a rise.

    Returns:
      A :class:`StabilityGap`, each field ``[..., T - 1, T - 1]``.

    Raises:
      TypeError: If an argument is of the wrong kind.
      ValueError: If a shape, a boundary, the target or the tolerance is wrong, there is
        one task only, or an evaluation read is not finite.

    Example:
      >>> from optax_cl import metrics
      >>> curves = [[0.0, 1.0, 0.25, 0.5, 0.75], [0.0, 0.0, 0.5, 1.0, 1.0]]
      >>> gap = metrics.stability_gap(curves, [1], tolerance=0.25)
      >>> [float(x[0, 0]) for x in gap]
      [0.75, 0.5, 3.0, 1.5]

    References:
      De Lange et al., `Continual evaluation for lifelong learning: Identifying the
      stability gap <https://arxiv.org/abs/2205.13452>`_, 2023, shows the gap but does
      not give it as one number; these four are this library's.
    """
    checks.check_choice("target", target, ("switch", "end"))
    checks.check_number("tolerance", tolerance, low=0.0)
    curves, ends = _boundaries.read_curves(curves, boundaries, "stability_gap")
    xp = _arrays.namespace(curves, tolerance)
    score = xp.asarray(_arrays.sign(higher_is_better) * curves)
    switches = []
    for k, (start, end) in enumerate(itertools.pairwise(ends)):
        old = score[..., : k + 1, start : end + 1]
        fields = _one_switch(xp, old, target, tolerance)
        later = [(0, 0)] * (old.ndim - 2) + [(0, len(ends) - 2 - k)]
        switches.append([xp.pad(field, later) for field in fields])
    return StabilityGap(*(xp.stack(f, -2) for f in zip(*switches, strict=True)))


def _one_switch(xp, old, target, tolerance):
    """The four fields, ``[..., k]``, of scores ``[..., k, 1 + evaluations]``.

    Entry 0 of the last axis is the switch itself.
    """
    before, after = old[..., :1], old[..., 1:]
    lowest, end = after.min(-1, keepdims=True), after[..., -1:]
    goal = (before if target == "switch" else end) - tolerance
    missing = xp.maximum(before - after, 0.0)
    count = np.broadcast_to(np.arange(after.shape[-1]), after.shape)
    back = (count > after.argmin(-1, keepdims=True)) & (after >= goal)
    steps = xp.where(back.any(-1), back.argmax(-1) + 1.0, np.inf)
    steps = xp.where((lowest >= goal)[..., 0], 0.0, steps)
    # Under jit a NaN cannot raise, and fails both comparisons.
    steps = xp.where(xp.isnan(lowest - goal)[..., 0], np.nan, steps)
    return (
        xp.maximum(before - lowest, 0.0)[..., 0],
        xp.maximum(xp.minimum(before, end) - lowest, 0.0)[..., 0],
        steps.astype(old.dtype),
        missing.sum(-1),
    )
