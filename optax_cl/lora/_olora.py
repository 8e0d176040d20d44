r"""O-LoRA: keep the rows of a new adapter orthogonal to those of past tasks.

Every task has an adapter of its own, ``a [in, r]``; past ones are merged into the
kernels (or kept, and summed), and what is remembered of them is where they read: the
columns of their ``a``, which papers that write ``y = W x`` call the rows of A.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_cl._core import checks, importance, linalg, tasks, trees

PENALTIES = ("l1", "fro")
OVERFLOWS = ("error", "oldest")
FACTORS = r"(^|/)(a|lora_a)$"  # `LoRA.a` here, and in `flax.nnx.LoRA`


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class OloraRules:
    """How rows are stored, and what is made of them. A static node."""

    capacity: int
    overflow: str
    penalty: str | None  # None: projection


class OloraState(NamedTuple):
    """State of :func:`olora`."""

    count: chex.Array  # int32 [], steps done (for schedules)
    strength: chex.Array  # float32 [], lambda at the next step
    tasks: chex.Array  # int32 [], tasks stored
    rows: Any  # [*batch, in, capacity * r] at every `a`, at least float32; unused: zero
    rules: Any  # OloraRules, static


class OloraProjectState(NamedTuple):
    """State of :func:`olora_project`."""

    tasks: chex.Array  # int32 [], tasks stored
    rows: Any  # [*batch, in, capacity * r] at every `a`, at least float32; unused: zero
    basis: Any  # Q, [*batch, in, min(in, capacity * r)] likewise; unused: zero
    rules: Any  # OloraRules, static


def olora(
    strength: optax.ScalarOrSchedule,
    *,
    capacity: int,
    penalty: str = "l1",
    overflow: str = "error",
    factors: str = FACTORS,
) -> optax.GradientTransformationExtraArgs:
    r"""O-LoRA: penalises the overlap of an adapter's rows with those of past tasks.

    With :math:`a_j` ``[in, r]`` the input-side factors of finished tasks and M ``[in,
    K r]`` all of them side by side, the penalty on the factor :math:`a` being trained,
    and what is added to its updates, are

    .. math::
      \lambda \sum_{kl} |M^T a|_{kl}, \quad g \leftarrow g + \lambda M\,
      \operatorname{sign}(M^T a)
      \qquad\text{or}\qquad
      \lambda \|M^T a\|_F^2, \quad g \leftarrow g + 2 \lambda M M^T a

    for ``"l1"`` and ``"fro"``, with sign(0) = 0. The sum runs over *all* finished
    tasks. Nothing else is touched: not ``b``, not magnitudes, not other parameters.
    Before the first boundary updates pass unchanged, whatever the strength.

    This is a regulariser, not a projection: gradients keep their component along old
    rows, and the overlap that remains is a balance of two forces. Even where it is
    zero, the layer's output is unchanged for inputs in the span of old rows only, not
    for the inputs of old tasks. :func:`olora_project` holds the overlap at zero.

    ``end_task`` stores a copy of ``a``. Then merge the adapters into the kernels (their
    sum is what O-LoRA computes at inference, without a task id), start new ones, and
    clear the moments with ``optax_cl.reset_state``.

    **Placement.** Before the moments it is the published form, a term of the loss. Adam
    divides by :math:`\sqrt\nu`, so that a penalty gradient alone moves ``a`` by one
    learning rate a step, whatever the strength: it is the strength *relative to the
    task's gradient* that counts. ``"l1"`` does not fade near orthogonality, hence the
    overlap ends by chattering in a band as wide as a step; ``"fro"`` fades, and leaves
    a larger overlap the smaller the strength. It adds to the gradient, so with
    decoupled moments leave ``second_moment`` at ``"max"`` or use ``"routed"``; under
    ``"raw"`` the denominator does not know of the penalty, and a step has no bound.

    **Memory.** ``capacity`` copies of every ``a`` in float32. **Work per step.** Two
    products of ``[in, K r]`` with ``[in, r]``, however many tasks are stored.

    Args:
      strength: Lambda (lambda_1 of the paper), at least 0: a number, a scalar array or
        tracer, or a schedule over steps.
      capacity: Tasks that fit. A static size: with ``optax.inject_hyperparams`` list
        it in ``static_args``.
      penalty: ``"l1"``, the released code's, or ``"fro"``, squared entries.
      overflow: With one task too many: ``"error"`` (raised by ``collect`` and
        ``end_task``, which then must run outside jit) or ``"oldest"`` (which is
        forgotten). ``optax_cl.grow`` makes room.
      factors: Regular expression, searched in a leaf's path: which leaves ``[*batch,
        in, r]`` are input-side factors.

    Returns:
      A ``GradientTransformationExtraArgs`` with state ``OloraState``; its update needs
      ``params``, the adapters.

    Raises:
      TypeError: For arguments of the wrong type, or a factor that is not floating
        point.
      ValueError: For an argument out of range; at ``init`` if no leaf is a factor or
        one is a vector; at trace time without ``params``.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_cl
      >>> from optax_cl import lora
      >>> tx = optax.chain(lora.olora(0.5, capacity=3, penalty="fro"), optax.sgd(0.1))
      >>> first = {"kernel": lora.LoRA(a=jnp.eye(3)[:, :1], b=jnp.zeros((1, 2)))}
      >>> state = tx.init(first)
      >>> statistics = optax_cl.collect(  # it needs no data
      ...     state, first, [], task=optax_cl.Task(), key=jax.random.key(0))
      >>> state = optax_cl.end_task(state, first, statistics)
      >>> second = {"kernel": lora.LoRA(a=jnp.ones((3, 1)), b=jnp.zeros((1, 2)))}
      >>> print(lora.olora_loss(state, second))
      0.5
      >>> gradient = jax.tree.map(jnp.zeros_like, second)
      >>> updates, state = tx.update(gradient, state, second)
      >>> print(updates["kernel"].a[:, 0] + 0.0)  # only the old row is pushed back
      [-0.1  0.   0. ]

    References:
      Wang et al, `Orthogonal Subspace Learning for Language Model Continual Learning
      <https://arxiv.org/abs/2310.14152>`_, 2023

    Differs from the paper:
      1. Its text squares the entries (``"fro"``), its code takes their absolute values;
         the default is the code's.
      2. The code's second term, norms of the new factors (weight 0 by default there),
         is left to the user's loss.
      3. Only the input-side factors of past tasks are stored; their adapters may be
         merged.
    """
    checks.check_number("strength", strength, low=0.0, schedule=True)
    checks.check_choice("penalty", penalty, PENALTIES)
    rules = _make_rules(capacity, overflow, penalty)
    _check_pattern(factors)

    def init_fn(params):
        count = jnp.zeros([], jnp.int32)
        now = importance.value_at(strength, count)
        return OloraState(
            count=count,
            strength=jnp.array(now, jnp.float32, copy=True),
            tasks=jnp.zeros([], jnp.int32),
            rows=_empty_rows("olora", factors, params, rules),
            rules=rules,
        )

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        checks.check_params("olora", params)
        params = trees.align("params", params, updates)
        now = importance.value_at(strength, state.count)

        def add(u, rows, a):
            return (u + now * _pull(penalty, rows, a)).astype(u.dtype)

        updates = importance.map_updates(add, updates, state.rows, params)
        count = optax.safe_increment(state.count)
        later = importance.value_at(strength, count)
        strength_now = jnp.asarray(later, state.strength.dtype)
        return updates, state._replace(count=count, strength=strength_now)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def olora_loss(opt_state: optax.OptState, adapters: chex.ArrayTree) -> chex.Array:
    r"""The value of O-LoRA's penalty: what ``olora`` adds is its gradient.

    With the strength of the coming step, summed over all ``olora`` states. For logging;
    add it to the loss *or* chain ``olora`` before the moments, not both: the two are
    the same.

    Args:
      opt_state: Any optimizer state that holds an ``OloraState``, at any depth.
      adapters: The tree that the optimizer was made for.

    Returns:
      A float32 scalar (or wider), at least 0, differentiable in ``adapters``.

    Raises:
      ValueError: If there is no ``OloraState``.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_cl import lora
      >>> adapters = {"kernel": lora.LoRA(a=jnp.ones((4, 2)), b=jnp.zeros((2, 3)))}
      >>> print(lora.olora_loss(lora.olora(0.5, capacity=2).init(adapters), adapters))
      0.0
    """

    def value(state):
        def leaf(rows, a):
            overlap = linalg.coefficients(rows, a)
            size = jnp.abs(overlap) if state.rules.penalty == "l1" else overlap**2
            return jnp.sum(size)

        here = trees.align_structure("adapters", adapters, state.rows)
        parts = jax.tree.leaves(jax.tree.map(leaf, state.rows, here))
        return state.strength * sum(parts, start=jnp.zeros([], jnp.float32))

    values = [value(state) for state in _states(opt_state, OloraState, "olora")]
    return sum(values, start=jnp.zeros([], jnp.float32))


def olora_project(
    *, capacity: int, overflow: str = "error", factors: str = FACTORS
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps the update of an adapter orthogonal to the rows of past tasks.

    With Q an orthonormal basis of the span of all stored input-side factors
    :math:`a_j`,

    .. math:: u_a \leftarrow u_a - Q Q^T u_a.

    If the start is orthogonal, which :func:`project_start` makes it, then :math:`a^T Q
    = 0` at every step, and with :math:`\Delta W = a b` the layer's output is unchanged,
    to rounding, for every input in the span of old rows. Inputs of old tasks have
    components outside it, and those are not protected: rows say where an adapter reads,
    not where the data lie. (For a memory of the latter see :func:`frozen_a`.)

    ``end_task`` stores a copy of ``a`` and finds Q by an SVD of all rows, each scaled
    to unit length. Dependent rows make columns of Q zero, never noise. A basis that
    fills the space leaves nothing to learn: keep ``capacity * r`` below ``in``.

    **Placement.** ``post``: after the moments, weight decay (a multiple of ``a``, which
    is orthogonal itself) and either side of the learning rate; it is linear, so the
    sign does not matter. Before the moments Adam leaks: in the example below Adam's
    steps, after a projected gradient, hold 40 % of their length inside the span (43 %
    without any projection).

    **Precision.** With bfloat16 adapters each rounding of ``a`` itself leaves some
    overlap; keep adapters in float32.

    **Memory.** ``2 * capacity`` copies of every ``a`` in float32. **Work per step.**
    Two products of ``[in, K r]`` with ``[in, r]``. **Boundary.** One SVD of ``[in, K
    r]`` per factor.

    Args:
      capacity: Tasks that fit. A static size.
      overflow: With one task too many: ``"error"`` (raised by ``collect`` and
        ``end_task``, which then must run outside jit) or ``"oldest"`` (which is
        forgotten). ``optax_cl.grow`` makes room.
      factors: Regular expression, searched in a leaf's path: which leaves ``[*batch,
        in, r]`` are input-side factors.

    Returns:
      A ``GradientTransformationExtraArgs`` with state ``OloraProjectState``.

    Raises:
      TypeError, ValueError: As :func:`olora`.

    Example:
      How much of Adam's step lies inside the span of old rows?

      >>> import jax, jax.numpy as jnp, optax, optax_cl
      >>> from optax_cl import lora
      >>> def leak(*links):
      ...   tx = optax.chain(*links)
      ...   old = {"a": jax.random.normal(jax.random.key(0), (20, 4))}
      ...   state = tx.init(old)
      ...   statistics = optax_cl.collect(
      ...       state, old, [], task=optax_cl.Task(), key=jax.random.key(0))
      ...   state = optax_cl.end_task(state, old, statistics)
      ...   q = jnp.linalg.qr(old["a"])[0]
      ...   scale = jnp.logspace(-2, 0, 20)[:, None]  # inputs of very different size
      ...   def step(state, key):
      ...     gradient = {"a": scale * jax.random.normal(key, (20, 4))}
      ...     u = tx.update(gradient, state, old)
      ...     inside = jnp.linalg.norm(q.T @ u[0]["a"]) / jnp.linalg.norm(u[0]["a"])
      ...     return u[1], inside
      ...   keys = jax.random.split(jax.random.key(1), 200)
      ...   return f"{jax.lax.scan(step, state, keys)[1].mean():.0%}"
      >>> project = lora.olora_project(capacity=2)
      >>> leak(optax.scale_by_adam())
      '43%'
      >>> leak(project, optax.scale_by_adam())
      '40%'
      >>> leak(optax.scale_by_adam(), project)
      '0%'

    References:
      Wang et al, `Orthogonal Subspace Learning for Language Model Continual Learning
      <https://arxiv.org/abs/2310.14152>`_, 2023

    Differs from the paper:
      1. The paper penalises the overlap (:func:`olora`); this removes it.
    """
    rules = _make_rules(capacity, overflow, None)
    _check_pattern(factors)

    def init_fn(params):
        rows = _empty_rows("olora_project", factors, params, rules)
        return OloraProjectState(
            tasks=jnp.zeros([], jnp.int32),
            rows=rows,
            basis=jax.tree.map(lambda m: m[..., : m.shape[-2]], rows),
            rules=rules,
        )

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        return importance.map_updates(_project_out, updates, state.basis), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def project_start(
    adapters: chex.ArrayTree, opt_state: optax.OptState
) -> chex.ArrayTree:
    r"""Makes the start of a new adapter orthogonal to the rows of past tasks.

    :math:`a \leftarrow a - Q Q^T a`; lengths shrink by what is taken out. Call it on
    the fresh adapters of a task, after ``end_task``.

    Args:
      adapters: The tree that the optimizer was made for.
      opt_state: An optimizer state that holds an ``OloraProjectState``, at any depth.

    Returns:
      The adapters, same structure and dtypes.

    Raises:
      ValueError: If there is no ``OloraProjectState``; outside jit, if so many rows are
        stored that no r directions are left (inside jit what is left is returned, in
        the end zeros).

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_cl import lora
      >>> adapters = {"kernel": lora.LoRA(a=jnp.ones((4, 2)), b=jnp.zeros((2, 3)))}
      >>> state = lora.olora_project(capacity=2).init(adapters)
      >>> print(lora.project_start(adapters, state)["kernel"].a[0])  # nothing stored
      [1. 1.]
    """
    for state in _states(opt_state, OloraProjectState, "olora_project"):
        jax.tree_util.tree_map_with_path(
            _check_room_left,
            state.basis,
            trees.align_structure("adapters", adapters, state.basis),
        )
        # What is left of a column that lay mostly inside is relatively less exact:
        # the second pass brings it to rounding.
        for _ in range(2):
            adapters = importance.map_updates(_project_out, adapters, state.basis)
    return adapters


# --- One leaf ------------------------------------------------------------------------


def _pull(penalty: str, rows: chex.Array, a: chex.Array) -> chex.Array:
    """The gradient of ``sum |M^T a|`` or of ``sum (M^T a)^2`` in a."""
    overlap = linalg.coefficients(rows, a)
    return linalg.lift(rows, jnp.sign(overlap) if penalty == "l1" else 2 * overlap)


def _project_out(u: chex.Array, basis: chex.Array) -> chex.Array:
    inside = linalg.lift(basis, linalg.coefficients(basis, u))
    return (u - inside).astype(u.dtype)


def _orthonormal(rows: chex.Array) -> chex.Array:
    """An orthonormal basis of the columns, zero columns behind it; never NaN."""
    length = jnp.linalg.norm(rows, axis=-2, keepdims=True)
    # Unit columns: what counts as dependent must not hang on the tasks' sizes.
    unit = rows / jnp.where(length > 0, length, 1.0)
    vectors, singular, _ = jnp.linalg.svd(unit, full_matrices=False)
    floor = max(rows.shape[-2:]) * jnp.finfo(rows.dtype).eps
    keep = singular > floor * jnp.max(singular, axis=-1, keepdims=True)
    return vectors * keep[..., None, :]


def _stored(rows, a, tasks_stored, capacity):
    """``rows`` with a copy of ``a`` behind them, without the oldest if they are full.

    Entries that are not finite are stored as zero: they protect nothing.
    """
    r = rows.shape[-1] // capacity
    finite = jnp.where(jnp.isfinite(a), a, 0).astype(rows.dtype)
    room = jnp.where(tasks_stored >= capacity, jnp.roll(rows, -r, axis=-1), rows)
    start = r * jnp.minimum(tasks_stored, capacity - 1)
    return jax.lax.dynamic_update_slice_in_dim(room, finite, start, axis=-1)


def _check_room_left(path, basis, a):
    if isinstance(basis, jax.core.Tracer):
        return
    rank = np.max(np.sum(np.any(np.asarray(basis) != 0, axis=-2), axis=-1))
    *_, fan_in, r = jnp.shape(a)
    if fan_in - rank < r:
        raise ValueError(
            f"the rows of past tasks span {rank} of the {fan_in} inputs of "
            f"`{checks.path_str(path)}`: there are no {r} directions left that are "
            "orthogonal to them. Use a smaller rank, or `overflow='oldest'` with a "
            "smaller `capacity`."
        )


# --- The memory of rows --------------------------------------------------------------


def _make_rules(capacity: int, overflow: str, penalty: str | None) -> OloraRules:
    checks.check_positive_int("capacity", capacity)
    checks.check_choice("overflow", overflow, OVERFLOWS)
    return OloraRules(int(capacity), overflow, penalty)


def _check_pattern(factors: str) -> None:
    try:
        re.compile(factors)
    except (re.error, TypeError) as error:
        raise ValueError(
            f"`factors` must be a regular expression; got {factors!r} ({error})."
        ) from error


def _empty_rows(
    method: str, factors: str, params: chex.ArrayTree, rules: OloraRules
) -> Any:
    """Zeros ``[*batch, in, capacity * r]`` at factors; ``MaskedNode`` elsewhere."""
    paths = []
    matched = []

    def one(path, leaf):
        name = checks.path_str(path)
        paths.append(name)
        if not re.search(factors, name):
            return optax.MaskedNode()
        matched.append(name)
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"`{method}` takes `{name}` for the input-side factor of an adapter, "
                f"but it holds {jnp.result_type(leaf)}; expected floating point. Say "
                "which leaves are factors with `factors=`."
            )
        if jnp.ndim(leaf) < 2:
            raise ValueError(
                f"`{method}` takes `{name}` for the input-side factor of an adapter, "
                f"[*batch, in, r], but its shape is {jnp.shape(leaf)}. Say which "
                "leaves are factors with `factors=`."
            )
        width = rules.capacity * leaf.shape[-1]
        dtype = trees.importance_dtype(leaf.dtype)
        return jnp.zeros((*leaf.shape[:-1], width), dtype)

    rows = jax.tree_util.tree_map_with_path(one, params)
    if paths and not matched:
        shown = ", ".join(f"`{p}`" for p in paths[:6])
        raise ValueError(
            f"`factors={factors!r}` finds no input-side factor for `{method}` among "
            f"{shown}{', ...' if len(paths) > 6 else ''}. It acts on the `a` of "
            "`LoRA` adapters."
        )
    return rows


def _consolidate(state: Any, params: chex.ArrayTree) -> Any:
    params = trees.align_structure("params", params, state.rows)
    capacity = state.rules.capacity
    rows = jax.tree.map(
        lambda m, a: _stored(m, a, state.tasks, capacity), state.rows, params
    )
    return state._replace(tasks=jnp.minimum(state.tasks + 1, capacity), rows=rows)


def _with_basis(state: OloraProjectState) -> OloraProjectState:
    return state._replace(basis=jax.tree.map(_orthonormal, state.rows))


def _check_capacity(state: Any) -> None:
    capacity, overflow = state.rules.capacity, state.rules.overflow
    if overflow != "error":
        return
    if isinstance(state.tasks, jax.core.Tracer):
        raise ValueError(
            "`overflow='error'` cannot be checked inside a transformed function, where "
            "the number of stored tasks is not known. Call `end_task` outside `jit`, "
            "or build the method with `overflow='oldest'`."
        )
    if np.max(state.tasks) >= capacity:
        raise ValueError(
            f"the rows of {capacity} tasks are stored and no more fit (`capacity="
            f"{capacity}`). Make room with `optax_cl.grow(opt_state, capacity)`, or "
            "build the method with `overflow='oldest'`."
        )


def _grow(state: Any, capacity: int) -> Any:
    def widen(rows):
        r = rows.shape[-1] // state.rules.capacity
        padding = [(0, 0)] * (rows.ndim - 1) + [(0, capacity * r - rows.shape[-1])]
        return jnp.pad(rows, padding)

    rules = dataclasses.replace(state.rules, capacity=capacity)
    return state._replace(rows=jax.tree.map(widen, state.rows), rules=rules)


def _boundary(finish: Callable[[Any], Any]) -> tasks.Boundary:
    return tasks.Boundary(
        end_task=lambda state, params, results: finish(_consolidate(state, params)),
        like=lambda state: state.rows,
        usage=lambda state: (state.tasks, state.rules.capacity),
        check=_check_capacity,
        grow=lambda state, capacity: finish(_grow(state, capacity)),
    )


def _states(opt_state: optax.OptState, state_class: type, method: str) -> list[Any]:
    def wanted(node):
        return isinstance(node, state_class)

    found = [s for s in jax.tree.leaves(opt_state, is_leaf=wanted) if wanted(s)]
    if not found:
        raise ValueError(
            f"`opt_state` holds no {state_class.__name__}. Is `{method}` in the chain?"
        )
    return found


tasks.register_boundary(OloraState, _boundary(lambda state: state))
tasks.register_boundary(OloraProjectState, _boundary(_with_basis))
