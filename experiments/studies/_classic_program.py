"""One classic method through the tasks, as functions for the engine.

A lane is one scenario, strength, learning rate and seed. On one seed all methods see
the same batches, and all but the wide network start from the same weights.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

import optax_cl
from experiments import lanes
from experiments.engine import Program
from experiments.studies import _classic_arms as arms
from experiments.studies import _classic_data as data
from optax_cl import isolation, replay

_STATISTICS = 250  # examples that statistics are computed from, in batches of 25


class Carry(NamedTuple):
    """What is handed from step to step."""

    params: chex.ArrayTree
    opt_state: optax.OptState
    teacher: chex.ArrayTree  # the parameters at the last boundary
    chosen: chex.Array  # int32 [tasks, KEPT], rows of the stored examples
    dark: chex.Array  # float32 [tasks, KEPT, classes], outputs when they were stored


def make_program(method: arms.Method, name: str, steps: int) -> Program:
    """The engine's functions for one method, under a name of the run's."""
    wide = method.name == "Progressive"
    packed = method.name == "PackNet"

    def init(everything, lane):
        del everything
        times = data.TASKS if wide else 1
        params = data.init(
            lanes.key(lane.seed, lanes.INIT), times * data.HIDDEN, times * data.CLASSES
        )
        return Carry(
            params,
            method.optimizer(lane).init(params),
            params,
            jnp.tile(jnp.arange(arms.KEPT, dtype=jnp.int32), (data.TASKS, 1)),
            jnp.zeros([data.TASKS, arms.KEPT, data.CLASSES], jnp.float32),
        )

    def step(everything, lane, carry, task, index):
        pick, rows = jax.random.split(lanes.key(lane.seed, lanes.BATCH, task, index))
        source = jnp.full([arms.BATCH], task)
        if method.joint:
            source = jax.random.randint(pick, [arms.BATCH], 0, task + 1)
        which = jax.random.randint(rows, [arms.BATCH], 0, data.TRAIN)
        now = arms.Now(
            everything,
            lane,
            task,
            data.rows(everything, lane, source, which),
            carry.chosen,
            carry.dark,
            carry.teacher,
            lanes.key(lane.seed, lanes.MEMORY, task, index),
        )
        params, opt_state = carry.params, carry.opt_state
        if packed:
            opt_state, params = _pruned(lane, opt_state, params, task, index, steps)
        value, grads = jax.value_and_grad(method.objective)(params, now)
        updates, opt_state = method.optimizer(lane).update(
            grads, opt_state, params, **method.extra(params, now)
        )
        params = optax.apply_updates(params, updates)
        return carry._replace(params=params, opt_state=opt_state), {"loss": value}

    def boundary(everything, lane, carry, task):
        params, opt_state = carry.params, carry.opt_state
        first = data.rows(everything, lane, task, jnp.arange(_STATISTICS))
        statistics = optax_cl.collect(
            opt_state,
            params,
            jax.tree.map(lambda x: x.reshape(-1, 25, *x.shape[1:]), first),
            stacked=True,
            task=method.about,
            key=lanes.key(lane.seed, lanes.COLLECT, task),
        )
        opt_state = optax_cl.end_task(
            opt_state, params, statistics, moments="reset" if method.resets else "keep"
        )
        opt_state = optax_cl.begin_task(opt_state, params)
        chosen = carry.chosen
        if method.name == "iCaRL":
            chosen = chosen.at[task].set(_exemplars(params, first["x"]))
        kept = data.rows(everything, lane, task, chosen[task])
        dark = carry.dark
        if not wide:
            dark = dark.at[task].set(data.outputs(params, kept["x"]))
        return Carry(params, opt_state, params, chosen, dark), {}

    def evaluate(everything, lane, carry):
        held_out = jnp.arange(data.TRAIN, data.TRAIN + data.TEST)

        def accuracy(task):
            batch = data.rows(everything, lane, task, held_out)
            if method.name == "iCaRL":
                guess = _nearest(everything, lane, carry, batch["x"])
            else:
                guess = _logits(carry, batch, task).argmax(-1)
            return (guess == batch["y"]).mean()

        return {"accuracy": jnp.stack([accuracy(t) for t in range(data.TASKS)])}

    def _logits(carry, batch, task):
        params = carry.params
        if packed:
            params = isolation.packnet_params(carry.opt_state, params, task + 1)
        z = data.outputs(params, batch["x"])
        if wide:
            z = z.reshape(-1, data.TASKS, data.CLASSES)[:, task]
        return jnp.where(batch["may"], z, -jnp.inf)

    return Program(name, data.TASKS, steps, init, step, boundary, evaluate)


def _pruned(lane, opt_state, params, task, index, steps):
    """After three quarters of every task but the last weights are freed."""
    return jax.lax.cond(
        (index == steps * 3 // 4) & (task < data.TASKS - 1),
        lambda pair: isolation.packnet_prune(*pair, lane.strength),
        lambda pair: pair,
        (opt_state, params),
    )


def _exemplars(params, x):
    """Rows of the exemplars, of both classes in turn; rows of classes alternate."""
    features = data.inputs(params, x)["out"].reshape(-1, 2, data.HIDDEN)
    order = jax.vmap(lambda f: replay.herding(f, arms.KEPT // 2), 1, 1)(features)
    return (2 * order + jnp.arange(2)[None]).ravel().astype(jnp.int32)


def _nearest(everything, lane, carry, x):
    stored = data.rows(
        everything,
        lane,
        jnp.broadcast_to(jnp.arange(data.TASKS)[:, None], carry.chosen.shape),
        carry.chosen,
    )
    # What has not been learnt yet has no exemplars, and its stored outputs are zero.
    learnt = jnp.any(carry.dark != 0, axis=(1, 2))
    return replay.nearest_mean(
        data.inputs(carry.params, x)["out"],
        data.inputs(carry.params, stored["x"].reshape(-1, data.PIXELS + 1))["out"],
        stored["y"].ravel(),
        data.CLASSES,
        jnp.repeat(learnt, arms.KEPT),
    )
