"""Where tasks end on the evaluation axis, and which evaluations that lets count."""

import itertools
from collections.abc import Sequence

import jax
import numpy as np

from optax_cl._core import checks
from optax_cl.metrics import _arrays
from optax_cl.metrics._arrays import Array


def since_started(boundaries: Sequence[int], length: int) -> np.ndarray:
    """Marks the evaluations of each task from the beginning of its training on.

    The evaluation at the boundary itself, the last before the task's first update,
    belongs to it: plasticity is measured from there.

    Args:
      boundaries: ``T - 1`` indices on the evaluation axis, see :func:`min_accuracy`.
      length: Number of evaluations ``N``.

    Returns:
      Boolean NumPy array ``[T, N]``.

    Raises:
      TypeError: If the boundaries are not integers known at trace time.
      ValueError: If they do not increase strictly or leave a task without evaluation.

    Example:
      >>> from optax_cl import metrics
      >>> print(metrics.since_started([1], 4).astype(int))
      [[1 1 1 1]
       [0 1 1 1]]
    """
    checks.check_positive_int("length", length)
    ends = check_boundaries(boundaries, length)
    return np.arange(length) >= np.array([0, *ends[:-1]])[:, None]


def since_learned(boundaries: Sequence[int], length: int) -> np.ndarray:
    """Marks the evaluations of each task after the end of its training.

    Args:
      boundaries: ``T - 1`` indices on the evaluation axis, see :func:`min_accuracy`.
      length: Number of evaluations ``N``.

    Returns:
      Boolean NumPy array ``[T, N]``; the last task's row is False.

    Raises:
      TypeError: As :func:`since_started`.
      ValueError: As :func:`since_started`.

    Example:
      >>> from optax_cl import metrics
      >>> print(metrics.since_learned([1], 4).astype(int))
      [[0 0 1 1]
       [0 0 0 0]]
    """
    checks.check_positive_int("length", length)
    ends = check_boundaries(boundaries, length)
    return np.arange(length) > np.array(ends)[:, None]


def old_task_pairs(tasks: int) -> np.ndarray:
    """Marks the pairs of switch and old task for which a stability gap is defined.

    Args:
      tasks: Number of tasks ``T``.

    Returns:
      Boolean NumPy array ``[T - 1, T - 1]``: entry ``[k, i]`` is ``i <= k``.

    Raises:
      TypeError: If ``tasks`` is no integer.
      ValueError: If it is not positive.

    Example:
      >>> from optax_cl import metrics
      >>> print(metrics.old_task_pairs(3).astype(int))
      [[1 0]
       [1 1]]
    """
    checks.check_positive_int("tasks", tasks)
    return np.tri(tasks - 1, dtype=bool)


def curves_as_float(curves: Array) -> Array:
    """The curves as floats, their shape checked."""
    curves = _arrays.as_float("curves", curves)
    if curves.ndim < 2 or 0 in curves.shape[-2:]:
        raise ValueError(
            "`curves` must have shape [..., T, N]: one row per task, one column per "
            f"evaluation; got {curves.shape}."
        )
    return curves


def read_curves(
    curves: Array, boundaries: Sequence[int], reader: str, *, last: bool = False
) -> tuple[Array, tuple[int, ...]]:
    """Checked curves as floats, and every task's last evaluation.

    The evaluations read are those of old tasks from their own boundary on and, if
    ``last`` is true, the very last one of the last task.
    """
    curves = curves_as_float(curves)
    tasks, length = curves.shape[-2:]
    ends = check_boundaries(boundaries, length)
    if len(ends) != tasks:
        raise ValueError(
            f"`boundaries` must have one entry per task but the last, {tasks - 1} for "
            f"`curves` of shape {curves.shape}; got {len(ends) - 1}."
        )
    if tasks < 2:
        raise ValueError(
            f"`{reader}` needs `curves` of at least 2 tasks; got shape {curves.shape}."
        )
    read = np.arange(length) >= np.array(ends)[:, None]
    read[-1] &= last
    _arrays.check_finite("curves", curves, reader, read)
    return curves, ends


def check_boundaries(boundaries: Sequence[int], length: int) -> tuple[int, ...]:
    """Every task's last evaluation, that of the last task included."""
    if isinstance(boundaries, jax.core.Tracer):
        raise TypeError(
            "`boundaries` must be known at trace time, since they fix slices; got a "
            "tracer. Close over them, or make the argument static."
        )
    ends = np.asarray(boundaries)
    if ends.ndim != 1 or (ends.size and ends.dtype.kind not in "iu"):
        raise TypeError(
            "`boundaries` must be a sequence of integers, the index of the last "
            f"evaluation of each task but the last; got {boundaries!r}."
        )
    ends = (*(int(e) for e in ends), length - 1)
    if ends[0] < 0 or any(a >= b for a, b in itertools.pairwise(ends)):
        raise ValueError(
            "`boundaries` must increase strictly from at least 0 to below the last "
            f"evaluation, {length - 1}; got {list(ends[:-1])}."
        )
    return ends
