"""EBLoRA: adapters of one magnitude and two orthonormal factors, kept so by retraction.

The optimizer wraps another one. Around its step stands the geometry: the gradient is
made tangent before, the step is made tangent and retracted after.
"""

import dataclasses
import functools
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_cl._core import boundaries, checks, tasks, trees
from optax_cl.lora import _memory, stiefel
from optax_cl.lora._adapters import Spectral, Targets

# Squared distance per column that rounding may explain: 4e-6 in bfloat16, less above.
_DRIFT = 1e-4


class EbloraState(NamedTuple):
    """State of :func:`eblora`. Trees are like the adapters, with holes."""

    inner: optax.OptState  # of `directions` and `magnitude`
    memory: Any  # GradientMemory at every `v`; None without a memory
    master: Any  # float32 copies of s, u, v of lower precision; else MaskedNode
    drift: chex.Array  # float32 [], see `eblora`, of the last update
    threshold: chex.Array  # float32 [], share of energy that the memory reaches
    tasks: chex.Array  # int32 [], boundaries so far
    rules: Any  # EbloraRules, static


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class EbloraRules:
    """What a boundary must know; part of the state's structure, without leaves."""

    targets: Targets
    memory_rank: Any  # int, tuple of (path, int), or None
    statistic: str
    overflow: str


@dataclasses.dataclass(frozen=True)
class _Role:
    """What a leaf is: a field of the adapter of some kernel, or neither."""

    path: str | None
    field: str | None


def eblora(
    directions: optax.GradientTransformation,
    magnitude: optax.GradientTransformation | None = None,
    *,
    targets: Targets,
    memory_rank: int | Mapping[str, int] | None,
    threshold: chex.Numeric = 0.99,
    statistic: str = "mean",
    overflow: str = "strongest",
    metric: str = "euclidean",
    retraction: str = "newton_schulz",
    step_multiplier: chex.Numeric = 1.0,
    transport: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Trains adapters of equal singular values, off the gradient space of past tasks.

    Every adapted kernel is used as :math:`W + c\, s\, V U^\top` (a ``Spectral``
    adapter) with orthonormal columns in U and V: all singular values of the update are
    :math:`|c\,s|`, so that no few of them dominate, disturb what was learned, and are
    overwritten first. V stands on the fan-in side and stays off the memory M of past
    tasks' gradients. One step, for X one of U and V (M only for V):

    .. math::

        \rho = \operatorname{grad}_X(g), \qquad
        \xi = P_X(\kappa \cdot \mathrm{directions}(\rho)), \qquad
        X \leftarrow \operatorname{retract}_X(\xi)

    with the maps of :mod:`optax_cl.lora.stiefel`. The magnitude s goes through its own
    optimizer. Leaves that belong to no ``Spectral`` adapter (``LoRA``, a trained head)
    go through ``directions`` and are no concern of the geometry. ``s`` may also hold
    one magnitude per column, ``[*batch, r]``; then the columns are balanced by nothing
    but their start.

    **What holds.** After every step U and V are orthonormal and V is orthogonal to M,
    both to rounding, which does not build up (4e-6 and 4e-7 after 3000 steps of Adam).
    Hence for inputs x in the span of M the layer's output :math:`x^\top(W + c\,s\,V
    U^\top)` is *exactly* what it was, whatever the task, to rounding of the product.
    With s = 0 the gradients of U and V are zero: only s moves in the first step.

    **Placement.** Last, and alone: ``directions`` and ``magnitude`` are complete
    optimizers, learning rate and schedules included. Whatever changes the update after
    it leaves the manifold. Largest entry of :math:`|U^\top U - I|` after one step of
    Adam at rate 0.1, 128 x 8:

    ====================================================  =======
    nothing after it                                      9e-7
    ``optax.scale(0.5)`` after it                         .14
    ``optax.clip_by_global_norm(1.0)`` after it           .14
    ``optax.add_decayed_weights(0.01)`` after it          .02
    ``optax.adamw(..., weight_decay=0.1)`` inside         9e-7
    ====================================================  =======

    The next step retracts such parameters, so damage does not build up, but every loss
    and every merge sees it. ``drift`` in the state tells: the largest squared distance
    per column, at the last update, of the parameters from the manifold (of those with
    a master copy, from that copy). The next boundary warns if it exceeds what rounding
    explains. ``MultiSteps``, ``apply_if_finite``, ``masked`` and ``partition`` belong
    outside, schedules and ``inject_hyperparams`` inside. Modifiers of the gradient (an
    A-GEM, a clip) stand in front, or first in ``directions``, where they see tangent
    vectors. Weight decay on U and V has no effect; on s it has, so leave it out of
    ``magnitude``. ``raw_updates`` bound outside are made tangent like the updates.

    **Boundaries.** ``collect(opt_state, adapters, batches, task=task, frozen=params,
    key=key)`` takes the gradient with respect to the frozen kernels at the adapted
    weights; ``end_task`` adds to M what it misses of them (``grow_memory``). Then merge
    (``lora.merge``), start new adapters off the new memory (``eblora_init`` with
    ``memory=lora.memory(opt_state)``), and call ``begin_task(opt_state, adapters)``:
    it renews the master copies, without which the next step would go on from the old
    factors. Moments belong to the old factors; ``optax_cl.reset_state`` clears them.
    ``end_task(moments="project")`` takes the new memory out of those of V.

    **Precision.** Geometry is computed in float32. Adapters of lower precision get
    float32 masters in the state, and moments in float32; the emitted update is what
    brings the parameters to the rounded master. Without one, small steps vanish in
    rounding.

    **Memory.** The states of the inner optimizers; M, ``[in, p]`` per kernel; masters
    if needed. **Work per step** and factor ``[d, r]``: about four products of ``d r^2``
    and, for V, six of ``d p r``. Factors of one shape are computed as one stack.

    Args:
      directions: Optimizer of U, V and all other leaves, learning rate included.
      magnitude: Optimizer of s; None lets ``directions`` do it, its weight decay
        included.
      targets: The adapted kernels, from ``lora.targets``.
      memory_rank: Columns of M: one number, or one for each path; None for no memory.
        At most the fan-in less the adapter's rank is used, since V needs room.
      threshold: Share of a task's gradient energy, in [0, 1], that M is to hold; 0 adds
        nothing. May be a tracer.
      statistic: ``"mean"``: the gradient of the mean loss, as published. ``"batches"``:
        the gradients of all batches, which is safer near an optimum, where the mean
        gradient is little but noise.
      overflow: When a task's directions do not fit: ``"strongest"`` keeps the strongest
        of them; ``"error"`` makes ``end_task``, outside jit, raise.
      metric: ``"euclidean"`` or ``"canonical"``, for the gradient *and* for the map
        of the step; the canonical map doubles rotations inside the span.
      retraction: ``"newton_schulz"``, ``"polar"``, ``"qr"`` or ``"cayley"``. The first
        two are one map computed in two ways.
      step_multiplier: Kappa, on steps of U and V; may be a tracer.
      transport: Whether first moments are projected on the new tangent space.

    Returns:
      A ``GradientTransformationExtraArgs`` with state ``EbloraState``; its update needs
      ``params``, the adapters, and extra arguments reach both inner optimizers.

    Raises:
      ValueError: For arguments out of range; at ``init`` for an adapter that fits no
        target, has no room beside the memory, or (outside jit) is not orthonormal; in
        ``begin_task``, outside jit, for the last, or for a V that overlaps the memory.
      TypeError: For arguments of a wrong type.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_cl
      >>> from optax_cl import lora
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (6, 4))}
      >>> chosen = lora.targets(params, {"kernel": 2}, alpha=2.0)
      >>> def losses(adapters_and_params, batch):
      ...   merged = lora.merge(chosen, *adapters_and_params[::-1])
      ...   return jnp.sum((batch["x"] @ merged["kernel"] - batch["y"]) ** 2, axis=-1)
      >>> task = optax_cl.Task(loss=losses)
      >>> batch = {"x": jnp.eye(6)[:2], "y": jnp.ones((2, 4))}
      >>> key = jax.random.key(0)
      >>> tx = lora.eblora(
      ...     optax.adam(0.1), optax.adam(0.01), targets=chosen, memory_rank=3)
      >>> gradients = {"kernel": jnp.ones((6, 4))}
      >>> adapters = lora.eblora_init(chosen, gradients)
      >>> state = tx.init(adapters)
      >>> stats = optax_cl.collect(
      ...     state, adapters, [batch], task=task, frozen=params, key=key)
      >>> state = optax_cl.end_task(state, adapters, stats)
      >>> adapters = lora.eblora_init(chosen, gradients, lora.memory(state))
      >>> state = optax_cl.begin_task(state, adapters)
      >>> loss = lambda adapters: losses((adapters, params), batch).sum()
      >>> updates, state = tx.update(jax.grad(loss)(adapters), state, adapters)
      >>> adapters = optax.apply_updates(adapters, updates)
      >>> change = batch["x"] @ lora.product(adapters["kernel"])
      >>> print(bool(jnp.abs(change).max() < 1e-7))  # the first task's inputs
      True

    References:
      `Spectral Imbalance Causes Forgetting in Low-Rank Continual Adaptation
      <https://arxiv.org/abs/2602.00722>`_, 2026

      Li et al, `StelLA: Subspace Learning in Low-rank Adaptation using Stiefel Manifold
      <https://arxiv.org/abs/2510.01938>`_, 2025 (the geometry, for one task)

      Saha et al, `Gradient Projection Memory <https://arxiv.org/abs/2103.09762>`_, 2021

    Differs from the released code:
      1. It maps steps by the formula of the canonical metric: ``metric="canonical"``.
      2. It multiplies steps of U and V by ``sqrt(4096 / r)`` (16 at rank 16), probably
         from a slip in an index: ``step_multiplier=``.
      3. It takes gradients, for the start and for the memory, at the weights before the
         first task: give those to ``frozen=``, with adapters of magnitude zero.
      4. It decays s: ``magnitude=None`` with a decay in ``directions``.
      5. ``"batches"``, a capacity of the memory, magnitudes with a learning rate of
         their own, and inner optimizers other than AdamW are additions.
    """
    _check_transformation("directions", directions)
    if magnitude is not None:
        _check_transformation("magnitude", magnitude)
    if not isinstance(targets, Targets):
        raise TypeError(
            "`targets` must be made by `lora.targets(params, ranks, alpha=...)`; got "
            f"{type(targets).__name__}."
        )
    checks.check_number("threshold", threshold, low=0.0, high=1.0)
    checks.check_number("step_multiplier", step_multiplier, low=0.0, open_low=True)
    checks.check_choice("statistic", statistic, _memory.STATISTICS)
    checks.check_choice("overflow", overflow, _memory.OVERFLOWS)
    checks.check_choice("metric", metric, stiefel.METRICS)
    checks.check_choice("retraction", retraction, stiefel.RETRACTIONS)
    rules = EbloraRules(targets, _ranks(memory_rank, targets), statistic, overflow)
    inner = _inner(directions, magnitude)

    def init_fn(params):
        _check_fit(rules, params)
        _check_orthonormal(params)
        master = _map_roles(_master, params)
        return EbloraState(
            inner=inner.init(_points(params, master)),
            memory=None if memory_rank is None else _empty_memory(rules, params),
            master=master,
            drift=jnp.zeros([], jnp.float32),
            threshold=jnp.asarray(threshold, jnp.float32),
            tasks=jnp.zeros([], jnp.int32),
            rules=rules,
        )

    def update_fn(updates, state, params=None, **extra_args):
        checks.check_params("eblora", params)
        bases = None if state.memory is None else state.memory.basis
        points = _points(params, state.master)
        factors = _factors(updates, points, bases)

        tangent = functools.partial(stiefel.tangent_project, metric=metric)
        gradient = functools.partial(stiefel.riemannian_gradient, metric=metric)
        rho = _on_factors(gradient, factors, _widened(updates))
        raw = extra_args.get("raw_updates")
        if raw is not None:
            raw = trees.align("raw_updates", raw, updates)
            same = all(
                map(operator.is_, jax.tree.leaves(raw), jax.tree.leaves(updates))
            )
            # A capture inside knows its own updates by identity.
            extra_args["raw_updates"] = (
                rho if same else _on_factors(gradient, factors, _widened(raw))
            )

        steps, inner_state = inner.update(rho, state.inner, points, **extra_args)

        def move(x, step, memory):
            xi = tangent(x, step_multiplier * step, memory=memory)
            return stiefel.retract(x, xi, method=retraction, memory=memory) - x

        deltas = _on_factors(move, factors, steps)
        drift = _drift(factors, params, state.master)
        if transport:
            moved = _factors(updates, optax.apply_updates(points, deltas), bases)
            carry = functools.partial(_on_factors, stiefel.transport, moved)
            inner_state = boundaries.map_moments(carry, inner_state, first_only=True)
        updates, master = _emit(deltas, params, points, state.master)
        return updates, state._replace(
            inner=inner_state,
            master=master,
            drift=drift,
            threshold=jnp.asarray(threshold, jnp.float32),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


# --- Arguments and starts ------------------------------------------------------------


def _check_transformation(name, value):
    if not isinstance(value, optax.GradientTransformation):
        raise TypeError(
            f"`{name}` must be an optax.GradientTransformation, a whole optimizer; got "
            f"{value!r} of type {type(value).__name__}. Was the function that makes it "
            "not called?"
        )


def _ranks(memory_rank, targets):
    """Hashable, and checked."""
    if not isinstance(memory_rank, Mapping):
        if memory_rank is not None:
            checks.check_positive_int("memory_rank", memory_rank)
        return memory_rank
    if set(memory_rank) != set(targets):
        raise ValueError(
            "`memory_rank` must be one number or have one for each path of `targets`, "
            f"{sorted(targets)}; got {sorted(memory_rank)}."
        )
    for path, rank in memory_rank.items():
        checks.check_positive_int(f"memory_rank[{path!r}]", rank)
    return tuple(sorted(memory_rank.items()))


def _capacity(rules: EbloraRules, path: str) -> int:
    rank = rules.memory_rank
    wanted = rank if isinstance(rank, int) else dict(rank)[path]
    return min(wanted, _room(rules, path))


def _room(rules: EbloraRules, path: str) -> int:
    """Columns that a memory may have, so that V keeps a place beside it."""
    target = rules.targets[path]
    return target.matrix_shape[-2] - target.rank


def _spectral(tree: Any) -> Iterator[tuple[str, Spectral]]:
    for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_spectral):
        if _is_spectral(node):
            yield _kernel_path(path), node


def _is_spectral(node):
    return isinstance(node, Spectral)


def _kernel_path(path):
    key = getattr(path[-1], "key", None) if path else None
    if not isinstance(key, str):
        raise ValueError(
            "a `Spectral` adapter must stand in a dictionary under the path of its "
            f"kernel; found one at `{checks.path_str(path)}`."
        )
    return key


def _check_fit(rules: EbloraRules, params: Any) -> None:
    for path, adapter in _spectral(params):
        if path not in rules.targets:
            raise ValueError(
                f"`params` has a `Spectral` adapter at `{path}`, which is none of "
                f"`targets`, {sorted(rules.targets)}."
            )
        target = rules.targets[path]
        *batch, fan_in, fan_out = target.matrix_shape
        expected = {
            "s": ((*batch,), (*batch, target.rank)),
            "u": ((*batch, fan_out, target.rank),),
            "v": ((*batch, fan_in, target.rank),),
        }
        for field, leaf in adapter._asdict().items():
            if trees.is_hole(leaf):
                continue
            if jnp.shape(leaf) not in expected[field]:
                raise ValueError(
                    f"`{path}/{field}` must have shape "
                    f"{' or '.join(map(str, expected[field]))} for its target; got "
                    f"{jnp.shape(leaf)}."
                )
            if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
                raise TypeError(
                    f"`{path}/{field}` must be real and floating; got dtype "
                    f"{jnp.result_type(leaf)}."
                )
        if rules.memory_rank is not None and _room(rules, path) < 1:
            raise ValueError(
                f"the adapter at `{path}` has rank {target.rank} and fan-in {fan_in}: "
                "there is no room for a memory beside it. Lower the rank, or pass "
                "`memory_rank=None`."
            )


def _known(x: Any) -> bool:
    """Whether the values of an array can be judged here and now."""
    if isinstance(x, jax.core.Tracer):
        return False
    return isinstance(x, np.ndarray) or (
        isinstance(x, jax.Array) and x.is_fully_addressable
    )


def _wide(x: Any) -> np.ndarray:
    return np.asarray(x).astype(np.promote_types(x.dtype, np.float32))


def _check_orthonormal(params: Any) -> None:
    for path, adapter in _spectral(params):
        for field in ("u", "v"):
            x = getattr(adapter, field)
            if not _known(x):
                continue
            wide = _wide(x)
            error = np.abs(
                np.swapaxes(wide, -1, -2) @ wide - np.eye(x.shape[-1], dtype=np.float32)
            ).max(initial=0.0)
            if not error < _tolerance(x):
                raise ValueError(
                    f"`{path}/{field}` must have orthonormal columns; the largest "
                    f"entry of |X^T X - I| is {error:.2g}. Start from "
                    "`lora.eblora_init`, or apply `lora.stiefel.polar`."
                )


def _check_off_memory(state: EbloraState, params: Any) -> None:
    aligned = trees.align_structure("params", params, state.memory.basis)
    pairs = zip(_spectral(aligned), _spectral(state.memory.basis), strict=True)
    for (path, adapter), (_, memory) in pairs:
        v, basis = adapter.v, memory.v
        if trees.is_hole(basis) or not (_known(v) and _known(basis)):
            continue
        overlap = np.abs(np.swapaxes(_wide(basis), -1, -2) @ _wide(v)).max(initial=0.0)
        if not overlap < _tolerance(v):
            raise ValueError(
                f"`{path}/v` must be orthogonal to the memory of past tasks; the "
                f"largest entry of |M^T v| is {overlap:.2g}. Merge the old adapters "
                "and start new ones with `lora.eblora_init(targets, gradients, "
                "lora.memory(opt_state))`."
            )


def _tolerance(x: Any) -> float:
    return 1e-3 if x.dtype.itemsize >= 4 else 1e-2


def _empty_memory(rules: EbloraRules, params: Any) -> _memory.GradientMemory:
    def at_v(make):
        return _map_roles(
            lambda role, p: make(role, p) if role.field == "v" else optax.MaskedNode(),
            params,
        )

    return _memory.GradientMemory(
        basis=at_v(
            lambda role, v: jnp.zeros(
                (*v.shape[:-1], _capacity(rules, role.path)), jnp.float32
            )
        ),
        count=at_v(lambda role, v: jnp.zeros(v.shape[:-2], jnp.int32)),
    )


def _master(role: _Role, p: Any) -> Any:
    if role.field is None or p.dtype.itemsize >= 4:
        return optax.MaskedNode()
    return p.astype(jnp.float32)


def _inner(directions, magnitude):
    if magnitude is None:
        return optax.with_extra_args_support(directions)

    def labels(tree):
        return _map_roles(
            lambda role, _: "magnitude" if role.field == "s" else "directions", tree
        )

    return optax.partition({"directions": directions, "magnitude": magnitude}, labels)


# --- One step ------------------------------------------------------------------------


def _roles(tree: Any) -> Any:
    """A tree like ``tree`` with a ``_Role`` for every leaf."""

    def visit(path, node):
        if not _is_spectral(node):
            return _Role(None, None)
        name = _kernel_path(path)
        return Spectral(
            *(
                jax.tree.map(lambda _, f=field: _Role(name, f), leaf)
                for field, leaf in node._asdict().items()
            )
        )

    return jax.tree_util.tree_map_with_path(visit, tree, is_leaf=_is_spectral)


def _map_roles(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    return jax.tree.map(function, _roles(tree), tree, *rest)


def _points(params, master):
    """The parameters, as precisely as they are known."""
    return jax.tree.map(lambda p, m: p if trees.is_masked(m) else m, params, master)


def _widened(updates):
    def one(role, g):
        if role.field is None:
            return g
        return g.astype(jnp.promote_types(g.dtype, jnp.float32))

    return _map_roles(one, updates)


class _Factors(NamedTuple):
    """The leaves of a tree, and which of them are factors of one kind."""

    structure: Any
    points: list[Any]
    memories: list[Any]
    groups: list[list[int]]  # equal shapes and dtypes, and equal shapes of memories


def _factors(updates, points, bases) -> _Factors:
    structure = jax.tree.structure(updates)
    roles = structure.flatten_up_to(_roles(updates))
    leaves = structure.flatten_up_to(points)
    memories: list[Any] = [None] * len(leaves)
    if bases is not None:
        memories = structure.flatten_up_to(bases)
        memories = [None if trees.is_masked(m) else m for m in memories]
    groups: dict[Any, list[int]] = {}
    for i, (role, x, m) in enumerate(zip(roles, leaves, memories, strict=True)):
        if role.field in ("u", "v"):
            kind = (x.shape, x.dtype, None if m is None else m.shape)
            groups.setdefault(kind, []).append(i)
    return _Factors(structure, leaves, memories, list(groups.values()))


def _on_factors(function: Callable[..., Any], factors: _Factors, tree: Any) -> Any:
    """``function(x, z, memory=M)`` at the factors in ``tree``; the rest as it is.

    Factors of one shape are stacked: one program for all layers, however many.
    """
    leaves = factors.structure.flatten_up_to(tree)
    for group in factors.groups:
        present = [i for i in group if not trees.is_hole(leaves[i])]
        if not present:
            continue
        x = jnp.stack([factors.points[i] for i in present])
        z = jnp.stack([leaves[i] for i in present])
        memory = None
        if factors.memories[present[0]] is not None:
            memory = jnp.stack([factors.memories[i] for i in present])
        for i, result in zip(present, function(x, z, memory=memory), strict=True):
            leaves[i] = result
    return factors.structure.unflatten(leaves)


def _drift(factors: _Factors, params: Any, master: Any) -> chex.Array:
    """How far the parameters are from where the last update left them.

    Off the manifold by anything that shortens or mixes steps, columns are too short:
    their lengths tell, at a fraction of the price of a Gram matrix.
    """
    params = factors.structure.flatten_up_to(params)
    masters = factors.structure.flatten_up_to(master)
    largest = jnp.zeros([], jnp.float32)
    for group in factors.groups:
        p = jnp.stack([params[i] for i in group]).astype(jnp.float32)
        if trees.is_masked(masters[group[0]]):
            off = jnp.abs(jnp.mean(jnp.sum(p**2, axis=-2), axis=-1) - 1)
        else:
            copies = jnp.stack([masters[i] for i in group])
            off = jnp.mean(jnp.sum((p - copies) ** 2, axis=-2), axis=-1)
        largest = jnp.maximum(largest, jnp.max(off))
    return largest


def _emit(deltas, params, points, master):
    """Updates in the dtype of the parameters, and the new master copies."""

    def new_master(m, x, d):
        return m if trees.is_masked(m) else x + d

    def update(role, d, p, m):
        if role.field is None:
            return d
        if trees.is_masked(m):
            return d.astype(p.dtype)
        return (m.astype(p.dtype).astype(m.dtype) - p.astype(m.dtype)).astype(p.dtype)

    master = jax.tree.map(new_master, master, points, deltas, is_leaf=trees.is_masked)
    return _map_roles(update, deltas, params, master), master


# --- Boundaries ----------------------------------------------------------------------


def _passes(state: EbloraState) -> tuple[tasks.Pass, ...]:
    if state.memory is None:
        return ()
    return (_memory.memory_pass(state.rules.targets, state.rules.statistic),)


def _end_task(state: EbloraState, params: Any, results: dict[str, Any]) -> EbloraState:
    del params
    state = state._replace(tasks=state.tasks + 1)
    if state.memory is None:
        return state
    (gradients,) = results.values()
    basis, count = state.memory
    if state.rules.overflow == "error":
        _map_roles(
            lambda role, m, n: _check_room(
                role.path, m, n, gradients[role.path], state.threshold
            ),
            basis,
            count,
        )
    grown = _map_roles(
        lambda role, m, n: _memory.grow_memory(
            m, n, gradients[role.path], state.threshold
        ),
        basis,
        count,
    )
    pick = lambda i: jax.tree.map(lambda _, pair: pair[i], basis, grown)  # noqa: E731
    return state._replace(memory=_memory.GradientMemory(pick(0), pick(1)))


def _check_room(path, memory, count, gradient, threshold):
    missing = _memory.missing_columns(memory, gradient, threshold)
    if np.any(np.asarray(count + missing) > memory.shape[-1]):
        raise ValueError(
            f"the memory of `{path}` has {memory.shape[-1]} columns, of which "
            f"{np.max(count)} are in use, and the task needs {np.max(missing)} more "
            "(`overflow='error'`). Enlarge the state with `optax_cl.grow(opt_state, "
            "capacity)`, lower `threshold`, or build it with `overflow='strongest'`."
        )


def _begin_task(state: EbloraState, params: Any) -> EbloraState:
    if state.memory is not None:
        like = trees.align_structure("params", params, state.memory.basis)
        _check_orthonormal(like)
        _check_off_memory(state, params)
    seen = trees.align_structure("params", params, state.master)
    master = jax.tree.map(lambda m, p: p.astype(m.dtype), state.master, seen)
    return state._replace(master=master, drift=jnp.zeros_like(state.drift))


def _check(state: EbloraState) -> None:
    known = not isinstance(state.drift, jax.core.Tracer)
    if not known and state.memory is not None and state.rules.overflow == "error":
        raise ValueError(
            "`overflow='error'` cannot be checked inside a transformed function. Call "
            "`end_task` outside `jit`, or build `eblora` with `overflow='strongest'`."
        )
    if known and np.max(state.drift) > _DRIFT:
        warnings.warn(
            "`eblora` found its factors elsewhere than where it had left them (squared "
            f"distance per column {np.max(state.drift):.2g}): they were off the "
            "manifold when the loss saw them. Put whatever changes updates after it "
            "inside `directions`, and call `begin_task` after changing adapters.",
            UserWarning,
            stacklevel=4,
        )


def _usage(state: EbloraState) -> tuple[Any, int | None]:
    """Columns, not tasks, of the memory with the least room."""
    if state.memory is None:
        return None, None
    pairs = zip(
        jax.tree.leaves(state.memory.count),
        jax.tree.leaves(state.memory.basis),
        strict=True,
    )
    rows = [(int(np.max(n)), m.shape[-1]) for n, m in pairs]
    return min(rows, key=lambda row: row[1] - row[0], default=(0, 0))


def _grow(state: EbloraState, capacity: int) -> EbloraState:
    if state.memory is None:
        return state

    def pad(role, m):
        width = max(m.shape[-1], min(capacity, _room(state.rules, role.path)))
        return jnp.pad(m, [(0, 0)] * (m.ndim - 1) + [(0, width - m.shape[-1])])

    basis = _map_roles(pad, state.memory.basis)
    return state._replace(memory=state.memory._replace(basis=basis))


def _project(state: EbloraState, tree: chex.ArrayTree) -> chex.ArrayTree:
    if state.memory is None:
        return tree
    bases = trees.align_structure("basis", state.memory.basis, tree)

    def one(z, m):
        return z if trees.is_hole(m) else _memory.off_memory(z, m).astype(z.dtype)

    return jax.tree.map(one, tree, bases)


tasks.register_boundary(
    EbloraState,
    tasks.Boundary(
        passes=_passes,
        end_task=_end_task,
        begin_task=_begin_task,
        usage=_usage,
        check=_check,
        grow=_grow,
        project=_project,
    ),
)
