"""Means, standard errors and paired differences over seeds."""

from typing import NamedTuple

import numpy as np

from optax_cl.metrics import _arrays
from optax_cl.metrics._arrays import Array


class MeanAndError(NamedTuple):
    """A mean and its standard error."""

    mean: Array
    se: Array  # Sample standard deviation / sqrt(number of seeds).


def mean_and_error(values: Array, axis: int = 0) -> MeanAndError:
    r"""Mean over seeds and its standard error.

    .. math::
      \mathrm{se} = \sqrt{\frac{1}{S (S - 1)} \sum_s (x_s - \bar x)^2}

    Args:
      values: At least two seeds along ``axis``.
      axis: The axis of the seeds.

    Returns:
      A :class:`MeanAndError`, each field of the shape of ``values`` without ``axis``.

    Raises:
      TypeError: If ``values`` does not hold real numbers.
      ValueError: If there is no such axis, it has fewer than two entries, or a value is
        not finite.

    Example:
      >>> from optax_cl import metrics
      >>> mean, se = metrics.mean_and_error([1.0, 2.0, 3.0, 4.0, 5.0])
      >>> round(float(mean), 4), round(float(se), 4)
      (3.0, 0.7071)
    """
    return _mean_and_error("values", "mean_and_error", values, axis)


def paired_difference(a: Array, b: Array, axis: int = 0) -> MeanAndError:
    """Mean over seeds of ``a - b`` and its standard error, seed by seed.

    What two methods share on one seed (initialisation, data, order of tasks) drops out
    of the difference, so its error is as a rule far below that of either mean. Entry
    ``s`` of both must be the same seed.

    Args:
      a: One method, at least two seeds along ``axis``.
      b: The other, of the same shape.
      axis: The axis of the seeds.

    Returns:
      A :class:`MeanAndError`; positive if ``a`` is larger.

    Raises:
      TypeError: If an argument does not hold real numbers.
      ValueError: If the shapes differ, there is no such axis, it has fewer than two
        entries, or a value is not finite.

    Example:
      >>> from optax_cl import metrics
      >>> mean, se = metrics.paired_difference([0.5, 0.7, 0.9], [0.4, 0.6, 0.8])
      >>> round(float(mean), 4), round(float(se), 4)
      (0.1, 0.0)
    """
    a, b = _arrays.as_float("a", a), _arrays.as_float("b", b)
    if a.shape != b.shape:
        raise ValueError(
            "`a` and `b` must have one shape, seed by seed; got "
            f"{a.shape} and {b.shape}."
        )
    _arrays.check_finite("a", a, "paired_difference")
    _arrays.check_finite("b", b, "paired_difference")
    return _mean_and_error("a", "paired_difference", a - b, axis)


def _mean_and_error(name, reader, values, axis):
    values = _arrays.as_float(name, values)
    if not -values.ndim <= axis < values.ndim or values.shape[axis] < 2:
        raise ValueError(
            f"`{name}` must have at least two seeds along axis {axis}; got shape "
            f"{values.shape}. One seed has no standard error."
        )
    _arrays.check_finite(name, values, reader)
    error = values.std(axis, ddof=1) / np.sqrt(values.shape[axis])
    return MeanAndError(values.mean(axis), error)
