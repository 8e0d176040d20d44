"""What ``Task.layer_inputs`` gives, read as one matrix of inputs for each kernel."""

from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp

from optax_cl._core import checks


def by_path(tree: Any) -> dict[str, chex.Array]:
    """The inputs in a tree, by the path of their kernel."""
    return {
        checks.path_str(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def weighted_rows(
    inputs: Mapping[str, chex.Array],
    path: str,
    weights: chex.Array,
    shape: tuple[int, ...],
) -> tuple[chex.Array, chex.Array]:
    """The inputs of a kernel as rows X, so that ``X^T X`` sums ``w x x^T``.

    Args:
      inputs: From ``by_path``.
      path: The kernel's.
      weights: ``[B]``; padded examples have weight 0.
      shape: Of the kernel as a matrix, ``[*batch, in, out]``.

    Returns:
      ``[*batch, n, in]``, float32 or wider, each row times the root of its example's
      weight; and the number of inputs in them, each counted by its weight.

    Raises:
      ValueError: If the kernel has no inputs, or they do not fit.
    """
    *batch, fan_in, _ = shape
    if path not in inputs:
        raise ValueError(
            f"`layer_inputs` gives no inputs of `{path}`; it gives those of "
            f"{sorted(inputs)}. Return them at its path, or leave the kernel out."
        )
    x = jnp.asarray(inputs[path])
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    lead = (*batch, len(weights))
    if x.shape[: len(lead)] != lead or x.shape[-1:] != (fan_in,):
        raise ValueError(
            f"`layer_inputs` must give inputs [*batch, B, ..., in]; at `{path}` "
            f"expected {lead} in front and {fan_in} last, got shape {x.shape}."
        )
    rows = x.reshape(*lead, -1, fan_in)
    count = weights.sum() * rows.shape[-2]
    roots = jnp.expand_dims(jnp.sqrt(weights), (*range(len(batch)), -2, -1))
    # A padded example is zeros, of which a layer's inputs may still be infinite.
    rows = jnp.where(roots > 0, roots * rows, 0.0)
    return rows.reshape(*batch, -1, fan_in), count
