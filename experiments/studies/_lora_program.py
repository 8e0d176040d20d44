"""One family of adapters through the tasks, as functions for the engine.

A lane is one arm, learning rate and seed. On one seed all arms start from the same
network and see the same batches. A task begins at its first step: the arm's start makes
new adapters (and may move part of the weights into them). It ends at the boundary: the
memories are consolidated and the adapters are merged into the weights.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

import optax_cl
from experiments.engine import Program
from experiments.studies import _lora_arms as arms
from optax_cl import lora

# Streams of random numbers within one seed.
_BATCHES, _STARTS, _OLD = range(3)


class Bench(NamedTuple):
    """A model and the tasks it has to learn.

    Attributes:
      tasks: How many.
      batch: Examples in a batch.
      ranks: Pattern to rank of the kernels that get adapters.
      surgical_ranks: The same for starts that need two blocks of directions.
      matrices: How leaves are read as matrices.
      memory: Path to the most directions of old gradients that are kept.
      start_examples: How many examples of each task the gradient starts read.
      memory_examples: What EBLoRA's directions and the memories are taken from.
      base: ``(data, lane) -> params``, with the adapted kernels among them.
      losses: ``(data, lane, params, batch, targets, adapters) -> [B]``; the last two
        are None for the bare weights.
      first: ``(data, lane, task, count) -> batch``, the same examples in each call.
      draw: ``(data, lane, tasks [B], key) -> batch``, training examples of each task.
      evaluate: ``(data, lane, params, targets, stack) -> {name: array}``; with a stack,
        every task is evaluated with the adapter of its own.
    """

    tasks: int
    batch: int
    ranks: Mapping[str, int]
    surgical_ranks: Mapping[str, int]
    matrices: Any
    memory: Callable[[str], int]
    start_examples: int
    memory_examples: int
    base: Callable[..., chex.ArrayTree]
    losses: Callable[..., chex.Array]
    first: Callable[..., Any]
    draw: Callable[..., Any]
    evaluate: Callable[..., dict[str, chex.Array]]


class Carry(NamedTuple):
    """What is handed from step to step."""

    params: chex.ArrayTree  # frozen within a task
    adapters: lora.Adapters
    opt_state: optax.OptState
    stack: lora.Adapters | None  # one adapter per task, leading axis [tasks]


def make_program(bench: Bench, family: arms.Family, steps: int) -> Program:
    """The engine's functions for all arms of one family."""

    def targets_of(params):
        if family.surgical:
            return lora.targets(
                params,
                bench.surgical_ranks,
                alpha=2.0,
                rslora=True,
                matrices=bench.matrices,
            )
        rank = max(bench.ranks.values())
        return lora.targets(
            params, bench.ranks, alpha=2.0 * rank, matrices=bench.matrices
        )

    def optimizer(targets, lane):
        memory = {path: bench.memory(path) for path in targets}
        return family.optimizer(targets, lane, memory)

    def losses(data, lane, targets, adapters, params, batch):
        used = arms.view(lane, adapters)
        return bench.losses(data, lane, params, batch, targets, used)

    def gradient(data, lane, targets, params, task, count):
        batch = bench.first(data, lane, task, count)
        return lora.mean_gradients(
            targets,
            lambda params, batch: bench.losses(data, lane, params, batch, None, None),
            params,
            _stacked(batch, bench.batch),
            stacked=True,
        )

    def init(data, lane):
        params = bench.base(data, lane)
        targets = targets_of(params)
        zeros = _zero_gradients(targets)
        given = arms.Given(
            params,
            # A start from a gradient needs one; what it makes here is never trained.
            {path: g + jnp.eye(*g.shape[-2:]) for path, g in zeros.items()},
            zeros,
            jnp.zeros([], bool),
            None,
            jax.random.key(0),
        )
        adapters = family.start(targets, lane, given).adapters
        opt_state = optimizer(targets, lane).init(adapters)
        stack = None
        if family.separate:
            zero = jax.tree.map(jnp.zeros_like, adapters)
            stack = jax.tree.map(lambda x: jnp.stack([x] * bench.tasks), zero)
        return Carry(params, adapters, opt_state, stack)

    def begin(data, lane, carry, task):
        targets = targets_of(carry.params)
        needed = bench.start_examples if family.surgical else bench.memory_examples
        gradients = gradient(data, lane, targets, carry.params, task, needed)
        reference = _zero_gradients(targets)
        if family.surgical:

            def add(total, old):
                g = gradient(
                    data, lane, targets, carry.params, old, bench.start_examples
                )
                weight = jnp.where(old < task, 1.0 / jnp.maximum(task, 1), 0.0)
                return jax.tree.map(lambda r, x: r + weight * x, total, g), None

            reference, _ = jax.lax.scan(add, reference, jnp.arange(bench.tasks - 1))
        given = arms.Given(
            carry.params,
            gradients,
            reference,
            task > 0,
            lora.memory(carry.opt_state) or None,
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

    def step(data, lane, carry, task, index):
        targets = targets_of(carry.params)
        nothing = jnp.zeros([arms.matrices(targets)], jnp.float32)
        carry, opened, cosine = jax.lax.cond(
            index == 0,
            lambda c: begin(data, lane, c, task),
            lambda c: (c, nothing, nothing),
            carry,
        )
        source = jnp.full([bench.batch], task)
        if family.replay:
            old = jax.random.randint(
                _key(lane, _OLD, task, index), [bench.batch], 0, task
            )
            second_half = jnp.arange(bench.batch) >= bench.batch // 2
            source = jnp.where(second_half & (task > 0), old, source)
        batch = bench.draw(data, lane, source, _key(lane, _BATCHES, task, index))

        def objective(adapters):
            return losses(data, lane, targets, adapters, carry.params, batch).mean()

        value, grads = jax.value_and_grad(objective)(carry.adapters)
        updates, opt_state = optimizer(targets, lane).update(
            grads, carry.opt_state, carry.adapters
        )
        adapters = optax.apply_updates(carry.adapters, updates)
        carry = carry._replace(adapters=adapters, opt_state=opt_state)
        return carry, {"loss": value, "open": opened, "cosine": cosine}

    def boundary(data, lane, carry, task):
        targets = targets_of(carry.params)
        ended = optax_cl.Task(
            loss=lambda both, batch: losses(data, lane, targets, *both, batch)
        )
        batch = bench.first(data, lane, task, bench.memory_examples)
        statistics = optax_cl.collect(
            carry.opt_state,
            carry.adapters,
            _stacked(batch, bench.batch),
            stacked=True,
            task=ended,
            frozen=carry.params,
            key=jax.random.key(0),
        )
        opt_state = optax_cl.end_task(carry.opt_state, carry.adapters, statistics)
        used = arms.view(lane, carry.adapters)
        recorded = {
            "singular": _spectra(targets, used),
            "memory": _memory_columns(targets, opt_state),
        }
        stack, params = carry.stack, carry.params
        if family.separate:
            stack = jax.tree.map(lambda s, x: s.at[task].set(x), stack, used)
        else:
            params = lora.merge(targets, carry.params, used)
        return Carry(params, carry.adapters, opt_state, stack), recorded

    def evaluate(data, lane, carry):
        targets = targets_of(carry.params)
        return bench.evaluate(data, lane, carry.params, targets, carry.stack)

    return Program(family.name, bench.tasks, steps, init, step, boundary, evaluate)


def _stacked(batch, size):
    """Examples as equal batches, ``[batches, size, ...]``; what is left over goes."""

    def stack(x):
        count = max(1, len(x) // size)
        return x[: count * size].reshape(count, -1, *x.shape[1:])

    return jax.tree.map(stack, batch)


def _zero_gradients(targets):
    return {p: jnp.zeros(t.matrix_shape, jnp.float32) for p, t in targets.items()}


def _memory_columns(targets, opt_state):
    """How many directions each memory holds, ``[matrices]``."""
    memory = lora.memory(opt_state)
    used = {
        path: jnp.sum(jnp.any(memory[path] != 0, axis=-2), axis=-1)
        if path in memory
        else jnp.zeros(target.matrix_shape[:-2])
        for path, target in targets.items()
    }
    return arms.flat(used)


def _spectra(targets, adapters):
    """Singular values of each matrix's update, ``[matrices, rank]``, largest first."""
    rank = max(target.rank for target in targets.values())
    values = []
    for path in sorted(targets):
        spectral = lora.to_spectral({path: adapters[path]})[path]
        s = jnp.abs(targets[path].scale * spectral.s)
        s = -jnp.sort(-s, axis=-1).reshape(-1, s.shape[-1])
        values.append(jnp.pad(s, ((0, 0), (0, rank - s.shape[-1]))))
    return jnp.concatenate(values)


def _key(lane, stream, *indices):
    key = jax.random.fold_in(jax.random.key(lane.seed), stream)
    for index in indices:
        key = jax.random.fold_in(key, index)
    return key
