"""O-LoRA by projection: never read where the adapters of past tasks read."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_cl._core import checks, decompositions, importance, linalg, tasks, trees
from optax_cl.lora import _checks, _factors, _rows


class OloraProjectState(NamedTuple):
    """State of :func:`olora_project`."""

    tasks: chex.Array  # int32 [], tasks stored
    rows: Any  # [*batch, in, capacity * r] at every `a`, at least float32; unused: zero
    basis: Any  # Q, [*batch, in, min(in, capacity * r)] likewise; unused: zero
    rules: Any  # RowRules, static


def olora_project(
    *, capacity: int, overflow: str = "error", factors: str = _factors.FACTORS
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

    **Precision.** In float32 the overlap stays near 1e-7 of the length of ``a``. In
    bfloat16 the rounding of ``a`` itself leaves about 5e-4; keep adapters in float32.

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
      TypeError, ValueError: As :func:`olora`; and in ``begin_task``, outside jit, for a
        new ``a`` that overlaps the rows of past tasks.

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
    rules = _rows.make_rules(capacity, overflow, None)
    checks.check_pattern("factors", factors)

    def init_fn(params):
        rows = _rows.empty("olora_project", factors, params, rules)
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
    for state in _rows.states(opt_state, OloraProjectState, "olora_project"):
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


def _project_out(u: chex.Array, basis: chex.Array) -> chex.Array:
    inside = linalg.lift(basis, linalg.coefficients(basis, u))
    return (u - inside).astype(u.dtype)


def _orthonormal(rows: chex.Array) -> chex.Array:
    """An orthonormal basis of the columns, zero columns behind it; never NaN."""
    length = jnp.linalg.norm(rows, axis=-2, keepdims=True)
    # Unit columns: what counts as dependent must not hang on the tasks' sizes.
    unit = rows / jnp.where(length > 0, length, 1.0)
    vectors, singular, _ = decompositions.svd(unit)
    floor = max(rows.shape[-2:]) * jnp.finfo(rows.dtype).eps
    keep = singular > floor * jnp.max(singular, axis=-1, keepdims=True)
    return vectors * keep[..., None, :]


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


def _with_basis(state: OloraProjectState) -> OloraProjectState:
    return state._replace(basis=jax.tree.map(_orthonormal, state.rows))


def _begin_task(state: OloraProjectState, params: Any) -> OloraProjectState:
    state = _rows.begin_task(state, params)

    def check(path, basis, rows, a):
        if _is_stored(rows, a):  # the adapter of the last task goes on
            return
        _checks.check_off(
            checks.path_str(path),
            a,
            basis,
            "the rows of past tasks",
            "Start with `lora.project_start(adapters, opt_state)`.",
        )

    params = trees.align_structure("params", params, state.basis)
    jax.tree_util.tree_map_with_path(check, state.basis, state.rows, params)
    return state


def _is_stored(rows: chex.Array, a: chex.Array) -> bool:
    """Whether ``a`` is, known to be, one of those in ``rows``."""
    if not (_checks.known(rows) and _checks.known(a)):
        return False
    y = np.asarray(a, rows.dtype)
    r = y.shape[-1]
    starts = range(0, rows.shape[-1], r)
    return any(np.array_equal(np.asarray(rows)[..., i : i + r], y) for i in starts)


tasks.register_boundary(
    OloraProjectState,
    _rows.boundary(_with_basis)._replace(begin_task=_begin_task),
)
