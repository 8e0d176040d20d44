"""Array backend and input checks that the metrics share."""

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = np.ndarray | jax.Array


def namespace(*arrays: Any) -> ModuleType:
    """``jax.numpy`` if any of the arrays is a JAX array or a tracer, else NumPy."""
    return jnp if any(isinstance(a, jax.Array) for a in arrays) else np


def as_float(name: str, value: Any) -> Array:
    """The array in floating point: float64 in NumPy, at least float32 in JAX."""
    if isinstance(value, jax.Array):
        if jnp.iscomplexobj(value) or jax.dtypes.issubdtype(
            value.dtype, jax.dtypes.extended
        ):
            raise TypeError(f"`{name}` must hold real numbers; got {value.dtype}.")
        return value.astype(jnp.promote_types(value.dtype, jnp.float32))
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(
            f"`{name}` must be an array; got nested lists of unequal lengths. Fill in "
            "NaN for what was not measured."
        ) from error
    # Extension dtypes (bfloat16) are of kind "V" and do convert.
    if array.dtype.kind in "cOSUMm":
        raise TypeError(f"`{name}` must hold real numbers; got {array.dtype}.")
    return array.astype(np.float64)


def check_finite(
    name: str, array: Array, reader: str, read: np.ndarray | None = None
) -> None:
    """Raises if an entry that ``reader`` reads is NaN or infinite.

    Args:
      name: The argument's name.
      array: Its value. The values of a tracer are not known, so it passes.
      reader: The function that reads the array.
      read: Boolean mask of the entries read; broadcasts against ``array``. By default
        all of them.
    """
    if isinstance(array, jax.core.Tracer):
        return
    values = np.asarray(array)
    bad = ~np.isfinite(values)
    if read is not None:
        bad &= read
    if bad.any():
        index = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"`{name}` must be finite wherever `{reader}` reads it; got "
            f"{values[index]} at {name}[{', '.join(map(str, index))}] "
            f"({int(bad.sum())} such entries). Measure these entries: NaN may only "
            "stand where a metric does not look."
        )


def like_last_axis(
    name: str, value: Any, reference: Array, reader: str, per: str = "task"
) -> Array:
    """An array ``[T]`` or ``[..., T]``, broadcast to ``reference``'s shape."""
    array = as_float(name, value)
    try:
        fits = np.broadcast_shapes(array.shape, reference.shape) == reference.shape
    except ValueError:
        fits = False
    if not fits or array.shape[-1:] != reference.shape[-1:]:
        raise ValueError(
            f"`{name}` must have one entry per {per}, so shape "
            f"{reference.shape[-1:]} or {reference.shape}; got {array.shape}."
        )
    check_finite(name, array, reader)
    return namespace(array, reference).broadcast_to(array, reference.shape)


def sign(higher_is_better: bool) -> float:
    """What turns values into scores, of which more is better."""
    if not isinstance(higher_is_better, bool | np.bool_):
        raise TypeError(
            "`higher_is_better` must be True (accuracies) or False (losses); got "
            f"{higher_is_better!r}."
        )
    return 1.0 if higher_is_better else -1.0
