"""The state of EBLoRA, and what becomes of it at a task boundary."""

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_cl._core import checks, tasks, trees
from optax_cl.lora import _memory, _spectral
from optax_cl.lora._adapters import Targets

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


def hashable_ranks(memory_rank: Any, targets: Targets) -> Any:
    """``memory_rank`` checked, as a static setting."""
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
    if _room(rules, path) < 1:
        target = rules.targets[path]
        raise ValueError(
            f"the adapter at `{path}` has rank {target.rank} and fan-in "
            f"{target.matrix_shape[-2]}: there is no room for a memory beside it. "
            "Lower the rank, or pass `memory_rank=None`."
        )
    rank = rules.memory_rank
    wanted = rank if isinstance(rank, int) else dict(rank)[path]
    return min(wanted, _room(rules, path))


def _room(rules: EbloraRules, path: str) -> int:
    """Columns that a memory may have, so that V keeps a place beside it."""
    target = rules.targets[path]
    return target.matrix_shape[-2] - target.rank


def _check_off_memory(state: EbloraState, params: Any) -> None:
    aligned = trees.align_structure("params", params, state.memory.basis)
    bases = _spectral.spectral(state.memory.basis)
    pairs = zip(_spectral.spectral(aligned), bases, strict=True)
    for (path, adapter), (_, memory) in pairs:
        v, basis = adapter.v, memory.v
        if trees.is_hole(basis) or not (_spectral.known(v) and _spectral.known(basis)):
            continue
        coeffs = np.swapaxes(_spectral.wide(basis), -1, -2) @ _spectral.wide(v)
        overlap = np.abs(coeffs).max(initial=0.0)
        if not overlap < _spectral.tolerance(v):
            raise ValueError(
                f"`{path}/v` must be orthogonal to the memory of past tasks; the "
                f"largest entry of |M^T v| is {overlap:.2g}. Merge the old adapters "
                "and start new ones with `lora.eblora_init(targets, gradients, "
                "lora.memory(opt_state))`."
            )


def empty_memory(rules: EbloraRules, params: Any) -> _memory.GradientMemory | None:
    """A memory without columns in use at every ``v``; None without a memory."""
    if rules.memory_rank is None:
        return None

    def at_v(make):
        return _spectral.map_roles(
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
    basis, count = state.memory
    if state.rules.overflow == "error":
        _spectral.map_roles(
            lambda role, m, n: _check_room(
                role.path, m, n, gradients[role.path], state.threshold
            ),
            basis,
            count,
        )
    grown = _spectral.map_roles(
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
        _spectral.check_orthonormal(like)
        _check_off_memory(state, params)
    seen = trees.align_structure("params", params, state.master)
    master = jax.tree.map(lambda m, p: p.astype(m.dtype), state.master, seen)
    return state._replace(master=master, drift=jnp.zeros_like(state.drift))


def _check(state: EbloraState) -> None:
    known = not isinstance(state.drift, jax.core.Tracer)
    if not known and _restricts(state) and state.rules.overflow == "error":
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

    basis = _spectral.map_roles(pad, state.memory.basis)
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
