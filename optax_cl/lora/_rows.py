r"""The memory of where past adapters read: their input-side factors, side by side.

Papers that write ``y = W x`` call the columns of ``a`` the rows of A, and so does the
text here.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from optax_cl._core import checks, places, tasks, trees
from optax_cl.lora import _factors

OVERFLOWS = ("error", "oldest")


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class RowRules:
    """How rows are stored, and what is made of them. A static node."""

    capacity: int
    overflow: str
    penalty: str | None  # None: projection


def make_rules(capacity: int, overflow: str, penalty: str | None) -> RowRules:
    """Checks the arguments that all methods with a memory of rows share."""
    checks.check_positive_int("capacity", capacity)
    checks.check_choice("overflow", overflow, OVERFLOWS)
    return RowRules(int(capacity), overflow, penalty)


def empty(method: str, factors: str, params: chex.ArrayTree, rules: RowRules) -> Any:
    """Zeros ``[*batch, in, capacity * r]``, float32 or wider, at every factor."""

    def one(leaf):
        *batch, fan_in, r = jnp.shape(leaf)
        dtype = trees.importance_dtype(jnp.result_type(leaf))
        return jnp.zeros((*batch, fan_in, rules.capacity * r), dtype)

    return _factors.map_factors(method, factors, one, params)


def boundary(finish: Callable[[Any], Any]) -> tasks.Boundary:
    """For states with the fields ``tasks``, ``rows`` and ``rules``.

    Args:
      finish: Brings what else the state holds up to date with new rows.
    """
    return tasks.Boundary(
        end_task=lambda state, params, results: finish(_consolidate(state, params)),
        begin_task=begin_task,
        like=lambda state: state.rows,
        usage=lambda state: (state.tasks, state.rules.capacity),
        check=_check_capacity,
        grow=lambda state, capacity: finish(_grow(state, capacity)),
    )


def states(opt_state: optax.OptState, state_class: type, method: str) -> list[Any]:
    """The states of one class, or an error naming the method that is not there."""

    def wanted(node):
        return isinstance(node, state_class)

    found = [s for s in jax.tree.leaves(opt_state, is_leaf=wanted) if wanted(s)]
    if not found:
        raise ValueError(
            f"`opt_state` holds no {state_class.__name__}. Is `{method}` in the chain?"
        )
    return found


def begin_task(state: Any, params: chex.ArrayTree) -> Any:
    """Nothing but a check that the adapters are such as the state was made for."""

    def check(path, rows, a):
        if not trees.is_hole(a):
            _check_shape(path, rows, a, state.rules.capacity)

    params = trees.align_structure("params", params, state.rows)
    jax.tree_util.tree_map_with_path(check, state.rows, params)
    return state


def _check_shape(path: Any, rows: chex.Array, a: chex.Array, capacity: int) -> None:
    expected = (*rows.shape[:-1], rows.shape[-1] // capacity)
    if jnp.shape(a) != expected:
        raise ValueError(
            f"`params` must be the adapters that the optimizer was made for; at "
            f"`{checks.path_str(path)}` expected shape {expected}, got {jnp.shape(a)}."
        )


def _consolidate(state: Any, params: chex.ArrayTree) -> Any:
    capacity = state.rules.capacity

    def store(path, rows, a):
        r = rows.shape[-1] // capacity
        _check_shape(path, rows, a, capacity)
        # Entries that are not finite are stored as zero: they protect nothing.
        finite = jnp.where(jnp.isfinite(a), a, 0).astype(rows.dtype)
        # The oldest stand first, and make room where no more fit.
        room = jnp.where(state.tasks >= capacity, jnp.roll(rows, -r, axis=-1), rows)
        start = r * jnp.minimum(state.tasks, capacity - 1)
        return jax.lax.dynamic_update_slice_in_dim(room, finite, start, axis=-1)

    params = trees.align_structure("params", params, state.rows)
    return state._replace(
        tasks=jnp.minimum(state.tasks + 1, capacity),
        rows=jax.tree_util.tree_map_with_path(store, state.rows, params),
    )


def _check_capacity(state: Any) -> None:
    if state.rules.overflow == "error":
        places.check_left(state.tasks, state.rules.capacity, "`overflow='oldest'`")


def _grow(state: Any, capacity: int) -> Any:
    def widen(rows):
        r = rows.shape[-1] // state.rules.capacity
        padding = [(0, 0)] * (rows.ndim - 1) + [(0, capacity * r - rows.shape[-1])]
        return jnp.pad(rows, padding)

    rules = dataclasses.replace(state.rules, capacity=capacity)
    return state._replace(rows=jax.tree.map(widen, state.rows), rules=rules)
