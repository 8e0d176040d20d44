"""One family of arms on a stream of domains, as functions for the engine.

A lane is one arm and seed. Everything random derives from the lane's seed, the task and
the step, and not from the arm: on one seed all arms start from the same weights, see
the domains in the same order and train on the same batches, so that differences between
them can be taken seed by seed.
"""

import zlib
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_cl
from experiments import lanes
from experiments.data import Stream
from experiments.engine import Program
from experiments.models import byte_lm
from optax_cl import replay


class Common(NamedTuple):
    """What the optimizers of one run share.

    Attributes:
      b2: Decay of Adam's second moment.
      rank: Columns of each basis of a protected subspace.
    """

    b2: float
    rank: int


class Settings(NamedTuple):
    """What the arms of one run share.

    Attributes:
      model: Sizes of the model.
      common: What the optimizers share.
      tasks: Domains a seed's order visits.
      steps: Training steps per domain.
      batch: Windows per batch; a replay batch has as many.
      memory: Windows of each finished domain that replay may keep.
      collect_batches: Batches from which statistics are taken at a boundary.
    """

    model: byte_lm.ByteLMConfig
    common: Common
    tasks: int
    steps: int
    batch: int
    memory: int
    collect_batches: int


class Data(NamedTuple):
    """The stream as arrays that every lane sees.

    A window is ``context + 1`` bytes: the inputs, and the targets one further on.
    """

    train: chex.Array  # uint8 [domains, longest]; zeros behind a domain's end
    length: chex.Array  # int32 [domains]
    heldout: chex.Array  # uint8 [domains, windows, context + 1]
    probe: chex.Array  # uint8 [domains, probe windows, context + 1]


class Lane(NamedTuple):
    """One arm and seed; every field is traced, so that arms share a compilation."""

    seed: chex.Array  # int32 []
    order: chex.Array  # int32 [tasks], indices of domains
    learning_rate: chex.Array  # float32 [], at the start of each task
    strength: chex.Array  # float32 []; its meaning is the family's
    joint: chex.Array  # bool [], train on all domains of the order at once
    digest: chex.Array  # uint32 [], of the text: another text is another run


class Family(NamedTuple):
    """Arms that differ in numbers only, and so share one compilation.

    Attributes:
      name: Names the program and its file of results.
      build: ``(common, strength, learning rate) -> optimizer``; the numbers may be
        tracers.
      memory: Which extra argument a batch from the memory becomes, if any:
        ``"replay_updates"`` or ``"reference_updates"``.
      meters: Names of scalars to read from the optimizer state after each step.
    """

    name: str
    build: Callable[[Common, chex.Array, chex.Array], optax.GradientTransformation]
    memory: str | None = None
    meters: tuple[str, ...] = ()


class Carry(NamedTuple):
    """What is handed from step to step."""

    params: chex.ArrayTree
    opt_state: optax.OptState
    buffer: replay.Reservoir | None  # windows of finished domains


def make_data(stream: Stream, context: int, windows: int, probe_windows: int) -> Data:
    """Arrays of a stream, with held-out windows spread evenly over each domain.

    Args:
      stream: The text.
      context: Bytes the model sees.
      windows: Held-out windows of each domain, or as many as the shortest holds.
      probe_windows: Those of them on which the first domain is followed.

    Returns:
      ``Data``.
    """
    fitting = min(len(text) for text in stream.heldout) // (context + 1)
    windows = max(1, min(windows, fitting))
    probe_windows = min(windows, probe_windows)
    longest = max(len(text) for text in stream.train)
    train = np.zeros([len(stream.names), longest], np.uint8)
    for row, text in zip(train, stream.train, strict=True):
        row[: len(text)] = text

    def spread(text, count):
        starts = np.linspace(0, len(text) - context - 1, count).astype(int)
        return np.stack([text[start : start + context + 1] for start in starts])

    return Data(
        train=train,
        length=np.array([len(text) for text in stream.train], np.int32),
        heldout=np.stack([spread(text, windows) for text in stream.heldout]),
        probe=np.stack([spread(text, probe_windows) for text in stream.heldout]),
    )


def digest(data: Data) -> int:
    """A checksum of all the text, so that a run never goes on with another one."""
    result = 0
    for array in data:
        result = zlib.crc32(np.ascontiguousarray(array), result)
    return result


def make_program(family: Family, settings: Settings) -> Program:
    """The engine's functions for one family."""
    model = byte_lm.byte_lm(settings.model)
    # Built once: statistics are compiled anew for functions not seen before.
    task_functions = optax_cl.classification(
        lambda params, windows: model.apply(params, windows[:, :-1]),
        lambda windows: windows[:, 1:].astype(jnp.int32),
    )

    def loss(params, windows):
        logits = model.apply(params, windows[:, :-1])
        return byte_lm.next_byte_loss(logits, windows[:, 1:])

    def optimizer(lane, task, step):
        # Linear decay to zero within each task; joint training is one long task.
        done = jnp.where(
            lane.joint,
            (task * settings.steps + step) / (settings.tasks * settings.steps),
            step / settings.steps,
        )
        rate = lane.learning_rate * (1.0 - done)
        return family.build(settings.common, lane.strength, rate)

    def draw(data, lane, task, key, count):
        """Windows of the task's domain, or of any domain in joint training."""
        which, where = jax.random.split(key)
        anywhere = jax.random.randint(which, [count], 0, settings.tasks)
        domain = lane.order[jnp.where(lane.joint, anywhere, task)]
        last = data.length[domain] - settings.model.context
        start = jax.random.randint(where, [count], 0, last)
        columns = start[:, None] + jnp.arange(settings.model.context + 1)[None, :]
        return data.train[domain[:, None], columns]

    def init(data, lane):
        del data
        params = model.init(lanes.key(lane.seed, lanes.INIT))
        window = jnp.zeros([settings.model.context + 1], jnp.uint8)
        return Carry(
            params=params,
            opt_state=optimizer(lane, jnp.int32(0), jnp.int32(0)).init(params),
            buffer=replay.reservoir_init(settings.tasks * settings.memory, window)
            if family.memory
            else None,
        )

    def step(data, lane, carry, task, index):
        params, opt_state, buffer = carry
        windows = draw(
            data,
            lane,
            task,
            lanes.key(lane.seed, lanes.BATCH, task, index),
            settings.batch,
        )
        value, grads = jax.value_and_grad(loss)(params, windows)
        extra = {}
        if family.memory:
            key = lanes.key(lane.seed, lanes.MEMORY, task, index)
            old, weights = replay.reservoir_sample(buffer, key, settings.batch)
            extra[family.memory] = jax.tree.map(
                lambda g: g * weights[0], jax.grad(loss)(params, old)
            )
            if family.memory == "replay_updates":
                extra["replay_weight"] = weights[0]
        tx = optax.with_extra_args_support(optimizer(lane, task, index))
        updates, opt_state = tx.update(grads, opt_state, params, **extra)
        params = optax.apply_updates(params, updates)
        recorded = {
            "loss": value,
            "first_domain": loss(params, data.probe[lane.order[0]]),
        }
        for name in family.meters:
            recorded[name] = optax.tree.get(opt_state, name)
        return Carry(params, opt_state, buffer), recorded

    def boundary(data, lane, carry, task):
        params, opt_state, buffer = carry
        if buffer is not None:
            key = lanes.key(lane.seed, lanes.STORE, task)
            stored = draw(data, lane, task, key, settings.memory)
            # As many as the buffer has places for each task: none is ever replaced.
            buffer = replay.reservoir_add(buffer, stored, key)
        keys = jax.random.split(lanes.key(lane.seed, lanes.COLLECT, task), 2)
        shape = settings.collect_batches, settings.batch
        windows = draw(data, lane, task, keys[0], shape[0] * shape[1])
        statistics = optax_cl.collect(
            opt_state,
            params,
            windows.reshape(*shape, -1),
            task=task_functions,
            stacked=True,
            key=keys[1],
        )
        opt_state = optax_cl.end_task(opt_state, params, statistics)
        opt_state = optax_cl.begin_task(opt_state, params)
        return Carry(params, opt_state, buffer), {}

    def evaluate(data, lane, carry):
        windows = data.heldout[lane.order]
        flat = windows.reshape(-1, windows.shape[-1])
        losses = jax.lax.map(
            lambda window: loss(carry.params, window[None]),
            flat,
            batch_size=2 * settings.batch,
        )
        return {"loss": losses.reshape(windows.shape[:2]).mean(1)}

    return Program(
        name=family.name,
        num_tasks=settings.tasks,
        steps_per_task=settings.steps,
        init=init,
        step=step,
        boundary=boundary,
        evaluate=evaluate,
    )
