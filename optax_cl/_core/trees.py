"""Trees of updates: alignment with masks, reductions in float32, copies."""

import functools
from collections.abc import Iterable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from optax_cl._core import checks

# Above so many leaves of at most so many entries, sums over a tree join them.
_MANY, _SMALL = 64, 4096


def is_masked(node: Any) -> bool:
    """Whether ``node`` is the placeholder that ``optax.masked`` leaves."""
    return isinstance(node, optax.MaskedNode)


def is_hole(node: Any) -> bool:
    """Whether ``node`` stands where a tree has no array: masked, or None."""
    return node is None or is_masked(node)


def align(name: str, tree: chex.ArrayTree, like: chex.ArrayTree) -> chex.ArrayTree:
    """Gives ``tree`` the mask pattern of ``like``, and checks that the shapes agree.

    ``optax.masked`` hides leaves of the updates, but not those of extra arguments.
    Where ``like`` has a ``MaskedNode`` (or None), whatever ``tree`` holds there is
    replaced by it, so that the two can be mapped over together.

    Args:
      name: What ``tree`` is called in error messages.
      tree: A tree with the structure of ``like``, or of ``like`` before masking.
      like: The updates that a transformation received.

    Returns:
      ``tree`` with the structure of ``like``.

    Raises:
      ValueError: If structure or leaf shapes disagree.
    """
    aligned = align_structure(name, tree, like)
    checks.check_same_shapes(name, aligned, like, "the updates")
    return aligned


def align_structure(
    name: str, tree: chex.ArrayTree, like: chex.ArrayTree
) -> chex.ArrayTree:
    """As ``align``, but leaves of ``tree`` may be anything (a basis, an importance).

    A mask that is a prefix of the parameters hides a subtree by one node: such a hole
    in ``tree`` is spread over the leaves that ``like`` has there.
    """
    holes = {
        path
        for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_masked)
        if is_masked(node)
    }

    def pick(path, ref, node):
        if is_hole(ref):
            return ref
        if path in holes:
            return jax.tree.map(lambda _: node, ref)
        return node

    try:
        return jax.tree_util.tree_map_with_path(
            pick,
            like,
            tree,
            is_leaf=lambda path, ref: is_hole(ref) or path in holes,
            is_leaf_takes_path=True,
        )
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"`{name}` must have the tree structure of what it goes with, the updates, "
            "parameters or state (leaves hidden by a mask may be present); got "
            f"{jax.tree.structure(tree)}, expected {jax.tree.structure(like)}."
        ) from error


def check_fits(
    name: str, tree: chex.ArrayTree, state: chex.ArrayTree, *, shapes: bool = True
) -> None:
    """Raises unless ``tree`` has an array wherever ``state`` has one, of its shape.

    ``tree.map`` takes None for a missing subtree, and its error names nothing.

    Args:
      name: What ``tree`` is called in error messages.
      tree: Updates or parameters.
      state: What is kept for them.
      shapes: Whether shapes must agree.
    """
    align_structure("the optimizer state", state, tree)

    def check(path, leaf, kept):
        if is_masked(leaf) or not hasattr(kept, "shape"):
            return
        where = f"at `{checks.path_str(path)}`"
        if leaf is None:
            raise ValueError(
                f"`{name}` must have an array wherever the parameters that the "
                f"optimizer state was made for have one; got None {where}. Pass zeros "
                "there, or hide the leaf from the optimizer with `optax.masked`."
            )
        if shapes and jnp.shape(leaf) != kept.shape:
            raise ValueError(
                f"`{name}` must have the shapes that the optimizer state was made for; "
                f"{where} got {jnp.shape(leaf)}, expected {kept.shape}. Make a new "
                "state with `tx.init(params)` for other parameters."
            )

    jax.tree_util.tree_map_with_path(check, tree, state, is_leaf=is_hole)


def vdot(a: chex.ArrayTree, b: chex.ArrayTree) -> chex.Array:
    """Inner product of two trees, accumulated in float32 (at least)."""
    leaves, structure = jax.tree.flatten(a)
    pairs = list(zip(leaves, structure.flatten_up_to(b), strict=True))
    small = [jnp.size(x) <= _SMALL for x, _ in pairs]
    parts = pairs
    # Each sum is a program of its own to the compiler. Hundreds of small ones, joined,
    # compile in three quarters of the time and run as fast.
    if sum(small) > _MANY:
        tiny = [pair for pair, is_small in zip(pairs, small, strict=True) if is_small]
        rest = [
            pair for pair, is_small in zip(pairs, small, strict=True) if not is_small
        ]
        parts = [*rest, tuple(map(_joined, zip(*tiny, strict=True)))]
    return sum((leaf_vdot(x, y) for x, y in parts), start=jnp.zeros([], jnp.float32))


def _joined(leaves: Iterable[chex.Array]) -> chex.Array:
    """All entries in one vector, float32 or wider."""
    dtype = jnp.result_type(jnp.float32, *leaves)
    return jnp.concatenate([jnp.ravel(jnp.asarray(x, dtype)) for x in leaves])


def leaf_vdot(a: chex.Array, b: chex.Array) -> chex.Array:
    """Inner product of two arrays, accumulated in float32 (at least)."""
    dtype = jnp.promote_types(jnp.result_type(a, b), jnp.float32)
    # A product and a sum fuse into one pass over both arrays; `jnp.vdot` in full
    # precision becomes a call into a matrix library, which is slower on large leaves.
    return jnp.sum(jnp.asarray(a, dtype) * jnp.asarray(b, dtype))


def squared_norm(tree: chex.ArrayTree) -> chex.Array:
    """Squared Euclidean norm of a tree, in float32 (at least)."""
    return vdot(tree, tree)


def scale_down(tree: chex.ArrayTree) -> tuple[chex.ArrayTree, chex.Array]:
    """A tree over a power of two that brings its largest entry into [1, 4).

    Squares of what comes out neither overflow nor underflow; ratios of inner products
    are bit for bit what they were where nothing did before.

    Args:
      tree: Tree of real arrays.

    Returns:
      The quotients, float32 or wider, and the power, ``[]``: 1 for trees that are zero,
      subnormal or not finite.
    """

    def widen(x):
        return jnp.asarray(x, importance_dtype(jnp.result_type(x)))

    def peak(x):
        return jnp.max(jnp.abs(x), initial=0)

    tree = jax.tree.map(widen, tree)
    largest = functools.reduce(
        jnp.maximum, map(peak, jax.tree.leaves(tree)), jnp.zeros([], jnp.float32)
    )
    tiny = jnp.finfo(largest.dtype).tiny
    largest = jnp.where((largest >= tiny) & jnp.isfinite(largest), largest, 1)
    mantissa, _ = jnp.frexp(largest)  # in [1/2, 1), so that the division is exact
    # A compiler may multiply by the reciprocal, which must not underflow.
    power = jnp.minimum(largest / (2 * mantissa), 1 / tiny)
    return jax.tree.map(lambda x: (x / power).astype(x.dtype), tree), power


def copy(tree: chex.ArrayTree) -> chex.ArrayTree:
    """Copies every array, so that a state never shares a donated buffer."""
    return jax.tree.map(lambda x: jnp.array(x, copy=True), tree)


def zeros_like(tree: chex.ArrayTree, dtype: Any = None) -> chex.ArrayTree:
    """Zeros with the shapes of ``tree``."""
    return jax.tree.map(lambda x: jnp.zeros_like(x, dtype=dtype), tree)


def importance_dtype(dtype: Any) -> Any:
    """The dtype in which memory about a leaf is kept: float32, or wider."""
    return jnp.promote_types(dtype, jnp.float32)
