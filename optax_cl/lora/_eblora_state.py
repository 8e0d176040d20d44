"""The state of EBLoRA, and what becomes of it at a task boundary."""

import dataclasses
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_cl._core import checks, growth, tasks, trees
from optax_cl._core.orthonormal import off_memory
from optax_cl.lora import _capacity, _checks, _memory, _spectral
from optax_cl.lora._targets import Targets

# Rounding explains some 5e-6: of a Gram matrix in float32, and of the squared distance
# of a bfloat16 column from its master copy.
_DRIFT = 1e-4


class EbloraState(NamedTuple):
    """State of :func:`eblora`. Trees are like the adapters, with holes."""

    inner: optax.OptState  # of `directions` and `magnitude`
    memory: Any  # GradientMemory at every `v`; None without a memory
    master: Any  # float32 copies of s, u, v of lower precision; else MaskedNode
    drift: chex.Array  # float32 [], see `eblora`, largest since `begin_task`
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


def check_leaves(rules: EbloraRules, params: Any, master: Any) -> None:
    """Raises unless the adapters are such as the state was made for."""

    def check(role, leaf, m):
        _check_leaf(rules, role, leaf, m)

    _spectral.map_roles(check, params, master)


def _check_leaf(
    rules: EbloraRules, role: _spectral.Role, leaf: Any, master: Any
) -> None:
    if role.path is None or role.field is None or trees.is_hole(leaf):
        return
    shapes = _spectral.shapes(rules.targets[role.path], role.field)
    _checks.check_shape(f"{role.path}/{role.field}", leaf, *shapes)
    if trees.is_masked(master) and leaf.dtype.itemsize < 4:
        raise ValueError(
            f"`{role.path}/{role.field}` is of dtype {leaf.dtype}, but the optimizer "
            "state was made for adapters of float32 or wider: it has no master copy, "
            "and small steps would be lost in rounding. Cast the adapters to float32, "
            "or make a state for them by `tx.init`."
        )


def _check_start(state: EbloraState, params: Any) -> None:
    """Raises unless every V beside a memory is orthonormal and off it."""
    if state.memory is None:
        return
    given = dict(_spectral.spectral(params))
    masters = dict(_spectral.spectral(state.master))
    for path, basis in _spectral.spectral(state.memory.basis):
        v = getattr(given.get(path), "v", None)
        if trees.is_hole(basis.v) or trees.is_hole(v):
            continue
        _check_leaf(state.rules, _spectral.Role(path, "v"), v, masters[path].v)
        _checks.check_orthonormal(f"{path}/v", v)
        _checks.check_off(
            f"{path}/v",
            v,
            basis.v,
            "the memory of past tasks",
            "Merge the old adapters and start new ones with `lora.eblora_init(targets, "
            "gradients, lora.memory(opt_state))`.",
        )


def empty_memory(rules: EbloraRules, params: Any) -> _memory.GradientMemory | None:
    """A memory without columns in use at every ``v``; None without a memory."""
    if rules.memory_rank is None:
        return None

    def at_v(make):
        def one(role, _):
            return make(role.path) if role.field == "v" else optax.MaskedNode()

        return _spectral.map_roles(one, params)

    return _capacity.empty(rules.targets, rules.memory_rank, at_v)


def _restricts(state: EbloraState) -> bool:
    """Whether there is a factor that a memory restricts."""
    return state.memory is not None and bool(jax.tree.leaves(state.memory.basis))


def _passes(state: EbloraState) -> tuple[tasks.Pass, ...]:
    if not _restricts(state):
        return ()
    return (_memory.memory_pass(state.rules.targets, state.rules.statistic),)


def _end_task(state: EbloraState, params: Any, results: dict[str, Any]) -> EbloraState:
    del params
    state = state._replace(tasks=state.tasks + 1)
    if not _restricts(state):
        return state
    (gradients,) = results.values()
    memory = _capacity.consolidate(
        "eblora", state.memory, gradients, state.threshold, state.rules
    )
    return state._replace(memory=memory)


def _begin_task(state: EbloraState, params: Any) -> EbloraState:
    _check_start(state, params)
    # Of what has neither a master copy nor a memory, nothing tells here whether a mask
    # hides it; `update` judges it.
    seen = trees.align_structure("params", params, state.master)
    check_leaves(state.rules, seen, state.master)
    master = jax.tree.map(lambda m, p: p.astype(m.dtype), state.master, seen)
    return state._replace(master=master, drift=jnp.zeros_like(state.drift))


def _check(state: EbloraState) -> None:
    if state.rules.overflow == "error" and _restricts(state):
        growth.check_not_traced("eblora", state.drift)
    if isinstance(state.drift, jax.core.Tracer):
        return
    drift = np.max(np.asarray(state.drift))
    if drift > _DRIFT:
        checks.warn(
            "`eblora` found its factors elsewhere than where it had left them, by up "
            f"to {drift:.2g} (`drift`): they were not orthonormal, or "
            "not off the memory, when the loss saw them. Put whatever changes updates "
            "after it, a learning rate above all, inside `directions`. After a merge "
            "start new adapters, and call `begin_task`."
        )


def _usage(state: EbloraState) -> tuple[Any, int | None]:
    """Columns, not tasks, of the memory with the least room."""
    if state.memory is None:
        return None, None
    return _capacity.usage(state.memory)


def _grow(state: EbloraState, capacity: int) -> EbloraState:
    if state.memory is None:
        return state
    memory = _capacity.grow(state.memory, state.rules.targets, capacity)
    return state._replace(memory=memory)


def _project(state: EbloraState, tree: chex.ArrayTree) -> chex.ArrayTree:
    if state.memory is None:
        return tree
    bases = trees.align_structure("basis", state.memory.basis, tree)

    def one(z, m):
        return z if trees.is_hole(m) else off_memory(z, m).astype(z.dtype)

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
