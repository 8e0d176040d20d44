"""One family of adapters through the tasks, as functions for the engine.

A lane is one arm, learning rate and seed. On one seed all arms start from the same
network and see the same batches. A task begins at its first step: the arm's start makes
new adapters (and may move part of the weights into them). It ends at the boundary: the
memories are consolidated and the adapters are merged into the weights.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

import optax_cl
from experiments.engine import Program
from experiments.studies import _lora_arms as arms
from experiments.studies import _lora_data as data
from optax_cl import lora

BATCH = 64
# Streams of random numbers within one seed.
_BATCHES, _STARTS, _OLD = range(3)


class Carry(NamedTuple):
    """What is handed from step to step."""

    params: chex.ArrayTree  # frozen within a task
    adapters: lora.Adapters
    opt_state: optax.OptState
    stack: lora.Adapters | None  # one adapter per task, leading axis [tasks]


def make_program(family: arms.Family, steps: int) -> Program:
    """The engine's functions for all arms of one family."""

    def targets_of(params):
        return family.targets(params)

    def loss(targets, lane, adapters, params, batch):
        used = arms.view(lane, adapters)
        return data.losses(lora.merge(targets, params, used), batch)

    def init(everything, lane):
        params = jax.tree.map(lambda x: x[lane.problem], everything.base)
        targets = targets_of(params)
        zeros = _zero_gradients(targets)
        given = arms.Given(
            params,
            # A start from a gradient needs one; what it makes here is never trained.
            jax.tree.map(lambda g: g + jnp.eye(*g.shape), zeros),
            zeros,
            jnp.zeros([], bool),
            {},
            jax.random.key(0),
        )
        adapters = family.start(targets, lane, given).adapters
        opt_state = family.optimizer(targets, lane).init(adapters)
        stack = None
        if family.separate:
            zero = jax.tree.map(jnp.zeros_like, adapters)
            stack = jax.tree.map(lambda x: jnp.stack([x] * data.TASKS), zero)
        return Carry(params, adapters, opt_state, stack)

    def begin(everything, lane, carry, task):
        targets = targets_of(carry.params)
        size = arms.START_EXAMPLES
        gradients = _gradient(
            targets, carry.params, _first(everything, lane, task + 1, _needed(family))
        )
        reference = _zero_gradients(targets)
        if family.name == "starts":
            for old in range(data.TASKS - 1):
                batch = _first(everything, lane, jnp.int32(old + 1), size)
                weight = jnp.where(old < task, 1.0 / jnp.maximum(task, 1), 0.0)
                g = _gradient(targets, carry.params, batch)
                reference = jax.tree.map(lambda r, x, w=weight: r + w * x, reference, g)
        given = arms.Given(
            carry.params,
            gradients,
            reference,
            task > 0,
            lora.memory(carry.opt_state),
            _key(lane, _STARTS, task),
        )
        started = family.start(targets, lane, given)
        opt_state = optax_cl.begin_task(carry.opt_state, started.adapters)
        # The moments belong to the adapters that were merged.
        opt_state = optax_cl.reset_state(opt_state)
        if family.name == "olora-project":
            started = started._replace(
                adapters=lora.project_start(started.adapters, opt_state)
            )
        return (
            Carry(started.params, started.adapters, opt_state, carry.stack),
            started.open,
            started.cosine,
        )

    def step(everything, lane, carry, task, index):
        nothing = jnp.zeros([len(carry.adapters)], jnp.float32)
        carry, opened, cosine = jax.lax.cond(
            index == 0,
            lambda c: begin(everything, lane, c, task),
            lambda c: (c, nothing, nothing),
            carry,
        )
        targets = targets_of(carry.params)
        batch = _draw(everything, lane, task, index, family.replay)

        def objective(adapters):
            return loss(targets, lane, adapters, carry.params, batch).mean()

        value, grads = jax.value_and_grad(objective)(carry.adapters)
        updates, opt_state = family.optimizer(targets, lane).update(
            grads, carry.opt_state, carry.adapters
        )
        adapters = optax.apply_updates(carry.adapters, updates)
        carry = carry._replace(adapters=adapters, opt_state=opt_state)
        return carry, {"loss": value, "open": opened, "cosine": cosine}

    def boundary(everything, lane, carry, task):
        targets = targets_of(carry.params)
        # The loss of a lane closes over its traced numbers, so it can't be cached.
        ended = optax_cl.Task(
            loss=lambda both, batch: loss(targets, lane, both[0], both[1], batch)
        )
        batch = _first(everything, lane, task + 1, arms.MEMORY_EXAMPLES)
        statistics = optax_cl.collect(
            carry.opt_state,
            carry.adapters,
            jax.tree.map(lambda x: x[None], batch),
            stacked=True,
            task=ended,
            frozen=carry.params,
            key=jax.random.key(0),
        )
        opt_state = optax_cl.end_task(carry.opt_state, carry.adapters, statistics)
        used = arms.view(lane, carry.adapters)
        recorded = _spectra(targets, used)
        recorded["memory"] = _memory_columns(targets, opt_state)
        stack, params = carry.stack, carry.params
        if family.separate:
            stack = jax.tree.map(lambda s, x: s.at[task].set(x), stack, used)
        else:
            params = lora.merge(targets, carry.params, used)
        return Carry(params, carry.adapters, opt_state, stack), recorded

    def evaluate(everything, lane, carry):
        targets = targets_of(carry.params)
        images = everything.images[lane.problem, :, data.TRAIN :]
        labels = everything.labels[lane.problem, lane.stream, :, data.TRAIN :]

        def accuracy(params, images, labels):
            return (data.logits(params, images).argmax(-1) == labels).mean()

        if not family.separate:
            right = jax.vmap(accuracy, in_axes=(None, 0, 0))(
                carry.params, images, labels
            )
            return {"accuracy": right[1:], "base": right[0]}

        def one(adapters, images, labels):
            params = lora.merge(targets, carry.params, adapters)
            return accuracy(params, images, labels)

        right = jax.vmap(one)(carry.stack, images[1:], labels[1:])
        return {"accuracy": right, "base": accuracy(carry.params, images[0], labels[0])}

    return Program(family.name, data.TASKS, steps, init, step, boundary, evaluate)


def _needed(family):
    """How many examples the start's gradient is the mean of."""
    return arms.START_EXAMPLES if family.name == "starts" else arms.MEMORY_EXAMPLES


def _first(everything, lane, task, count):
    """The first training examples of a task (0 is the base task)."""
    return {
        "x": everything.images[lane.problem, task, :count],
        "y": everything.labels[lane.problem, lane.stream, task, :count],
    }


def _draw(everything, lane, task, index, replay):
    key = _key(lane, _BATCHES, task, index)
    which = jax.random.randint(key, [BATCH], 0, data.TRAIN)
    source = jnp.full([BATCH], task + 1)
    if replay:
        old = jax.random.randint(_key(lane, _OLD, task, index), [BATCH], 1, task + 1)
        second_half = jnp.arange(BATCH) >= BATCH // 2
        source = jnp.where(second_half & (task > 0), old, source)
    return {
        "x": everything.images[lane.problem, source, which],
        "y": everything.labels[lane.problem, lane.stream, source, which],
    }


def _gradient(targets, params, batch):
    stacked = jax.tree.map(lambda x: x[None], batch)
    return lora.mean_gradients(targets, data.losses, params, stacked, stacked=True)


def _zero_gradients(targets):
    return {p: jnp.zeros(t.matrix_shape, jnp.float32) for p, t in targets.items()}


def _memory_columns(targets, opt_state):
    """How many directions each memory holds, ``[layers]``."""
    memory = lora.memory(opt_state)
    return jnp.stack(
        [
            jnp.sum(jnp.any(memory[path] != 0, axis=0))
            if path in memory
            else jnp.zeros([], jnp.int32)
            for path in sorted(targets)
        ]
    )


def _spectra(targets, adapters):
    """Singular values of each layer's update, ``[layers, rank]``, largest first."""
    values = []
    for path in sorted(targets):
        update = targets[path].scale * lora.product(adapters[path])
        s = jnp.linalg.svd(update, compute_uv=False)[: arms.RANK]
        values.append(jnp.pad(s, (0, arms.RANK - len(s))))
    return {"singular": jnp.stack(values)}


def _key(lane, stream, *indices):
    key = jax.random.fold_in(jax.random.key(lane.seed), stream)
    for index in indices:
        key = jax.random.fold_in(key, index)
    return key
