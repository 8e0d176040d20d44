"""Surgery on gradients: what two gradient trees of one model do to each other."""

import math
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from optax_cl._core import checks, nonnegative, trees


def project_conflict(
    g: chex.ArrayTree,
    ref: chex.ArrayTree,
    *,
    granularity: str = "global",
    strength: chex.Numeric = 1.0,
    gate: str = "conflict",
) -> chex.ArrayTree:
    r"""Removes from ``g`` what works against ``ref``, if anything does.

    The closest point to :math:`g` that does not oppose the reference :math:`r`:

    .. math::

        \operatorname{argmin}_v \|v - g\|^2 \ \text{s.t.}\ \langle v, r\rangle \ge 0
        \;=\; g - \frac{\min(\langle g, r\rangle, 0)}{\langle r, r\rangle}\, r

    A ``strength`` c under 1 takes that share of the step, which leaves
    :math:`(1-c)\langle g, r\rangle`. Only the direction of ``ref`` matters, not its
    length. ``g`` comes back bit for bit
    where it does not conflict, and where ``ref`` gives no direction to protect: it is
    zero, it (or ``g``) is not finite, or it is so small that float32 cannot hold its
    square (a norm under about ``3.4e-18 * sqrt(size)``).

    Args:
      g: Tree of floating-point arrays. Inner products are taken in float32 at least,
        since in bfloat16 their rounding flips the sign of small ones.
      ref: Tree with the structure and shapes of ``g``.
      granularity: ``"global"`` takes one inner product over the whole tree; ``"leaf"``
        projects every leaf by itself, which implies the global constraint and removes
        more.
      strength: Share c of the conflict to remove, ``[]``; in [0, 1] where concrete.
      gate: ``"conflict"`` acts where the inner product is negative; ``"always"`` takes
        the component along ``ref`` out whatever its sign (as OGD does).

    Returns:
      A tree with the structure, shapes and dtypes of ``g``.

    Raises:
      ValueError: If the structures or shapes differ, ``granularity`` or ``gate`` is
        unknown, or ``strength`` lies outside [0, 1].
      TypeError: If a leaf is not a real floating-point array.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_cl._core.surgery import project_conflict
      >>> print(project_conflict(jnp.array([1., -2.]), jnp.array([0., 3.])))
      [1. 0.]
      >>> print(project_conflict(jnp.array([1., 2.]), jnp.array([0., 3.])))
      [1. 2.]
    """
    checks.check_choice("granularity", granularity, ("global", "leaf"))
    checks.check_same_shapes("ref", ref, g, "`g`")
    check_floating("g", g)
    check_floating("ref", ref)
    checks.check_choice("gate", gate, ("conflict", "always"))
    checks.check_number("strength", strength, low=0.0, high=1.0)

    def project(g, ref):
        return _project_jointly(g, ref, strength, gate)

    return jax.tree.map(project, g, ref) if granularity == "leaf" else project(g, ref)


def check_floating(name: str, tree: Any) -> None:
    """Raises unless every leaf is a real floating-point array."""

    def check(path, leaf):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"`{name}` must hold real floating-point arrays; at "
                f"`{checks.path_str(path)}` got {dtype}. Mask integer leaves out with "
                "`optax.masked`, and wrap complex ones in "
                "`optax.contrib.split_real_and_imaginary`."
            )

    jax.tree_util.tree_map_with_path(check, tree)


def check_memories(
    method: str, updates: Any, memory_updates: Any, memory_mask: Any
) -> tuple[chex.ArrayTree, chex.Array]:
    """Checks what a method was given of K memories.

    Args:
      method: Whose arguments they are, for the message.
      updates: Tree of real floating-point arrays.
      memory_updates: Tree like it with a leading axis K, whole or hidden alike.
      memory_mask: Which of the K are of past tasks, bool ``[K]``.

    Returns:
      The memories, hidden where ``updates`` are, and the mask.

    Raises:
      ValueError, TypeError: If one of them is missing or does not fit.
    """
    if memory_updates is None or memory_mask is None:
        raise ValueError(
            f"`{method}` needs `memory_updates`, the stacked gradients on the memories "
            "of tasks, and `memory_mask`, which of them are past tasks. Call "
            "`tx.update(grads, state, params, memory_updates=..., "
            "memory_mask=...)`; before the first boundary the mask is all False."
        )
    mask = _check_mask(memory_mask)
    memories = _align(memory_updates, updates, len(mask))
    check_floating("updates", updates)
    check_floating("memory_updates", memories)
    return memories, mask


def _check_mask(mask: chex.Array) -> chex.Array:
    mask = jnp.asarray(mask)
    if mask.dtype != bool:
        raise TypeError(
            f"`memory_mask` must be boolean; got {mask.dtype}. For a count of past "
            "tasks pass `jnp.arange(K) < count`."
        )
    if mask.ndim != 1 or not mask.size:
        raise ValueError(
            "`memory_mask` must have shape [K] with K at least 1, one entry for each "
            f"memory; got {mask.shape}."
        )
    return mask


def _align(
    memories: chex.ArrayTree, updates: chex.ArrayTree, count: int
) -> chex.ArrayTree:
    """Hides what is hidden in the updates, and checks the leading axis."""
    memories = trees.align_structure("memory_updates", memories, updates)
    stacked = jax.tree.map(
        lambda u: jax.ShapeDtypeStruct((count, *jnp.shape(u)), jnp.result_type(u)),
        updates,
    )
    checks.check_same_shapes(
        "memory_updates",
        memories,
        stacked,
        f"the updates with a leading axis of {count}, one entry of `memory_mask` each",
    )
    return memories


def project_conflicts(
    g: chex.ArrayTree,
    refs: chex.ArrayTree,
    valid: chex.Array,
    *,
    floor: chex.Numeric = 0.0,
) -> chex.ArrayTree:
    r"""Removes from ``g`` what works against any of K references, if anything does.

    With :math:`r_k` the references, the closest point to :math:`g` that opposes none,

    .. math::

        \operatorname{argmin}_v \|v - g\|^2 \ \text{s.t.}\ \langle v, r_k\rangle \ge 0
        \;=\; g + \sum_k x_k r_k, \qquad x = \operatorname{argmin}_{x \ge
        \text{floor}} \tfrac12 \Big\|g + \sum_k x_k r_k\Big\|^2 .

    The problem in x is solved in the K directions :math:`r_k / \|r_k\|`, so lengths of
    references do not matter while ``floor`` is 0; its ridge (see
    ``nonnegative.minimise``) leaves :math:`\langle v, r_k\rangle \ge -4\cdot
    10^{-6} x_k \|r_k\|^2` in float32.

    References that are not valid, and those that give no direction to protect (zero,
    not finite, or too small; see ``project_conflict``), take no part. ``g`` comes back
    bit for bit where it opposes none of the others.

    Args:
      g: Tree of real floating-point arrays (see ``check_floating``).
      refs: Tree of such with the structure of ``g``, each leaf ``[K, ...]``.
      valid: Which references count, bool, ``[K]``.
      floor: The least x_k, ``[]``, at least 0: where there is a conflict, ``floor``
        times each reference that takes part is added at least.

    Returns:
      A tree with the structure, shapes and dtypes of ``g``.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_cl._core.surgery import project_conflicts
      >>> refs, both = jnp.array([[0.0, 3.0], [-1.0, 0.0]]), jnp.ones(2, bool)
      >>> print(project_conflicts(jnp.array([-1.0, -2.0]), refs, both).round(4))
      [-1.  0.]
    """
    if not jax.tree.leaves(g):
        return g
    counts, norms, cosines, along = _angles(g, refs, valid)
    conflict = jnp.any(along < 0)
    # In units of the largest number: nothing in the solver over- or underflows.
    least = jnp.where(counts, floor * norms, 0)
    scale = jnp.maximum(jnp.max(jnp.abs(along)), jnp.max(least))
    scale = jnp.where(scale > 0, scale, 1)
    along, least = along / scale, least / scale
    # x = least + y with y >= 0 moves the floor into the linear term.
    shifted = along + jnp.sum(cosines * least[None, :], axis=1)
    x = least + nonnegative.minimise(cosines, shifted)
    coefficients = jnp.where(conflict & counts, x * scale, 0) / norms
    finite = jnp.all(jnp.isfinite(coefficients))
    return _add_rows(g, refs, jnp.where(finite, coefficients, 0))


def sum_without_conflicts(
    g: chex.ArrayTree,
    refs: chex.ArrayTree,
    valid: chex.Array,
    key: chex.PRNGKey,
    *,
    mean: bool = False,
) -> chex.ArrayTree:
    r"""Adds up ``g`` and K references, each without what works against the others.

    Of each, one after the other in random order, the component along every other is
    taken off if it is negative there; ``pcgrad`` has the formula. All of it happens in
    the span of the K + 1 trees, so their inner products are enough.

    References that are not valid, and those that give no direction (see
    ``project_conflicts``), take no part; nothing is added to a ``g`` that is not
    finite or too large to square, and what conflicts with one too small to square
    stays.

    Args:
      g: Tree of real floating-point arrays (see ``check_floating``).
      refs: Tree of such with the structure of ``g``, each leaf ``[K, ...]``.
      valid: Which references count, bool, ``[K]``.
      key: For the orders.
      mean: Whether to divide by the number of those that take part.

    Returns:
      A tree with the structure, shapes and dtypes of ``g``.
    """
    if not jax.tree.leaves(g):
        return g
    counts, norms, cosines, along = _angles(g, refs, valid)
    square = trees.squared_norm(g)
    counts &= jnp.isfinite(square)
    known = (square > _smallest_square(g, square.dtype)) & jnp.isfinite(square)
    own = jnp.sqrt(jnp.where(known, square, 1))
    toward = jnp.where(known & counts, jnp.clip(along / own, -1, 1), 0)
    above = jnp.concatenate([jnp.ones(1, toward.dtype), toward])
    cosines = jnp.concatenate([toward[:, None], cosines], axis=1)
    cosines = jnp.concatenate([above[None, :], cosines])
    lengths = jnp.concatenate([own[None], norms])
    takes_part = jnp.concatenate([known[None], counts])
    off = _taken_off(cosines, key)
    share = lengths[:, None] / lengths[None, :]
    pairs = takes_part[:, None] & takes_part[None, :]
    weights = 1 + jnp.sum(jnp.where(pairs, off * share, 0), axis=0)
    weights = jnp.where(jnp.all(jnp.isfinite(weights)), weights, 1)
    if mean:
        weights /= 1 + jnp.sum(counts)
    return _add_rows(g, refs, jnp.where(counts, weights[1:], 0), weights[0])


@jax.jit  # so that eager calls don't compile the loop anew
def _taken_off(cosines: chex.Array, key: chex.PRNGKey) -> chex.Array:
    """Row i: what conflicts cost unit vector i, in unit vectors, ``[T, T]``."""
    count = len(cosines)

    def one(i, key):
        def against(left, j):
            dot = left @ cosines[:, j]
            taken = jnp.where((i != j) & (dot < 0), dot, 0)
            return left.at[j].add(-taken), None

        start = jax.nn.one_hot(i, count, dtype=cosines.dtype)
        left, _ = jax.lax.scan(against, start, jax.random.permutation(key, count))
        return left - start

    return jax.vmap(one)(jnp.arange(count), jax.random.split(key, count))


class _Angles(NamedTuple):
    """What K references and ``g`` are to each other; zero where one takes no part."""

    counts: chex.Array  # bool [K], which take part
    norms: chex.Array  # [K], 1 where a reference takes no part
    cosines: chex.Array  # [K, K], 1 on the diagonal
    along: chex.Array  # [K], <g, r_k> / |r_k|


def _angles(g: chex.ArrayTree, refs: chex.ArrayTree, valid: chex.Array) -> _Angles:
    # Each inner product is that of one reference: none is joined with another, so that
    # what is not finite stays in its row, and what is sharded stays where it is.
    dots = jax.vmap(lambda r: trees.vdot(r, g))(refs)
    gram = jax.vmap(lambda r: jax.vmap(lambda s: trees.vdot(r, s))(refs))(refs)
    squares = jnp.diagonal(gram)
    norms = jnp.sqrt(squares)
    counts = valid & (squares > _smallest_square(g, squares.dtype))
    counts &= jnp.isfinite(squares) & jnp.isfinite(dots)
    norms = jnp.where(counts, norms, 1)
    cosines = jnp.clip(gram / norms[:, None] / norms[None, :], -1, 1)
    alone = jnp.eye(len(norms), dtype=bool) | ~(counts[:, None] & counts[None, :])
    cosines = jnp.where(alone, jnp.eye(len(norms), dtype=cosines.dtype), cosines)
    return _Angles(counts, norms, cosines, jnp.where(counts, dots / norms, 0))


@jax.jit  # so that eager calls don't compile the loop anew
def _add_rows(
    g: chex.ArrayTree,
    refs: chex.ArrayTree,
    coefficients: chex.Array,
    own: chex.Array | None = None,
) -> chex.ArrayTree:
    """``g`` plus the references times coefficients; those with zero are not read.

    With ``own``, that many times ``g``.

    A loop over the references that are added, a few of K if any: written out, K terms
    a leaf are slow to trace and to compile for hundreds of leaves.
    """
    used = coefficients != 0
    count = jnp.sum(used)
    order = jnp.argsort(~used)

    def add(carry):
        i, total = carry
        k = order[i]

        def leaf(t, r):
            row = jax.lax.dynamic_index_in_dim(r, k, keepdims=False)
            return t + coefficients[k] * jnp.asarray(row, t.dtype)

        return i + 1, jax.tree.map(leaf, total, refs)

    def widen(leaf):
        leaf = jnp.asarray(leaf, coefficients.dtype)
        leaf = leaf if own is None else own * leaf
        # The select does nothing but make the loop's start vary over the devices of a
        # `shard_map` wherever its result does.
        return jnp.where(count > 0, leaf, leaf)

    start = jnp.zeros([], jnp.int32), jax.tree.map(widen, g)
    _, total = jax.lax.while_loop(lambda carry: carry[0] < count, add, start)
    return jax.tree.map(lambda t, x: t.astype(jnp.result_type(x)), total, g)


def _smallest_square(tree: chex.ArrayTree, dtype: jnp.dtype) -> float:
    """The squared norm of a tree like this one up to which it gives no direction.

    Squares below the smallest normal number are flushed to zero, so the squared norm is
    short by up to ``size * tiny``. Where that could be a part in a thousand or more,
    dividing by it would inflate a correction instead of making it.
    """
    size = sum(math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(tree))
    return 1e3 * size * float(jnp.finfo(dtype).tiny)


def _project_jointly(
    g: chex.ArrayTree, ref: chex.ArrayTree, strength: chex.Numeric, gate: str
) -> chex.ArrayTree:
    """Projects with one inner product over all leaves of ``g``."""
    dot, squared = trees.vdot(g, ref), trees.squared_norm(ref)
    has_direction = squared > _smallest_square(g, squared.dtype)
    # The division comes last, and all that the leaves read is its result: a compiler
    # copies cheap scalar expressions into the loop of every leaf, and a sum over all
    # leaves in each of them makes compile time quadratic (a minute for 200 leaves). A
    # division is not copied.
    removed = strength * (jnp.minimum(dot, 0.0) if gate == "conflict" else dot)
    coefficient = removed / jnp.where(has_direction, squared, jnp.inf)
    # Not finite: dot or squared norm overflowed, or an input was not finite.
    conflict = (coefficient != 0) & jnp.isfinite(coefficient)

    def project(g_leaf, ref_leaf):
        projected = g_leaf - coefficient * jnp.asarray(ref_leaf, coefficient.dtype)
        # A select, not a coefficient of zero: 0 * inf is NaN, and -0. - 0. is 0.
        return jnp.where(conflict, projected.astype(g_leaf.dtype), g_leaf)

    return jax.tree.map(lambda a, b: project(jnp.asarray(a), b), g, ref)
