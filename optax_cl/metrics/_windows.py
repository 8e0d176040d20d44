"""The largest drop and rise of a curve within a window of evaluations."""

import jax
import numpy as np

from optax_cl._core import checks
from optax_cl.metrics import _arrays, _boundaries
from optax_cl.metrics._arrays import Array


def windowed_forgetting(
    curves: Array,
    window: int,
    *,
    mask: np.ndarray | None = None,
    higher_is_better: bool = True,
) -> Array:
    r"""Mean over tasks of the largest drop within ``window`` evaluations (WF).

    .. math::
      \mathrm{WF}^w = \frac1T \sum_i \max\Bigl(0,
        \max_{0 < n - m < w} \bigl(A_i(m) - A_i(n)\bigr)\Bigr)

    Args:
      curves: ``[..., T, N]``: task ``i`` measured at evaluation ``n``.
      window: Number of evaluations, at least 2. With evaluations every ``r`` steps, a
        window spans ``(window - 1) * r`` steps. One longer than the curve is the
        whole curve.
      mask: Boolean, broadcasts to ``curves``; True where an evaluation counts, by
        default everywhere. :func:`since_started` leaves out what was measured before a
        task's training began. Must be known at trace time.
      higher_is_better: False for losses, where a drop is a rise of the loss.

    Returns:
      ``[...]``.

    Raises:
      TypeError: If an argument is of the wrong kind.
      ValueError: If a shape or the window is wrong, the mask leaves a task without
        any evaluation, or an evaluation that counts is not finite.

    Example:
      >>> from optax_cl import metrics
      >>> curve = [[1.0, 0.75, 0.5, 0.75]]
      >>> print(metrics.windowed_forgetting(curve, 2))
      0.25
      >>> print(metrics.windowed_forgetting(curve, 3))
      0.5

    References:
      De Lange et al., `Continual evaluation for lifelong learning: Identifying the
      stability gap <https://arxiv.org/abs/2205.13452>`_, 2023.
    """
    return _largest_drop(
        "windowed_forgetting", curves, window, mask, _arrays.sign(higher_is_better)
    )


def windowed_plasticity(
    curves: Array,
    window: int,
    *,
    mask: np.ndarray | None = None,
    higher_is_better: bool = True,
) -> Array:
    r"""Mean over tasks of the largest rise within ``window`` evaluations (WP).

    .. math::
      \mathrm{WP}^w = \frac1T \sum_i \max\Bigl(0,
        \max_{0 < n - m < w} \bigl(A_i(n) - A_i(m)\bigr)\Bigr)

    Args:
      curves: ``[..., T, N]``, see :func:`windowed_forgetting`.
      window: Number of evaluations, at least 2.
      mask: Boolean, broadcasts to ``curves``; True where an evaluation counts.
      higher_is_better: False for losses, where a rise is a fall of the loss.

    Returns:
      ``[...]``.

    Raises:
      TypeError: As :func:`windowed_forgetting`.
      ValueError: As :func:`windowed_forgetting`.

    Example:
      >>> from optax_cl import metrics
      >>> print(metrics.windowed_plasticity([[0.5, 0.25, 0.875]], 3))
      0.625

    References:
      De Lange et al., `Continual evaluation for lifelong learning: Identifying the
      stability gap <https://arxiv.org/abs/2205.13452>`_, 2023.

    Differs from the code published with the paper:
      1. That code skips evaluations below the running maximum, which is right for drops
         and misses rises: it gives 0.4 for the window (0.5, 0.2, 0.9). Here it is 0.7.
    """
    # A rise of the curve is a drop of its mirror image.
    return _largest_drop(
        "windowed_plasticity", curves, window, mask, -_arrays.sign(higher_is_better)
    )


def _largest_drop(reader, curves, window, mask, sign):
    checks.check_positive_int("window", window)
    if window < 2:
        raise ValueError(
            f"`window` must hold at least 2 evaluations to compare; got {window}."
        )
    curves = _boundaries.curves_as_float(curves)
    counts = _check_mask(mask, curves.shape)
    _arrays.check_finite("curves", curves, reader, counts)
    xp = _arrays.namespace(curves)
    # Below, -inf marks what does not count as a start of a drop: before the curve's
    # beginning, or masked out. No sum or difference ever sees it.
    score = xp.where(counts, sign * curves, -np.inf)
    highest = _sliding_max(xp, _shift(xp, score, 1), window - 1)
    pair = counts & (highest > -np.inf)
    drop = xp.where(pair, highest, 0.0) - xp.where(pair, score, 0.0)
    # Under jit such an entry cannot raise, and NaN fails every comparison above.
    drop = xp.where(counts & ~xp.isfinite(curves), np.nan, drop)
    return xp.maximum(drop.max(-1), 0.0).mean(-1)


def _shift(xp, x, by):
    """The last axis moved ``by`` places later, -inf where nothing moves in."""
    by = min(by, x.shape[-1])
    pad = xp.full((*x.shape[:-1], by), -np.inf, x.dtype)
    return xp.concatenate([pad, x[..., : x.shape[-1] - by]], -1)


def _sliding_max(xp, x, length):
    """The maximum of the last ``length`` entries up to each one.

    Windows are doubled, and the last step joins two that overlap: O(N log length).
    """
    length = min(length, x.shape[-1])
    size = 1
    while 2 * size <= length:
        x = xp.maximum(x, _shift(xp, x, size))
        size *= 2
    return xp.maximum(x, _shift(xp, x, length - size))


def _check_mask(mask, shape):
    if mask is None:
        return np.ones(shape, bool)
    if isinstance(mask, jax.core.Tracer):
        raise TypeError(
            "`mask` must be known at trace time; got a tracer. Close over it instead "
            "of passing it through `jit` or `vmap`."
        )
    mask = np.asarray(mask)
    if mask.dtype != bool:
        raise TypeError(f"`mask` must be boolean; got {mask.dtype}.")
    try:
        counts = np.broadcast_to(mask, shape)
    except ValueError as error:
        raise ValueError(
            f"`mask` must broadcast to the shape of `curves`, {shape}; got "
            f"{mask.shape}."
        ) from error
    if not counts.any(-1).all():
        task = tuple(int(i) for i in np.argwhere(~counts.any(-1))[0])
        raise ValueError(
            f"`mask` must keep at least one evaluation of every task; task {task[-1]} "
            f"(counted from 0) of {shape[-2]} has none."
        )
    return counts
