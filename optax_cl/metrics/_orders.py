"""How much results depend on the order of the tasks."""

from typing import NamedTuple

import jax
import numpy as np

from optax_cl.metrics import _arrays
from optax_cl.metrics._arrays import Array


class OrderSensitivity(NamedTuple):
    """Spread over orders of the average, and of each task."""

    mean: Array  # [...], of the average over tasks.
    sd: Array  # [...], its sample standard deviation over orders.
    range: Array  # [...], its largest value minus its smallest.
    opd: Array  # [..., T], order-normalised performance disparity of each task.
    aopd: Array  # [...], mean of opd.
    mopd: Array  # [...], maximum of opd.


def by_task(values: Array, orders: Array) -> Array:
    """Sorts values that stand in the order of learning into a fixed order of tasks.

    Args:
      values: ``[..., T]``, the entry of the task learned first comes first, as in the
        rows of an accuracy matrix.
      orders: Integers, ``[T]`` or ``[..., T]``: which task (from 0) was learned first,
        second, and so on. Known at trace time.

    Returns:
      ``[..., T]``: entry ``j`` is that of task ``j``.

    Raises:
      TypeError: If ``orders`` are not integers known at trace time.
      ValueError: If they are not permutations, or do not fit the values.

    Example:
      >>> from optax_cl import metrics
      >>> print(metrics.by_task([[0.1, 0.2, 0.3]], [[2, 0, 1]]))
      [[0.2 0.3 0.1]]
    """
    values = _arrays.as_float("values", values)
    if isinstance(orders, jax.core.Tracer):
        raise TypeError(
            "`orders` must be known at trace time; got a tracer. Close over them."
        )
    orders = np.asarray(orders)
    if orders.dtype.kind not in "iu":
        raise TypeError(f"`orders` must hold integers; got {orders.dtype}.")
    if values.ndim < 1 or orders.shape not in (values.shape[-1:], values.shape):
        raise ValueError(
            "`orders` must have one entry per value, or one order for all: shape "
            f"{values.shape} or {values.shape[-1:]}; got {orders.shape}."
        )
    position = np.argsort(orders, -1)  # The inverse, of a permutation.
    tasks = np.broadcast_to(np.arange(values.shape[-1]), orders.shape)
    if not np.array_equal(np.sort(orders, -1), tasks):
        raise ValueError(
            f"`orders` must be permutations of 0, ..., {values.shape[-1] - 1}; got "
            f"{orders.tolist()}."
        )
    position = np.broadcast_to(position, values.shape)
    return _arrays.namespace(values).take_along_axis(values, position, -1)


def order_sensitivity(final: Array) -> OrderSensitivity:
    r"""Spread of final results over orders of the same tasks.

    .. math::
      \mathrm{OPD}_j = \max_\pi a^\pi_j - \min_\pi a^\pi_j, \qquad
      \mathrm{AOPD} = \frac1T \sum_j \mathrm{OPD}_j, \qquad
      \mathrm{MOPD} = \max_j \mathrm{OPD}_j

    Runs that differ in their seed as well show the seeds' spread as if it were the
    orders'. Use one seed for all orders, seeds as leading dimensions, and report the
    spread over seeds beside it. Spreads are the same for accuracies and losses.

    Args:
      final: ``[..., P, T]``: final value of task ``j`` under order ``p``, at least two
        orders. Column ``j`` is the same task in every row, whenever it was learned:
        see :func:`by_task`.

    Returns:
      An :class:`OrderSensitivity`.

    Raises:
      TypeError: If ``final`` does not hold real numbers.
      ValueError: If it has fewer than two dimensions or orders, or is not finite.

    Example:
      >>> from optax_cl import metrics
      >>> spread = metrics.order_sensitivity([[0.5, 1.0], [0.75, 0.5]])
      >>> print(spread.opd, spread.aopd, spread.mopd, spread.range)
      [0.25 0.5 ] 0.375 0.5 0.125

    References:
      Yoon et al., `Scalable and Order-robust Continual Learning with Additive Parameter
      Decomposition <https://arxiv.org/abs/1902.09432>`_, 2020.
    """
    final = _arrays.as_float("final", final)
    if final.ndim < 2 or final.shape[-2] < 2 or final.shape[-1] < 1:
        raise ValueError(
            "`final` must have shape [..., P, T] with at least two orders P; got "
            f"{final.shape}."
        )
    _arrays.check_finite("final", final, "order_sensitivity")
    average = final.mean(-1)
    opd = final.max(-2) - final.min(-2)
    return OrderSensitivity(
        mean=average.mean(-1),
        sd=average.std(-1, ddof=1),
        range=average.max(-1) - average.min(-1),
        opd=opd,
        aopd=opd.mean(-1),
        mopd=opd.max(-1),
    )
