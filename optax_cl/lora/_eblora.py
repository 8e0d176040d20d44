"""EBLoRA: adapters of one magnitude and two orthonormal factors, kept so by retraction.

The optimizer wraps another one. Around its step stands the geometry: the gradient is
made tangent before, the step is made tangent and retracted after.
"""

import functools
import operator
from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from optax_cl._core import boundaries, checks, growth, trees
from optax_cl.lora import (
    _capacity,
    _drift,
    _eblora_state,
    _memory,
    _spectral,
    stiefel,
)
from optax_cl.lora._eblora_state import EbloraRules, EbloraState
from optax_cl.lora._targets import Targets


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
    both to rounding, which does not build up (below 1e-6 and 1e-7 after
    3000 steps of Adam at 256 x 8 beside 40 columns), if nothing comes after it.
    Hence for inputs x in the span of M the layer's output :math:`x^\top(W + c\,s\,V
    U^\top)` is *exactly* what it was, whatever the task, to rounding of the product.
    With s = 0 the gradients of U and V are zero: only s moves in the first step.

    **Placement.** Last, and alone: ``directions`` and ``magnitude`` are complete
    optimizers, learning rate and schedules included. Whatever changes the update after
    it leaves the manifold. Largest entry of :math:`|U^\top U - I|` after steps of
    Adam at rate 0.1 (in the last row 1; in the last column the mean of fifty steps),
    64 x 48, rank 8:

    =====================================================  ======  ======  ======
    behind it                                              1 step  10      251-300
    =====================================================  ======  ======  ======
    nothing, or ``weight_decay=`` of ``adamw`` inside      < 1e-6  < 1e-6  < 1e-6
    ``optax.scale(0.5)``                                   .09     .03     .002
    ``optax.add_decayed_weights(0.01)``                    .02     .02     .02
    ``optax.scale(-1e-2)``, no learning rate inside        .02     .19     3.1
    =====================================================  ======  ======  ======

    An update is a way to a point of the manifold, and back to it for parameters that
    are off. Behind a factor f, what they are off by is multiplied by 1 - f: a factor
    between 0 and 1 heals from step to step, a *negative one amplifies*. A learning
    rate therefore does not go behind. Where it was put there all the same, a factor U
    or V whose columns got twice too long is held where it is: its updates are zero. And
    as for any optimizer, without a learning rate inside or behind the loss goes up.

    ``drift`` in the state tells, from the second step on: the largest, since
    ``begin_task``, of :math:`|U^\top U - I|`, :math:`|V^\top V - I|` and
    :math:`|M^\top V|` in the parameters that a step was given (the last up to the
    length of the step; in place of the former, where there is a master copy, the
    squared distance of a column from that). The next boundary, outside jit, warns if it
    exceeds what rounding explains. ``MultiSteps``, ``apply_if_finite``, ``masked`` and
    ``partition`` belong
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
    if needed. **Work per step** and factor ``[d, r]``: seven products of ``d r^2``
    (two each for gradient, step and retraction, one for ``drift``) and, for V, six of
    ``d p r``. Factors of one shape are computed as one stack;
    what is a stack of 16 or more already goes by itself.

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
      transport: Whether first moments are projected on the new tangent space. Second
        moments rise where a step would else be longer than the longest.

    Returns:
      A ``GradientTransformationExtraArgs`` with state ``EbloraState``; its update needs
      ``params``, the adapters, and extra arguments reach both inner optimizers.

    Raises:
      ValueError: For arguments out of range; at ``init`` for an adapter that fits no
        target, has no room beside the memory, or (outside jit) is not orthonormal; in
        ``update`` for adapters of other shapes than the state was made for, or of lower
        precision, of which it has no master copies (in ``begin_task`` already where
        there are such copies or a memory); in ``begin_task``, outside jit, for a V that
        overlaps the memory.
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
    _capacity.check_targets(targets)
    checks.check_number("threshold", threshold, low=0.0, high=1.0)
    checks.check_number("step_multiplier", step_multiplier, low=0.0, open_low=True)
    checks.check_choice("statistic", statistic, _memory.STATISTICS)
    checks.check_choice("overflow", overflow, growth.OVERFLOWS)
    checks.check_choice("metric", metric, stiefel.METRICS)
    checks.check_choice("retraction", retraction, stiefel.RETRACTIONS)
    ranks = _capacity.hashable_ranks(memory_rank, targets)
    rules = EbloraRules(targets, ranks, statistic, overflow)
    inner = _inner(directions, magnitude)

    def init_fn(params):
        _spectral.check_fit(targets, params)
        _spectral.check_orthonormal(params)
        master = _spectral.map_roles(_master, params)
        return EbloraState(
            inner=inner.init(_points(params, master)),
            memory=_eblora_state.empty_memory(rules, params),
            master=master,
            drift=jnp.zeros([], jnp.float32),
            threshold=jnp.asarray(threshold, jnp.float32),
            tasks=jnp.zeros([], jnp.int32),
            rules=rules,
        )

    def update_fn(updates, state, params=None, **extra_args):
        checks.check_params("eblora", params)
        params = trees.align("params", params, updates)
        trees.check_fits("params", params, state.master, shapes=False)
        _eblora_state.check_leaves(rules, params, state.master)
        bases = None if state.memory is None else state.memory.basis
        points = _points(params, state.master)
        factors = _spectral.factors_of(updates, points, bases)

        tangent = functools.partial(stiefel.tangent_project, metric=metric)
        gradient = functools.partial(stiefel.riemannian_gradient, metric=metric)
        rho = _spectral.on_factors(gradient, factors, _widened(updates))
        raw = extra_args.get("raw_updates")
        if raw is not None:
            raw = trees.align("raw_updates", raw, updates)
            same = all(
                map(operator.is_, jax.tree.leaves(raw), jax.tree.leaves(updates))
            )
            # A capture inside knows its own updates by identity.
            extra_args["raw_updates"] = (
                rho if same else _spectral.on_factors(gradient, factors, _widened(raw))
            )

        steps, inner_state = inner.update(rho, state.inner, points, **extra_args)

        def move(x, step, memory):
            xi = tangent(x, step_multiplier * step, memory=memory)
            moved = stiefel.retract(x, xi, method=retraction, memory=memory)
            return moved - x, _drift.overlap(x + xi, memory)

        deltas, overlaps = _spectral.on_factors(move, factors, steps, has_aux=True)
        seen = _drift.look(factors, params, state.master)
        drift = functools.reduce(jnp.fmax, [state.drift, seen.drift, *overlaps])
        if transport:
            new_points = jax.tree.map(jnp.add, points, deltas)
            moved = _spectral.factors_of(updates, new_points, bases)
            carry = functools.partial(_spectral.on_factors, stiefel.transport, moved)
            inner_state = boundaries.project_moments(carry, inner_state)
        updates, master = _emit(deltas, params, points, state.master)
        updates = jax.tree.map(_hold, updates, seen.held)
        return updates, state._replace(
            inner=inner_state,
            master=master,
            drift=drift,
            threshold=jnp.asarray(threshold, jnp.float32),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_transformation(name, value):
    if not isinstance(value, optax.GradientTransformation):
        raise TypeError(
            f"`{name}` must be an optax.GradientTransformation, a whole optimizer; got "
            f"{value!r} of type {type(value).__name__}. Was the function that makes it "
            "not called?"
        )


def _master(role: _spectral.Role, p: Any) -> Any:
    if role.field is None or p.dtype.itemsize >= 4:
        return optax.MaskedNode()
    return p.astype(jnp.float32)


def _inner(directions, magnitude):
    if magnitude is None:
        return optax.with_extra_args_support(directions)

    def labels(tree):
        return _spectral.map_roles(
            lambda role, _: "magnitude" if role.field == "s" else "directions", tree
        )

    return optax.partition({"directions": directions, "magnitude": magnitude}, labels)


def _points(params, master):
    """The parameters, as precisely as they are known."""
    return jax.tree.map(lambda p, m: p if trees.is_masked(m) else m, params, master)


def _widened(updates):
    def one(role, g):
        if role.field is None:
            return g
        return g.astype(jnp.promote_types(g.dtype, jnp.float32))

    return _spectral.map_roles(one, updates)


def _hold(update: Any, held: Any) -> Any:
    return update if held is False else jnp.where(held[..., None, None], 0, update)


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
    return _spectral.map_roles(update, deltas, params, master), master
