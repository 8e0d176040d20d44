"""What the links that add a quadratic penalty's pull have in common.

Their states have the fields ``count``, ``strength`` and ``memory``, whatever else: how
the importance comes about is the method's own.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from optax_cl._core import checks, importance, tasks, trees


def start(
    params: chex.ArrayTree,
    strength: optax.ScalarOrSchedule,
    rules: importance.Rules,
    decay: chex.Numeric | None = None,
) -> dict[str, Any]:
    """The three fields before the first task."""
    count = jnp.zeros([], jnp.int32)
    now = importance.value_at(strength, count)
    return {
        "count": count,
        "strength": jnp.array(now, jnp.float32, copy=True),
        "memory": importance.init(params, rules, decay),
    }


def advance(
    state: Any, strength: optax.ScalarOrSchedule, decay: chex.Numeric | None = None
) -> Any:
    """The state after a step; arguments that changed since ``init`` are taken over."""
    count = optax.safe_increment(state.count)
    return state._replace(
        count=count,
        strength=jnp.asarray(
            importance.value_at(strength, count), state.strength.dtype
        ),
        memory=state.memory._replace(decay=importance.decay_array(decay)),
    )


def add_pull(
    method: str,
    updates: chex.ArrayTree,
    state: Any,
    params: chex.ArrayTree | None,
    strength: optax.ScalarOrSchedule,
    decay: chex.Numeric | None = None,
    *,
    factor: float = 1.0,
) -> tuple[chex.ArrayTree, Any]:
    """A step of such a link.

    Args:
      method: Its name, for errors.
      updates: What arrives.
      state: Its state.
      params: The parameters, hidden leaves included.
      strength: What it was given.
      decay: Likewise.
      factor: On the pull: 1 where the penalty has the factor one half, else 2.

    Returns:
      Updates with ``factor * strength * sum_j F_j (params - anchor_j)`` added to them,
      and the new state.
    """
    checks.check_params(method, params)
    importance.check_updates(state.memory, updates)
    params = trees.align("params", params, updates)
    now = importance.value_at(strength, state.count)
    state = advance(state, strength, decay)
    memory = state.memory
    scale = factor * now * importance.read_scale(memory)

    def add(u, f, a, p):
        pull = importance.leaf_pull(memory.rules, f, a, p)
        return (u + scale * pull).astype(u.dtype)

    updates = importance.map_updates(
        add, updates, memory.importance, memory.anchor, params
    )
    return updates, state


def value(
    opt_state: optax.OptState,
    params: optax.Params,
    state_class: type,
    made_by: str,
    *,
    factor: float = 1.0,
) -> chex.Array:
    """The penalty, summed over all states of a class, with the coming strength.

    Args:
      opt_state: Any optimizer state.
      params: Where to evaluate.
      state_class: The states that count.
      made_by: What makes such states, for the error if there is none.
      factor: As in ``add_pull``.

    Returns:
      A float32 scalar.
    """

    def wanted(node):
        return isinstance(node, state_class)

    states = [s for s in jax.tree.leaves(opt_state, is_leaf=wanted) if wanted(s)]
    if not states:
        raise ValueError(
            f"`opt_state` holds no {state_class.__name__}. Is {made_by} in the chain?"
        )
    values = [s.strength * importance.value(s.memory, params) for s in states]
    return factor * sum(values, start=jnp.zeros([], jnp.float32))


def boundary(**parts: Callable[..., Any]) -> tasks.Boundary:
    """What such a state does at a boundary: the ``parts``, and what all of them do."""
    return tasks.Boundary(
        like=lambda state: state.memory.importance,
        usage=lambda state: importance.usage(state.memory),
        check=lambda state: importance.check_room(state.memory),
        grow=lambda state, capacity: state._replace(
            memory=importance.grow(state.memory, capacity)
        ),
        **parts,
    )
