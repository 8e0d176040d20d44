r"""Frozen input sides: train ``b`` alone, reading where past tasks are not.

With :math:`\Delta W = a b` and ``a`` fixed, what an adapter can read of an input x is
:math:`a^\top x`, for ever. Put ``a`` where that is zero for past tasks, and nothing
that ``b`` learns reaches them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optax_cl._core import checks, growth, tasks, trees
from optax_cl.lora import _capacity, _checks, _factors, _inputs, _memory
from optax_cl.lora._adapters import LoRA, is_adapter
from optax_cl.lora._targets import Targets

STATISTICS = (*_memory.STATISTICS, "inputs")


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class FrozenARules:
    """How the memory grows. A static node: it holds no arrays."""

    targets: Targets
    statistic: str
    overflow: str


class FrozenAState(NamedTuple):
    """State of :func:`frozen_a`."""

    tasks: chex.Array  # int32 [], boundaries so far
    threshold: chex.Array  # float32 [], share of energy that the memory reaches
    memory: Any  # GradientMemory at every targeted `a`; None without a memory
    rules: Any  # FrozenARules, static; None without a memory


def frozen_a(
    *,
    targets: Targets | None = None,
    memory_rank: int | Mapping[str, int] | None = None,
    threshold: chex.Numeric = 0.99,
    statistic: str = "mean",
    overflow: str = "strongest",
    factors: str = _factors.FACTORS,
) -> optax.GradientTransformationExtraArgs:
    r"""Holds ``a`` fixed, and remembers where past tasks' gradients or inputs lie.

    The updates of input-side factors become zero; all others pass. With a memory, a
    basis M ``[in, p]`` per kernel grows at each boundary by the GPM rule, and
    :func:`frozen_a_init` starts the next ``a`` off it: :math:`M^\top a = 0`. As ``a``
    stays, the layer's output is *exactly* unchanged, to rounding of one product, for
    every input in the span of M, whatever ``b`` becomes.

    **Which inputs are those?** It depends on what the memory is made of:

    ``"mean"``
      The gradient of the mean loss, :math:`G = \frac1N \sum_i x_i \delta_i^\top` (as
      KeepLoRA). Its columns are mixtures of inputs, so M lies in their span, but it
      has at most ``out`` columns a task: where inputs span more than ``out``
      dimensions (a layer before a few classes, always), single old inputs are *not*
      protected, only the mixtures that the loss would have moved.
    ``"batches"``
      All batches' gradients: up to ``out`` columns a batch. With the threshold at 1
      and enough of them, all inputs that have a gradient.
    ``"inputs"``
      The inputs themselves (as InfLoRA and GPM). With the threshold at 1 and room for
      them, M spans all inputs that ``collect`` saw, and each of them is protected, but
      for what holds less than about 1e-6 of their energy: that is lost in the rounding
      of their second moment. Needs ``Task.layer_inputs``.

    Below 1, the threshold leaves that share of energy outside. And "inputs" are those
    of the layer: they stay what they were only if the layers before keep their outputs.

    **Placement.** Last, so that neither weight decay nor anything else moves ``a``;
    before the moments an optimizer without decay keeps it still as well.

    **Boundaries.** ``collect(opt_state, adapters, batches, task=task, frozen=params,
    key=key)`` differentiates with respect to the frozen kernels (or reads their
    inputs), ``end_task`` grows M. Then merge (``lora.merge``), start new adapters off
    ``lora.memory(opt_state)``, clear the moments (``optax_cl.reset_state``), and call
    ``begin_task(opt_state, adapters)``, which raises, outside jit, if a new ``a`` is
    not off M.

    **Memory.** M, float32 ``[in, p]`` per kernel. **Work per step.** None.
    **Boundary.** One SVD of ``[in, out]`` (``[in, in]`` unless ``"mean"``) per kernel.

    Args:
      targets: The adapted kernels, from ``lora.targets``; for a memory only.
      memory_rank: Columns of M: one number, or one for each path; at most the fan-in
        less the adapter's rank is used, since ``a`` needs room. None: no memory.
      threshold: Share of a task's energy, in [0, 1], that M is to hold; 0 adds nothing.
        May be a tracer.
      statistic: ``"mean"``, ``"batches"`` or ``"inputs"``.
      overflow: When a task's directions do not fit: ``"strongest"`` keeps the strongest
        of them; ``"error"`` makes ``end_task``, outside jit, raise.
      factors: Regular expression, searched in a leaf's path: which leaves ``[*batch,
        in, r]`` are input-side factors.

    Returns:
      A ``GradientTransformationExtraArgs`` with state ``FrozenAState``.

    Raises:
      ValueError: For arguments out of range, or one of ``targets`` and ``memory_rank``
        without the other; at ``init`` if no leaf is a factor; in ``collect`` without
        what the memory reads; in ``begin_task``, beside a memory, for an ``a`` of
        another shape or (outside jit) one that overlaps it.
      TypeError: For arguments of a wrong type.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_cl
      >>> from optax_cl import lora
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (6, 4))}
      >>> chosen = lora.targets(params, {"kernel": 2}, alpha=2.0)
      >>> task = optax_cl.Task(layer_inputs=lambda both, x: {"kernel": x})
      >>> tx = optax.chain(
      ...     optax.adam(0.1),
      ...     lora.frozen_a(targets=chosen, memory_rank=4, statistic="inputs"))
      >>> adapters = lora.frozen_a_init(chosen, {"kernel": jnp.ones((6, 4))})
      >>> state = tx.init(adapters)
      >>> x = jnp.eye(6)[:2]  # the first task's inputs
      >>> stats = optax_cl.collect(
      ...     state, adapters, [x], task=task, frozen=params, key=jax.random.key(0))
      >>> state = optax_cl.end_task(state, adapters, stats)
      >>> adapters = lora.frozen_a_init(
      ...     chosen, {"kernel": jnp.ones((6, 4))}, lora.memory(state))
      >>> updates, state = tx.update(
      ...     jax.tree.map(jnp.ones_like, adapters), state, adapters)
      >>> learned = optax.apply_updates(adapters, updates)
      >>> print(jnp.abs(x @ lora.product(learned["kernel"])).max() < 1e-7)
      True

    References:
      `KeepLoRA <https://arxiv.org/abs/2601.19659>`_, 2026 (gradients)

      Liang and Li, `InfLoRA: Interference-Free Low-Rank Adaptation for Continual
      Learning <https://arxiv.org/abs/2404.00228>`_, 2024 (inputs)

      Zhang et al, `LoRA-FA <https://arxiv.org/abs/2308.03303>`_, 2023 (no memory)

      Saha et al, `Gradient Projection Memory <https://arxiv.org/abs/2103.09762>`_, 2021

    Differs from the papers:
      1. KeepLoRA's protection of the pre-trained weights' own subspace is left out.
      2. InfLoRA bounds its memory by switching to the complement when that is smaller
         (DualGPM); here the capacity is fixed.
    """
    checks.check_pattern("factors", factors)
    checks.check_number("threshold", threshold, low=0.0, high=1.0)
    checks.check_choice("statistic", statistic, STATISTICS)
    checks.check_choice("overflow", overflow, growth.OVERFLOWS)
    if (targets is None) != (memory_rank is None):
        raise ValueError(
            "`targets` and `memory_rank` make a memory together; got "
            f"{'only `memory_rank`' if targets is None else 'only `targets`'}. Give "
            "both, or neither to hold `a` fixed without a memory."
        )
    ranks, rules = None, None
    if targets is not None:
        _capacity.check_targets(targets)
        ranks = _capacity.hashable_ranks(memory_rank, targets)
        for path in targets:
            _capacity.columns(targets, ranks, path)
        rules = FrozenARules(targets, statistic, overflow)

    def init_fn(params):
        _factors.map_factors("frozen_a", factors, lambda leaf: leaf, params)
        return FrozenAState(
            tasks=jnp.zeros([], jnp.int32),
            threshold=jnp.array(threshold, jnp.float32, copy=True),
            memory=_empty_memory(targets, ranks),
            rules=rules,
        )

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args

        def hold(path, u):
            # Not 0 * u: a gradient that overflowed must not reach `a` either.
            return jnp.zeros_like(u) if _factors.is_factor(factors, path) else u

        updates = jax.tree_util.tree_map_with_path(hold, updates)
        return updates, state._replace(
            threshold=jnp.array(threshold, jnp.float32, copy=True)
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _empty_memory(targets, ranks):
    if ranks is None:
        return None

    def at_a(make):
        return {path: LoRA(a=make(path), b=optax.MaskedNode()) for path in targets}

    return _capacity.empty(targets, ranks, at_a)


def _passes(state):
    if state.memory is None:
        return ()
    targets, statistic = state.rules.targets, state.rules.statistic
    if statistic == "inputs":
        return (_inputs.input_pass(targets),)
    return (_memory.memory_pass(targets, statistic),)


def _end_task(state, params, results):
    del params
    state = state._replace(tasks=state.tasks + 1)
    if state.memory is None:
        return state
    (matrices,) = results.values()
    memory = _capacity.consolidate(
        "frozen_a", state.memory, matrices, state.threshold, state.rules
    )
    return state._replace(memory=memory)


def _begin_task(state, params):
    if state.memory is None:
        return state
    adapters = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_adapter)
    given = {checks.path_str(path[-1:]): node for path, node in adapters if path}
    for path, basis in state.memory.basis.items():
        a = getattr(given.get(path), "a", None)
        if trees.is_hole(a):
            continue
        target = state.rules.targets[path]
        shape = (*target.matrix_shape[:-1], target.rank)
        _checks.check_shape(f"{path}/a", a, shape)
        _checks.check_off(
            f"{path}/a",
            a,
            basis.a,
            "the memory of past tasks",
            "Start new adapters with `lora.frozen_a_init(targets, matrices, "
            "lora.memory(opt_state))`.",
        )
    return state


def _check(state):
    if state.memory is not None and state.rules.overflow == "error":
        growth.check_not_traced("frozen_a", state.tasks)


def _usage(state):
    """Columns, not tasks, of the memory with the least room."""
    if state.memory is None:
        return None, None
    return _capacity.usage(state.memory)


def _grow(state, capacity):
    if state.memory is None:
        return state
    memory = _capacity.grow(state.memory, state.rules.targets, capacity)
    return state._replace(memory=memory)


tasks.register_boundary(
    FrozenAState,
    tasks.Boundary(
        passes=_passes,
        end_task=_end_task,
        begin_task=_begin_task,
        usage=_usage,
        check=_check,
        grow=_grow,
    ),
)
