r"""What quadratic penalties remember of past tasks: importances and anchors.

The penalty of past tasks j is :math:`\frac12\sum_j\langle F_j, (\theta -
\theta^*_j)^2\rangle`, and its gradient, the *pull*, :math:`\sum_j F_j(\theta -
\theta^*_j)`. A memory keeps what the pull needs:

- ``"merged"``: :math:`S_0=\sum_j F_j` and the weighted mean anchor :math:`\bar\theta =
  \sum_j F_j\theta^*_j / S_0`. Exact for any number of tasks in constant memory, since
  the pull is :math:`S_0(\theta-\bar\theta)`. The mean is kept rather than
  :math:`S_1=\sum_j F_j\theta^*_j`, because :math:`S_0\theta - S_1` is a difference of
  nearly equal numbers near the anchors: with the mean it is exactly zero at a single
  anchor. A scalar (``offset``) keeps the part of the penalty's value that the mean
  loses.
- ``"separate"``: every :math:`F_j` and :math:`\theta^*_j`, in banks of fixed capacity.
- ``"latest"``: :math:`S_0`, anchored at the newest :math:`\theta^*` only.
- None: :math:`S_0` without anchors.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optax_cl._core import checks, places, trees

ANCHORS = ("merged", "separate", "latest")
ACCUMULATE = ("sum", "decay", "ema")
EMA_INITS = ("zero", "first", "debias")
OVERFLOWS = ("error", "merge")


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Rules:
    """How tasks are added to a memory. A static node: it holds no arrays."""

    anchors: str | None
    accumulate: str
    ema_init: str
    capacity: int | None
    overflow: str


class ImportanceMemory(NamedTuple):
    """Importances and anchors of past tasks; see the module."""

    # Optax's type of a state is a tree of arrays: None and static nodes need `Any`.
    tasks: chex.Array  # int32 [], tasks consolidated
    stored: chex.Array  # int32 [], entries in use of the banks ("separate")
    importance: chex.ArrayTree  # like params, float32, >= 0; "separate": [K, ...]
    anchor: Any  # like params, float32; "separate": [K, ...]; None without anchors
    offset: chex.Array  # float32 [], value of the penalty lost by merging, times two
    decay: chex.Array  # float32 [], factor on what is there already (1 for "sum")
    rules: Any  # Rules, static


def make_rules(
    anchors: str | None,
    accumulate: str,
    decay: chex.Numeric | None,
    ema_init: str,
    capacity: int | None,
    overflow: str,
) -> Rules:
    """Checks the arguments that all methods with an importance memory share."""
    checks.check_choice("accumulate", accumulate, ACCUMULATE)
    checks.check_choice("ema_init", ema_init, EMA_INITS)
    checks.check_choice("overflow", overflow, OVERFLOWS)
    if accumulate == "sum":
        if decay is not None:
            raise ValueError(
                f"`decay` has no meaning with `accumulate='sum'`; got {decay!r}. Pass "
                "`accumulate='decay'` or `'ema'`, or leave `decay` out."
            )
    elif decay is None:
        raise ValueError(
            f"`accumulate={accumulate!r}` needs `decay`, the factor on past tasks at "
            "each boundary, for instance 0.9."
        )
    else:
        # An average with factor one would never take in a task.
        checks.check_number(
            "decay", decay, low=0.0, high=1.0, open_high=accumulate == "ema"
        )
    if anchors == "separate":
        if capacity is None:
            raise ValueError(
                "`anchors='separate'` needs `capacity`, the number of tasks that fit "
                "(its memory is twice the parameters for each)."
            )
        checks.check_positive_int("capacity", capacity)
    elif capacity is not None:
        raise ValueError(
            f"`capacity` has no meaning with `anchors={anchors!r}`, whose memory does "
            f"not grow with the tasks; got {capacity!r}."
        )
    return Rules(anchors, accumulate, ema_init, capacity, overflow)


def decay_array(decay: chex.Numeric | None) -> chex.Array:
    """The factor on past tasks as a state field."""
    # A copy: the state may be donated, the caller's array must outlive it.
    value = 1.0 if decay is None else decay
    return jnp.array(value, dtype=jnp.result_type(float), copy=True)


def init(
    params: chex.ArrayTree, rules: Rules, decay: chex.Numeric | None
) -> ImportanceMemory:
    """An empty memory for ``params``; leaves that are not floating point have none."""

    def zeros(path, p):
        checks.check_real("an importance", path, p)
        dtype = jnp.result_type(p)
        if not jnp.issubdtype(dtype, jnp.inexact):
            return optax.MaskedNode()
        # Made out of p, and so sharded as p is.
        like = jnp.zeros_like(p, dtype=trees.importance_dtype(dtype))
        if rules.capacity is None:
            return like
        return jnp.broadcast_to(like[None], (rules.capacity, *like.shape))

    empty = functools.partial(jax.tree_util.tree_map_with_path, zeros)
    return ImportanceMemory(
        tasks=jnp.zeros([], jnp.int32),
        stored=jnp.zeros([], jnp.int32),
        importance=empty(params),
        anchor=None if rules.anchors is None else empty(params),
        offset=jnp.zeros([], jnp.float32),
        decay=decay_array(decay),
        rules=rules,
    )


def consolidate(
    memory: ImportanceMemory, importance: chex.ArrayTree, params: chex.ArrayTree
) -> ImportanceMemory:
    """Adds a finished task. Pure; same structure, shapes and dtypes.

    Args:
      memory: The memory of the tasks before.
      importance: Of the finished task, like params; it may hold leaves that the memory
        does not.
      params: At the end of the task, likewise; copied.

    Returns:
      The memory of all tasks.
    """
    shape = memory.importance
    params = trees.align_structure("params", params, shape)
    checks.check_same_shapes(
        "params", params, _slot(memory), "what the optimizer state was made for"
    )
    importance = trees.align_structure("importance", importance, shape)
    return _consolidated(memory, importance, params)


@jax.jit  # a boundary is mostly called outside jit, and this is many small operations
def _consolidated(memory, importance, params):
    rules, shape = memory.rules, memory.importance
    # An entry that is not finite protects nothing, rather than spoil all later steps.
    # Nor is there an anchor where a parameter is not finite: zero times NaN is NaN.
    new = jax.tree.map(
        lambda s, f, p: jnp.where(jnp.isfinite(f) & jnp.isfinite(p), f, 0).astype(
            s.dtype
        ),
        shape,
        importance,
        params,
    )
    at = jax.tree.map(
        lambda s, p: jnp.where(jnp.isfinite(p), p, 0).astype(s.dtype), shape, params
    )
    kept_weight, new_weight = _weights(memory)
    kept = jax.tree.map(lambda f: kept_weight * f, memory.importance)
    new = jax.tree.map(lambda f: new_weight * f, new)
    offset = kept_weight * memory.offset
    memory = memory._replace(tasks=memory.tasks + 1)
    if rules.anchors == "separate":
        return _consolidate_bank(memory, kept, new, at, offset)
    total = jax.tree.map(jnp.add, kept, new)
    anchor = memory.anchor
    if rules.anchors == "latest":
        anchor = jax.tree.map(
            lambda old, new, p: jnp.where(jnp.isfinite(p), new, old),
            anchor,
            at,
            params,
        )
    elif rules.anchors == "merged":
        offset = offset + _sum(_merge_loss, kept, new, anchor, at)
        anchor = jax.tree.map(_merge_anchor, kept, new, anchor, at)
    return memory._replace(
        stored=jnp.ones_like(memory.stored),
        importance=_like(total, memory.importance),
        anchor=anchor if anchor is None else _like(anchor, memory.anchor),
        offset=offset.astype(memory.offset.dtype),
    )


def _slot(memory):
    """Shapes of one task's importance."""
    if memory.rules.capacity is None:
        return memory.importance
    return jax.tree.map(
        lambda f: jax.ShapeDtypeStruct(f.shape[1:], f.dtype), memory.importance
    )


def _consolidate_bank(memory, kept, new, at, offset):
    capacity, used = memory.rules.capacity, memory.stored
    slot = jnp.minimum(used, capacity - 1)
    importance = jax.tree.map(lambda f, x: f.at[slot].set(x), kept, new)
    anchor = jax.tree.map(lambda a, x: a.at[slot].set(x), memory.anchor, at)
    if memory.rules.overflow == "merge":
        # Oldest first, the new task behind them: when full, the first two become one.
        full = used >= capacity
        f = jax.tree.map(lambda f, x: jnp.concatenate([f, x[None]]), kept, new)
        a = jax.tree.map(lambda a, x: jnp.concatenate([a, x[None]]), memory.anchor, at)
        first = [jax.tree.map(lambda x, i=i: x[i], t) for i in (0, 1) for t in (f, a)]
        f0, a0, f1, a1 = first
        lost = _sum(_merge_loss, f0, f1, a0, a1)
        offset = offset + jnp.where(full, lost, 0)
        importance, anchor = (
            jax.tree.map(
                lambda placed, merged, rest: jnp.where(
                    full, jnp.concatenate([merged[None], rest[2:]]), placed
                ),
                *trio,
            )
            for trio in (
                (importance, jax.tree.map(jnp.add, f0, f1), f),
                (anchor, jax.tree.map(_merge_anchor, f0, f1, a0, a1), a),
            )
        )
    return memory._replace(
        stored=jnp.minimum(used + 1, capacity),
        importance=_like(importance, memory.importance),
        anchor=_like(anchor, memory.anchor),
        offset=offset.astype(memory.offset.dtype),
    )


def _weights(memory: ImportanceMemory) -> tuple[chex.Numeric, chex.Numeric]:
    """Factors on what is stored and on the new task's importance."""
    rules, decay = memory.rules, memory.decay
    if rules.accumulate == "sum":
        return 1.0, 1.0
    if rules.accumulate == "decay":
        return decay, 1.0
    if rules.ema_init == "first":
        return decay, jnp.where(memory.tasks == 0, 1.0, 1.0 - decay)
    return decay, 1.0 - decay


def read_scale(memory: ImportanceMemory) -> chex.Numeric:
    """Factor with which the stored importance enters the penalty."""
    rules, decay = memory.rules, memory.decay
    if rules.accumulate == "decay":
        return decay
    if rules.accumulate == "ema" and rules.ema_init == "debias":
        total = 1.0 - decay**memory.tasks
        return jnp.where(total > 0, 1.0 / jnp.where(total > 0, total, 1.0), 0.0)
    return 1.0


def _merge_anchor(f0, f1, a0, a1):
    # Where only the newer anchor has importance the result is exactly it; where
    # neither has any, too, by definition.
    total = jnp.where(f0 > 0, f0 + f1, 1)
    return jnp.where(f0 > 0, a0 + f1 / total * (a1 - a0), a1)


def _merge_loss(f0, f1, a0, a1):
    # f0 (x-a0)^2 + f1 (x-a1)^2 = (f0+f1) (x-a)^2 + f0 f1 / (f0+f1) (a0-a1)^2
    total = jnp.where(f0 > 0, f0 + f1, 1)
    return jnp.sum(jnp.where(f0 > 0, f0 * (f1 / total) * jnp.square(a1 - a0), 0))


def _sum(function, *rest):
    parts = jax.tree.leaves(jax.tree.map(function, *rest))
    return sum(parts, start=jnp.zeros([], jnp.float32))


def _like(tree, like):
    return jax.tree.map(lambda x, ref: x.astype(ref.dtype), tree, like)


def leaf_pull(rules: Rules, importance: Any, anchor: Any, at: Any) -> chex.Array:
    """``sum_j F_j (at - anchor_j)`` of one leaf, in the importance's dtype."""
    x = jnp.asarray(at, importance.dtype)
    if rules.anchors == "separate":
        return jnp.sum(importance * (x[None] - anchor), axis=0)
    return importance * (x - anchor)


def leaf_total(rules: Rules, importance: Any) -> chex.Array:
    """``sum_j F_j`` of one leaf."""
    return importance.sum(axis=0) if rules.anchors == "separate" else importance


def value(memory: ImportanceMemory, params: chex.ArrayTree) -> chex.Array:
    """``sum_j <F_j, (params - anchor_j)^2> / 2``, with its scale, in float32."""
    shape = memory.importance
    params = trees.align_structure("params", params, shape)

    def leaf(f, a, p):
        x = jnp.asarray(p, f.dtype)
        x = x[None] if memory.rules.anchors == "separate" else x
        return jnp.sum(f * jnp.square(x - a))

    total = _sum(leaf, shape, memory.anchor, params) + memory.offset
    return 0.5 * read_scale(memory) * total


def check_updates(memory: ImportanceMemory, updates: chex.ArrayTree) -> None:
    """Raises unless updates are those of the parameters that the memory is of."""
    trees.check_fits("updates", updates, _slot(memory))


def map_updates(
    function: Callable[..., chex.Array], updates: chex.ArrayTree, *rest: Any
) -> chex.ArrayTree:
    """Maps over updates; those for which some tree has no array pass unchanged."""
    rest = tuple(trees.align_structure("the memory", t, updates) for t in rest)
    return jax.tree.map(
        lambda u, *r: u if any(map(trees.is_hole, (u, *r))) else function(u, *r),
        updates,
        *rest,
        is_leaf=trees.is_hole,
    )


def value_at(scalar: optax.ScalarOrSchedule, count: chex.Array) -> chex.Numeric:
    """A constant or a schedule at a step."""
    return scalar(count) if callable(scalar) else scalar


def usage(memory: ImportanceMemory) -> tuple[chex.Array, int | None]:
    """Tasks in the memory (banks: entries in use) and its capacity."""
    capacity = memory.rules.capacity
    return (memory.tasks if capacity is None else memory.stored), capacity


def check_room(memory: ImportanceMemory) -> None:
    """Raises if another task does not fit, or if that cannot be known."""
    rules = memory.rules
    if rules.anchors != "separate" or rules.overflow != "error":
        return
    instead = "`overflow='merge'` or `anchors='merged'`"
    places.check_left(memory.stored, rules.capacity, instead)


def grow(memory: ImportanceMemory, capacity: int) -> ImportanceMemory:
    """The memory with banks of ``capacity`` entries."""
    if memory.rules.capacity is None:
        return memory
    return memory._replace(
        importance=places.add(memory.importance, memory.stored, capacity),
        anchor=places.add(memory.anchor, memory.stored, capacity),
        rules=dataclasses.replace(memory.rules, capacity=capacity),
    )
