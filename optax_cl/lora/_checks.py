"""Judging arrays whose values are known, at the start of a task."""

from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from optax_cl._core import trees


def known(x: Any) -> bool:
    """Whether the values of an array can be judged here and now."""
    if isinstance(x, jax.core.Tracer):
        return False
    return isinstance(x, np.ndarray) or (
        isinstance(x, jax.Array) and x.is_fully_addressable
    )


def wide(x: Any) -> np.ndarray:
    """A known array in NumPy, at least in float32."""
    return np.asarray(x).astype(np.promote_types(x.dtype, np.float32))


def tolerance(x: Any) -> float:
    """How far from orthonormal rounding may leave an array of this dtype."""
    return 1e-3 if x.dtype.itemsize >= 4 else 1e-2


def check_shape(
    name: str, x: Any, *shapes: tuple[int, ...], seeds: bool = True
) -> None:
    """Raises unless an array has one of these shapes, behind axes of seeds if any."""
    got = jnp.shape(x)
    # Seeds side by side stand in axes before those that `init` saw.
    ends = [got[len(got) - len(shape) :] if seeds else got for shape in shapes]
    if not any(end == shape for end, shape in zip(ends, shapes, strict=True)):
        raise ValueError(
            f"`{name}` must have shape {' or '.join(map(str, shapes))} for its target; "
            f"got {got}."
        )


def check_orthonormal(name: str, x: Any) -> None:
    """Raises if a factor whose values are known is off the manifold."""
    if trees.is_hole(x) or not known(x):
        return
    y = wide(x)
    gram = np.swapaxes(y, -1, -2) @ y
    error = np.abs(gram - np.eye(y.shape[-1])).max(initial=0.0)
    if not error < tolerance(x):
        raise ValueError(
            f"`{name}` must have orthonormal columns; the largest entry of |X^T X - I| "
            f"is {error:.2g}. Start from `lora.eblora_init`, or apply "
            "`lora.stiefel.polar`."
        )


def check_off(name: str, x: Any, basis: Any, what: str, fix: str) -> None:
    """Raises if a factor ``[*batch, in, r]`` is not orthogonal to what it must be off.

    Judged in units of its longest column, where both are known.
    """
    if any(trees.is_hole(a) or not known(a) for a in (x, basis)):
        return
    y = wide(x)
    length = np.linalg.norm(y, axis=-2).max(axis=-1, initial=0.0)
    coeffs = np.abs(np.swapaxes(wide(basis), -1, -2) @ y).max((-2, -1), initial=0.0)
    overlap = (coeffs / np.where(length > 0, length, 1.0)).max(initial=0.0)
    if not overlap < tolerance(x):
        raise ValueError(
            f"`{name}` must be orthogonal to {what}; the largest cosine with one of "
            f"its directions is {overlap:.2g}. {fix}"
        )


def check_not_start(params: Any) -> None:
    """Raises for the whole ``Start`` of adapters where the adapters belong."""
    if hasattr(params, "adapters") and hasattr(params, "params"):
        raise ValueError(
            f"`params` must be the adapters, but this is the {type(params).__name__} "
            "that holds them beside the weights. Pass its field: "
            "`tx.init(start.adapters)`."
        )


def check_each(matrices: Mapping[str, chex.Array], holds: Any, fault: str) -> None:
    """Raises, where values are known, unless ``holds`` is true of every matrix."""
    verdicts = {path: holds(matrix) for path, matrix in matrices.items()}
    # Those of known matrices are traced too, inside jit.
    if any(isinstance(x, jax.core.Tracer) for x in verdicts.values()):
        return
    for path, verdict in jax.device_get(verdicts).items():
        if not verdict.all():
            where = f"`{path}`"
            if verdict.ndim:
                where += f" (layer {int((~verdict).argmax())} of its stack)"
            raise ValueError(f"at {where} {fault}")


def check_finite(name: str, matrices: Mapping[str, chex.Array]) -> None:
    """Raises, where values are known, if a matrix holds what is not finite."""
    check_each(
        matrices,
        _is_finite,
        f"{name} is not finite. Look for a loss that is NaN or infinite on one of the "
        "batches, or overflows in its dtype.",
    )


def check_directions(gradients: Mapping[str, chex.Array]) -> None:
    """Raises if a gradient is zero."""
    check_each(
        gradients,
        _is_nonzero,
        "the mean gradient is zero, which has no directions to start from. Does the "
        "loss read this kernel?",
    )


@jax.jit
def _is_nonzero(matrix):
    return jnp.any(matrix != 0, axis=(-2, -1))


@jax.jit
def _is_finite(matrix):
    return jnp.all(jnp.isfinite(matrix), axis=(-2, -1))
