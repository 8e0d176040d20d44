r"""EWC: a quadratic pull towards past solutions, weighted by the Fisher."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optax_cl._core import checks, importance, statistics, tasks, trees


class EwcState(NamedTuple):
    """State of ``ewc``."""

    count: chex.Array  # int32 [], steps done (for a schedule)
    strength: chex.Array  # float32 [], lambda at the next step
    memory: importance.ImportanceMemory  # importance and anchors, float32
    fisher: statistics.FisherRules  # static


def ewc(
    strength: optax.ScalarOrSchedule,
    *,
    anchors: str = "merged",
    accumulate: str = "sum",
    decay: chex.Numeric | None = None,
    ema_init: str = "zero",
    estimator: str = "exact",
    capacity: int | None = None,
    overflow: str = "error",
    weight_by_count: bool = False,
) -> optax.GradientTransformationExtraArgs:
    fisher = statistics.make_rules(estimator, weight_by_count)
    rules = importance.make_rules(
        anchors, accumulate, decay, ema_init, capacity, overflow
    )
    checks.check_number("strength", strength, low=0.0, schedule=True)

    def at(count):
        return strength(count) if callable(strength) else strength

    def init_fn(params):
        count = jnp.zeros([], jnp.int32)
        return EwcState(
            count=count,
            strength=jnp.asarray(at(count), jnp.float32),
            memory=importance.init(params, rules, decay),
            fisher=fisher,
        )

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        checks.check_params("ewc", params)
        params = trees.align("params", params, updates)
        memory = state.memory._replace(decay=importance.decay_array(decay))
        scale = at(state.count) * importance.read_scale(memory)

        def add(u, f, a, p):
            pull = importance.leaf_pull(memory.rules, f, a, p)
            return (u + scale * pull).astype(u.dtype)

        updates = importance.map_updates(
            add, updates, memory.importance, memory.anchor, params
        )
        count = optax.safe_increment(state.count)
        return updates, state._replace(
            count=count,
            strength=jnp.asarray(at(count), state.strength.dtype),
            memory=memory,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def ewc_loss(opt_state: optax.OptState, params: optax.Params) -> chex.Array:
    states = [
        s
        for s in jax.tree.leaves(opt_state, is_leaf=lambda n: isinstance(n, EwcState))
        if isinstance(s, EwcState)
    ]
    if not states:
        raise ValueError("`opt_state` holds no EwcState. Is `ewc` in the chain?")
    return sum(s.strength * importance.value(s.memory, params) for s in states)


tasks.register_boundary(EwcState, importance.fisher_boundary())
