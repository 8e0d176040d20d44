"""The state of EWC, and what a boundary does to one whose importance is a Fisher."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optax_cl._core import importance, statistics, tasks


class EwcState(NamedTuple):
    """State of ``ewc`` and of ``ewc_proximal``."""

    count: chex.Array  # int32 [], steps done (for schedules)
    strength: chex.Array  # float32 [], lambda at the next step
    memory: importance.ImportanceMemory  # importance and anchors
    fisher: Any  # statistics.FisherRules, static


def init(
    params: chex.ArrayTree,
    strength: optax.ScalarOrSchedule,
    rules: importance.Rules,
    decay: chex.Numeric | None,
    fisher: statistics.FisherRules,
) -> EwcState:
    """The state before the first task."""
    count = jnp.zeros([], jnp.int32)
    return EwcState(
        count=count,
        strength=jnp.array(
            importance.value_at(strength, count), jnp.float32, copy=True
        ),
        memory=importance.init(params, rules, decay),
        fisher=fisher,
    )


def advance(
    state: EwcState, strength: optax.ScalarOrSchedule, decay: chex.Numeric | None
) -> EwcState:
    """The state after a step; arguments that changed since ``init`` are taken over."""
    count = optax.safe_increment(state.count)
    return state._replace(
        count=count,
        strength=jnp.asarray(
            importance.value_at(strength, count), state.strength.dtype
        ),
        memory=state.memory._replace(decay=importance.decay_array(decay)),
    )


def fisher_boundary() -> tasks.Boundary:
    """For states with the fields ``memory`` and ``fisher`` (its rules)."""

    def passes(state):
        return (statistics.fisher_pass(state.fisher.estimator),)

    def end_task(state, params, results):
        (fisher,) = results.values()
        diagonal = fisher.diagonal
        if state.fisher.weight_by_count:
            diagonal = jax.tree.map(lambda f: fisher.num_items * f, diagonal)
        return state._replace(
            memory=importance.consolidate(state.memory, diagonal, params)
        )

    return tasks.Boundary(
        passes=passes,
        end_task=end_task,
        like=lambda state: state.memory.importance,
        usage=lambda state: importance.usage(state.memory),
        check=lambda state: importance.check_room(state.memory),
        grow=lambda state, capacity: state._replace(
            memory=importance.grow(state.memory, capacity)
        ),
    )


tasks.register_boundary(EwcState, fisher_boundary())
