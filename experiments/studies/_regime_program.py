"""One routing on a benchmark, as functions for the engine.

A lane is one arm and one seed; inside it all regimes of the benchmark and all learning
rates run side by side under ``vmap``. So a lane's arrays fit into a core's cache, the
regimes share random numbers, and a rule picked by a lane's index costs what it alone
costs. On one seed all arms start from the same weights and see the same batches.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_cl
from experiments import lanes
from experiments.engine import Program
from experiments.studies import _regime_arms as arms
from optax_cl import replay


class Benchmark(NamedTuple):
    """Sequences of tasks in several regimes.

    Attributes:
      regimes: Their names.
      tasks: Tasks in a sequence.
      batch: Examples in a batch; a replay batch has as many.
      memory: Examples of each finished task that replay keeps.
      init: ``key -> params``.
      sample: ``(data, problem, regime, task, key, count) -> batch``, fresh training
        examples; problem is a seed's index into the data.
      loss: ``(params, batch) -> []``, the training loss.
      evaluate: ``(data, problem, regime, params) -> {name: [tasks]}``.
      task: What statistics at a boundary are made of; its batches have an entry
        ``"temperature"`` beside those of ``sample``.
    """

    regimes: tuple[str, ...]
    tasks: int
    batch: int
    memory: int
    init: Callable[[chex.PRNGKey], chex.ArrayTree]
    sample: Callable[..., dict[str, chex.Array]]
    loss: Callable[[chex.ArrayTree, Any], chex.Array]
    evaluate: Callable[..., dict[str, chex.Array]]
    task: optax_cl.Task


class Settings(NamedTuple):
    """What the arms of one program share."""

    rates: tuple[float, ...]  # learning rates
    steps: int  # per task
    rank: int  # columns of every basis
    collect_batches: int  # batches from which statistics are taken


class Lane(NamedTuple):
    """One arm and seed."""

    seed: chex.Array  # int32 []
    problem: chex.Array  # int32 [], the seed's index into the data
    rule: chex.Array  # int32 [], index into the rules
    strength: chex.Array  # float32 []
    temperature: chex.Array  # float32 []


class Learner(NamedTuple):
    """What is trained; each leaf with leading axes [regimes, rates] in a carry."""

    params: chex.ArrayTree
    opt_state: optax.OptState
    overlap: chex.Array  # float32 [], sum over the task's steps
    largest: chex.Array  # float32 [], largest |update| / learning rate so far


class Carry(NamedTuple):
    """What is handed from step to step."""

    learners: Learner
    buffer: replay.Reservoir | None  # leading axis [regimes]


def make_lanes(chosen: list[arms.Arm], seeds: tuple[int, ...], first: int = 0) -> Lane:
    """All pairs of an arm and a seed, arms outermost, as one tree of arrays."""
    rules = list(arms.RULES)
    lanes = [
        Lane(
            seed=np.int32(seed),
            problem=np.int32(first + index),
            rule=np.int32(rules.index(arm.rule)),
            strength=np.float32(arm.strength),
            temperature=np.float32(arm.temperature),
        )
        for arm in chosen
        for index, seed in enumerate(seeds)
    ]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *lanes)


def make_program(
    name: str, benchmark: Benchmark, routing: str, settings: Settings
) -> Program:
    """The engine's functions for all arms of one routing."""
    regimes = jnp.arange(len(benchmark.regimes))
    rates = jnp.array(settings.rates, jnp.float32)
    replays = routing == "replay"

    def optimizer(lane, rate):
        return arms.optimizer(routing, settings.rank, lane.rule, lane.strength, rate)

    def init(data, lane):
        params = benchmark.init(lanes.key(lane.seed, lanes.INIT))

        def per_rate(rate):
            zero = jnp.zeros([], jnp.float32)
            return Learner(params, optimizer(lane, rate).init(params), zero, zero)

        def per_regime(regime):
            buffer = None
            if replays:
                key = lanes.key(lane.seed, lanes.STORE)
                batch = benchmark.sample(data, lane.problem, regime, 0, key, 1)
                example = jax.tree.map(lambda x: x[0], batch)
                size = benchmark.tasks * benchmark.memory
                buffer = replay.reservoir_init(size, example)
            return Carry(jax.vmap(per_rate)(rates), buffer)

        return jax.vmap(per_regime)(regimes)

    def step(data, lane, carry, task, index):
        key, memory_key = (
            lanes.key(lane.seed, s, task, index) for s in (lanes.BATCH, lanes.MEMORY)
        )

        def per_regime(regime, carry):
            batch = benchmark.sample(
                data, lane.problem, regime, task, key, benchmark.batch
            )
            if replays:
                old, filled = replay.reservoir_sample(
                    carry.buffer, memory_key, benchmark.batch
                )

            def per_rate(rate, learner):
                params = learner.params
                extra = {}
                if replays:
                    extra["replay_updates"] = jax.grad(benchmark.loss)(params, old)
                    extra["replay_weight"] = filled[0]
                updates, opt_state = optimizer(lane, rate).update(
                    jax.grad(benchmark.loss)(params, batch),
                    learner.opt_state,
                    params,
                    **extra,
                )
                overlap = learner.overlap
                if not replays:
                    overlap = overlap + optax.tree.get(opt_state, "overlap")
                sizes = [jnp.max(jnp.abs(u)) for u in jax.tree.leaves(updates)]
                largest = jnp.max(jnp.stack(sizes)) / rate
                return Learner(
                    optax.apply_updates(params, updates),
                    opt_state,
                    overlap,
                    jnp.maximum(learner.largest, largest),
                )

            learners = jax.vmap(per_rate)(rates, carry.learners)
            return carry._replace(learners=learners)

        return jax.vmap(per_regime)(regimes, carry), {}

    def boundary(data, lane, carry, task):
        store, draw, labels = (
            jax.random.fold_in(lanes.key(lane.seed, lanes.COLLECT, task), i)
            for i in range(3)
        )

        def per_regime(regime, carry):
            buffer = carry.buffer
            if replays:
                kept = benchmark.sample(
                    data, lane.problem, regime, task, store, benchmark.memory
                )
                # As many as there are places for each task: none is ever replaced.
                buffer = replay.reservoir_add(buffer, kept, store)
            count = settings.collect_batches * benchmark.batch
            batch = benchmark.sample(data, lane.problem, regime, task, draw, count)
            batch["temperature"] = jnp.full([count], lane.temperature)
            stacked = jax.tree.map(
                lambda x: x.reshape(settings.collect_batches, -1, *x.shape[1:]), batch
            )

            def per_rate(learner):
                opt_state = learner.opt_state
                statistics = optax_cl.collect(
                    opt_state,
                    learner.params,
                    stacked,
                    task=benchmark.task,
                    stacked=True,
                    key=labels,
                )
                opt_state = optax_cl.end_task(opt_state, learner.params, statistics)
                opt_state = optax_cl.begin_task(opt_state, learner.params)
                return learner._replace(
                    opt_state=opt_state, overlap=jnp.zeros_like(learner.overlap)
                )

            return Carry(jax.lax.map(per_rate, carry.learners), buffer)

        recorded = {
            "overlap": carry.learners.overlap / settings.steps,
            "largest_step": carry.learners.largest,
        }
        # One after another: two devices that each decompose a batch of matrices have
        # been seen to wait for each other for ever on two cores.
        carry = jax.lax.map(lambda pair: per_regime(*pair), (regimes, carry))
        return carry, recorded

    def evaluate(data, lane, carry):
        def per_regime(regime, learners):
            return jax.vmap(
                lambda params: benchmark.evaluate(data, lane.problem, regime, params)
            )(learners.params)

        return jax.vmap(per_regime)(regimes, carry.learners)

    return Program(
        name=name,
        num_tasks=benchmark.tasks,
        steps_per_task=settings.steps,
        init=init,
        step=step,
        boundary=boundary,
        evaluate=evaluate,
    )
