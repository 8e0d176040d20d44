"""The state of EWC, and what a boundary does to one whose importance is a Fisher."""

from typing import Any, NamedTuple

import chex
import jax
import optax

from optax_cl._core import importance, quadratic, statistics, tasks


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
    fields = quadratic.start(params, strength, rules, decay)
    return EwcState(**fields, fisher=fisher)


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

    return quadratic.boundary(passes=passes, end_task=end_task)


tasks.register_boundary(EwcState, fisher_boundary())
