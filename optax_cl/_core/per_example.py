"""Sums over a batch of what is computed example by example, in bounded memory."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from optax_cl._core import checks, trees

# Per-example gradients live in memory for one chunk of a batch. 2^26 numbers are
# 256 MB in float32; a model of 64 M parameters or more goes example by example.
_CHUNK_NUMBERS = 2**26


def zeros(what: str, params: chex.ArrayTree) -> chex.ArrayTree:
    """An empty sum for each parameter, float32 or wider; ``what`` it is, for errors."""

    def leaf(path, p):
        checks.check_real(what, path, p)
        return jnp.zeros(jnp.shape(p), trees.importance_dtype(jnp.result_type(p)))

    return jax.tree_util.tree_map_with_path(leaf, params)


def lead(example: Any) -> Any:
    """One example, as a batch of one."""
    return jax.tree.map(lambda x: x[None], example)


def sum_over_examples(
    one: Callable[[Any], Any],
    rows: Any,
    weights: chex.Array,
    start: Any,
    *,
    copies: int = 1,
) -> Any:
    """Adds the weighted ``one(row)`` of each row to ``start``, chunk by chunk.

    Args:
      one: ``row -> tree`` like ``start``.
      rows: Tree of arrays ``[B, ...]``.
      weights: ``[B]``, 0 for padding.
      start: The sum so far.
      copies: How many trees like ``start`` an example needs while it is computed.

    Returns:
      The sum, like ``start``.
    """
    size = weights.shape[0]
    numbers = copies * sum(x.size for x in jax.tree.leaves(start))
    chunk = min(size, max(1, _CHUNK_NUMBERS // max(1, numbers)))
    num_chunks = -(-size // chunk)

    def split(x):
        missing = num_chunks * chunk - size
        if missing:
            # Copies of a real row, with weight zero: no value that could overflow.
            x = jnp.concatenate([x, jnp.repeat(x[:1], missing, axis=0)])
        return x.reshape(num_chunks, chunk, *x.shape[1:])

    weights = jnp.pad(weights, (0, num_chunks * chunk - size))

    def add(total, part):
        part_rows, part_weights = part
        values = jax.vmap(one)(part_rows)
        return jax.tree.map(
            lambda t, v: (
                t
                + jnp.tensordot(
                    part_weights.astype(v.dtype), v, axes=1, precision="highest"
                )
            ),
            total,
            values,
        ), None

    parts = (jax.tree.map(split, rows), weights.reshape(num_chunks, chunk))
    return jax.lax.scan(add, start, parts)[0]
