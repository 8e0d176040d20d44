"""How a basis of fixed capacity grows by what it misses of a task's matrices."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from optax_cl._core import decompositions, linalg
from optax_cl._core.orthonormal import off_memory, unit_scale


class Grown(NamedTuple):
    """A basis that has grown, or is as it was."""

    memory: chex.Array  # [*batch, in, p], columns orthonormal, or zero beyond `count`
    count: chex.Array  # int32 [*batch], columns in use
    left_out: chex.Array  # int32 [*batch], columns that did not fit


def grow_memory(
    memory: chex.Array,
    count: chex.Array,
    gradient: chex.Array,
    threshold: chex.Numeric,
) -> tuple[chex.Array, chex.Array]:
    r"""Adds the directions of a gradient that the memory is missing (the GPM rule).

    With :math:`R = (I - M M^\top) G` and its singular values :math:`\sigma_i`, the
    leading left singular vectors of R are added, as few as reach

    .. math:: \|M M^\top G\|^2 + \sum_{i \le k} \sigma_i^2 \ge \epsilon\, \|G\|^2 .

    If they are more than fit, the strongest are kept. A gradient that is zero or not
    finite adds nothing.

    Args:
      memory: M, ``[*batch, in, p]``, columns orthonormal, or zero beyond ``count``.
      count: Columns in use, int32 ``[*batch]``.
      gradient: G, ``[*batch, in, out]``; only :math:`G G^\top` matters.
      threshold: Epsilon, the share of energy to reach, in (0, 1].

    Returns:
      The new memory and count, of the same shapes. One SVD of ``[in, out]``.

    References:
      Saha et al, `Gradient Projection Memory <https://arxiv.org/abs/2103.09762>`_, 2021
    """
    grown = grow(memory, count, gradient, threshold)
    return grown.memory, grown.count


@jax.jit
def grow(
    memory: chex.Array,
    count: chex.Array,
    gradient: chex.Array,
    threshold: chex.Numeric,
    floor: chex.Numeric = 0.0,
) -> Grown:
    """``grow_memory``, and what it had no room for.

    Args:
      memory: As there.
      count: As there.
      gradient: As there.
      threshold: As there.
      floor: Directions with a smaller share of the largest one's energy are rounding,
        and not taken; ``rounding(gram)`` if the gradient is the factor of a sum.

    Returns:
      The basis, its columns in use, and how many more would have been.
    """
    directions, wanted = _missing(memory, gradient, threshold, floor)
    taken = jnp.minimum(wanted, memory.shape[-1] - count)
    # Column j of the memory takes direction j - count, if that is one to be taken.
    shape = (*count.shape, memory.shape[-1])
    column = jax.lax.broadcasted_iota(jnp.int32, shape, count.ndim)
    source = column - jnp.expand_dims(count, -1)
    fresh = (source >= 0) & (source < jnp.expand_dims(taken, -1))
    index = jnp.clip(source, 0, directions.shape[-1] - 1)
    picked = jnp.take_along_axis(directions, index[..., None, :], axis=-1)
    memory = jnp.where(fresh[..., None, :], picked, memory)
    return Grown(memory, count + taken, wanted - taken)


def _missing(memory, gradient, threshold, floor):
    gradient = gradient.astype(memory.dtype)
    finite = jnp.all(jnp.isfinite(gradient), axis=(-2, -1), keepdims=True)
    gradient = jnp.where(finite, gradient, 0)
    # Only its direction matters, and squares of a small gradient would underflow.
    gradient = unit_scale(gradient)
    total = jnp.sum(gradient**2, axis=(-2, -1))[..., None]
    covered = jnp.sum(linalg.coefficients(memory, gradient) ** 2, axis=(-2, -1))
    # Twice, since one projection leaves rounding of the size of G, not of R.
    rest = off_memory(off_memory(gradient, memory), memory)
    vectors, singular, _ = decompositions.svd(rest)
    energy = singular**2
    before = covered[..., None] + linalg.energy_before(energy)
    noise = jnp.sqrt(total) * gradient.shape[-2] * jnp.finfo(energy.dtype).eps
    keep = (before < threshold * total) & (singular > noise)
    # The factor of a sum has orthogonal columns, so that the strongest one is known.
    strongest = jnp.max(jnp.sum(gradient**2, axis=-2), axis=-1, keepdims=True)
    keep &= energy > floor * strongest
    # Weak directions carry the most of what rounding left in the memory.
    directions = off_memory(vectors, memory) * keep[..., None, :]
    return directions, jnp.sum(keep, axis=-1, dtype=jnp.int32)


def factor(gram: chex.Array) -> chex.Array:
    """F with ``F F^T = gram``, ``[*batch, in, in]``; zero where that is rounding."""
    values, vectors = decompositions.eigh(gram)
    # The root of what is rounding of the sum would not be small.
    keep = values > rounding(gram) * values[..., -1:]
    return vectors * jnp.sqrt(jnp.where(keep, values, 0.0))[..., None, :]


def rounding(rows: chex.Array) -> float:
    """Below this share of the largest, an eigenvalue is rounding of a Gram matrix.

    Args:
      rows: A matrix with as many rows, ``[*batch, in, n]``, of the same dtype.

    Returns:
      The share.
    """
    return 4 * rows.shape[-2] ** 0.5 * float(jnp.finfo(rows.dtype).eps)


# --- What does not fit ---------------------------------------------------------------

OVERFLOWS = ("strongest", "error")


def check_not_traced(method: str, value: chex.Array) -> None:
    """Raises if ``value`` is traced, so that overflow would go unseen."""
    if isinstance(value, jax.core.Tracer):
        raise ValueError(
            "`overflow='error'` cannot be checked inside a transformed function. Call "
            f"`end_task` outside `jit`, or build `{method}` with "
            "`overflow='strongest'`."
        )


def check_fits(
    method: str, path: str, capacity: int, room: int, left_out: chex.Array
) -> None:
    """Raises if columns of the task were left out, or if that can't be known.

    Args:
      method: What keeps the memory, as it is built.
      path: Of the leaf.
      capacity: Columns there are.
      room: Columns there may be.
      left_out: How many were left out, int32 ``[*batch]``.
    """
    check_not_traced(method, left_out)
    more = int(np.max(np.asarray(left_out)))
    if more > 0:
        enlarge = (
            "Enlarge the state with `optax_cl.grow(opt_state, capacity)`, lower"
            if capacity < room
            else f"There is no room for more than {room}: lower"
        )
        raise ValueError(
            f"the memory of `{path}` has {capacity} columns, and the task needs {more} "
            f"more (`overflow='error'`). {enlarge} `threshold`, or build it with "
            "`overflow='strongest'`."
        )
