"""Trees of updates: alignment with masks, reductions in float32, copies."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax


def is_masked(node: Any) -> bool:
    """Whether ``node`` is the placeholder that ``optax.masked`` leaves."""
    return isinstance(node, optax.MaskedNode)


def is_hole(node: Any) -> bool:
    """Whether ``node`` stands where a tree has no array: masked, or None."""
    return node is None or is_masked(node)


def align(tree: chex.ArrayTree, like: chex.ArrayTree) -> chex.ArrayTree:
    """Gives ``tree`` the mask pattern of ``like``.

    ``optax.masked`` hides leaves of the updates, but not those of extra arguments.
    Where ``like`` has a ``MaskedNode`` (or None), whatever ``tree`` holds there is
    replaced by it, so that the two can be mapped over together.
    """
    return jax.tree.map(
        lambda ref, leaf: ref if is_hole(ref) else leaf, like, tree, is_leaf=is_hole
    )


def vdot(a: chex.ArrayTree, b: chex.ArrayTree) -> chex.Array:
    """Inner product of two trees, accumulated in float32 (at least)."""
    parts = jax.tree.leaves(jax.tree.map(leaf_vdot, a, b))
    return sum(parts, start=jnp.zeros([], jnp.float32))


def leaf_vdot(a: chex.Array, b: chex.Array) -> chex.Array:
    """Inner product of two arrays, accumulated in float32 (at least)."""
    dtype = jnp.promote_types(jnp.result_type(a, b), jnp.float32)
    # A product and a sum fuse into one pass over both arrays; `jnp.vdot` in full
    # precision becomes a call into a matrix library, which is slower on large leaves.
    return jnp.sum(jnp.asarray(a, dtype) * jnp.asarray(b, dtype))


def squared_norm(tree: chex.ArrayTree) -> chex.Array:
    """Squared Euclidean norm of a tree, in float32 (at least)."""
    return vdot(tree, tree)


def copy(tree: chex.ArrayTree) -> chex.ArrayTree:
    """Copies every array, so that a state never shares a donated buffer."""
    return jax.tree.map(lambda x: jnp.array(x, copy=True), tree)


def zeros_like(tree: chex.ArrayTree, dtype: Any = None) -> chex.ArrayTree:
    """Zeros with the shapes of ``tree``."""
    return jax.tree.map(lambda x: jnp.zeros_like(x, dtype=dtype), tree)


def importance_dtype(dtype: Any) -> Any:
    """The dtype in which memory about a leaf is kept: float32, or wider."""
    return jnp.promote_types(dtype, jnp.float32)
