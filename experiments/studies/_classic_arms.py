"""The classic methods: how each trains, and what it does at a task's end.

Every method has one compilation; learning rate, strength and scenario are traced. What
a method may read of old tasks is the same for all that keep data: ``KEPT`` examples of
each past task, drawn at random unless the method chooses them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_cl
from experiments.studies import _classic_data as data
from optax_cl import distillation, isolation, penalties, replay

KEPT = 40  # stored examples of each past task
BATCH = 32
_TASKS, _CLASSES = data.TASKS, data.CLASSES


class Lane(NamedTuple):
    """One scenario, strength, learning rate and seed."""

    seed: chex.Array  # int32 []
    problem: chex.Array  # int32 [], the seed's index into the data
    scenario: chex.Array  # int32 []
    rate: chex.Array  # float32 []
    strength: chex.Array  # float32 []


class Now(NamedTuple):
    """What one step may read."""

    data: data.Data
    lane: Lane
    task: chex.Array  # int32 []
    batch: dict  # of the current task
    chosen: chex.Array  # int32 [tasks, KEPT], rows of the stored examples
    dark: chex.Array  # float32 [tasks, KEPT, classes], outputs when they were stored
    teacher: chex.ArrayTree  # parameters at the last boundary
    key: chex.PRNGKey

    @property
    def old(self) -> chex.Array:
        """Classes of earlier tasks, bool ``[classes]``."""
        domain = self.lane.scenario == 0
        return jnp.where(domain, self.task > 0, jnp.arange(_CLASSES) < 2 * self.task)

    @property
    def seen(self) -> chex.Array:
        """Those and the current task's."""
        domain = self.lane.scenario == 0
        return domain | (jnp.arange(_CLASSES) < 2 * (self.task + 1))

    def drawn(self, current: int = 0) -> tuple[dict, chex.Array, chex.Array]:
        """A batch of stored examples, the outputs then, and its weight: 0 or 1.

        With ``current=1`` the current task's are among them.
        """
        pick, slot = jax.random.split(self.key)
        tasks = jnp.maximum(self.task + current, 1)
        task = jax.random.randint(pick, [BATCH], 0, tasks)
        slot = jax.random.randint(slot, [BATCH], 0, KEPT)
        batch = data.rows(self.data, self.lane, task, self.chosen[task, slot])
        return batch, self.dark[task, slot], 1.0 * (self.task > 0)

    def stored(self) -> dict:
        """Stored examples, ``[tasks, KEPT, ...]``; later tasks' are not to be read."""
        tasks = jnp.broadcast_to(jnp.arange(_TASKS)[:, None], self.chosen.shape)
        return data.rows(self.data, self.lane, tasks, self.chosen)


def _logits(params, batch):
    return jnp.where(batch["may"], data.outputs(params, batch["x"]), -1e9)


def cross_entropy(params: chex.ArrayTree, batch: dict) -> chex.Array:
    """``[B]``, among the classes that compete."""
    return optax.softmax_cross_entropy_with_integer_labels(
        _logits(params, batch), batch["y"]
    )


def _plain(params, now):
    return cross_entropy(params, now.batch).mean()


def _lwf(params, now):
    x = now.batch["x"]
    kept = distillation.lwf_loss(
        data.outputs(params, x), data.outputs(now.teacher, x), old=now.old
    )
    return _plain(params, now) + now.lane.strength * kept.mean()


def _der(params, now):
    batch, dark, weight = now.drawn()
    again, _, _ = now._replace(key=jax.random.fold_in(now.key, 1)).drawn()
    matched = replay.der_loss(data.outputs(params, batch["x"]), dark).mean()
    labelled = cross_entropy(params, again).mean()
    return _plain(params, now) + now.lane.strength * weight * (matched + labelled)


def _er_ace(params, now):
    # Only in the memory do new classes compete with old ones, so it must hold both.
    batch, _, weight = now.drawn(current=1)
    present = replay.classes_in(now.batch["y"], _CLASSES)
    new = replay.er_ace_loss(
        data.outputs(params, now.batch["x"]), now.batch["y"], present=present
    )
    past = replay.er_ace_loss(
        data.outputs(params, batch["x"]), batch["y"], present=now.seen
    )
    return new.mean() + weight * past.mean()


def _icarl(params, now):
    """New and stored examples alike: as many of each as there are."""
    batch, _, _ = now.drawn()
    stored = KEPT * now.task
    share = stored / (stored + 2 * 125)
    take = jax.random.uniform(jax.random.fold_in(now.key, 1), [BATCH]) < share
    mixed = jax.tree.map(
        lambda a, b: jnp.where(jnp.expand_dims(take, range(1, a.ndim)), a, b),
        batch,
        now.batch,
    )
    return replay.icarl_loss(
        data.outputs(params, mixed["x"]),
        mixed["y"],
        teacher_logits=data.outputs(now.teacher, mixed["x"]),
        old=now.old,
        seen=now.seen,
    ).mean()


def _progressive(params, now):
    z = data.outputs(params, now.batch["x"]).reshape(-1, _TASKS, _CLASSES)
    z = jnp.where(now.batch["may"], z[:, now.task], -1e9)
    return optax.softmax_cross_entropy_with_integer_labels(z, now.batch["y"]).mean()


def _nothing(params, now):
    return {}


def _drawn_gradient(params, now):
    batch, _, weight = now.drawn()
    return jax.grad(lambda p: cross_entropy(p, batch).mean())(params), weight


def _reference(params, now):
    gradient, weight = _drawn_gradient(params, now)
    return {"reference_updates": jax.tree.map(lambda g: weight * g, gradient)}


def _replayed(params, now):
    gradient, weight = _drawn_gradient(params, now)
    return {"replay_updates": gradient, "replay_weight": weight}


def _memories(params, now):
    gradients = jax.vmap(jax.grad(lambda p, b: cross_entropy(p, b).mean()), (None, 0))(
        params, now.stored()
    )
    return {"memory_updates": gradients, "memory_mask": jnp.arange(_TASKS) < now.task}


def _sensitive(params, batch):
    # Of a squared length a logit of -1e9 would be all.
    return jnp.where(batch["may"], data.outputs(params, batch["x"]), 0.0)


_TASK = optax_cl.classification(_logits, lambda batch: batch["y"])._replace(
    layer_inputs=lambda params, batch: data.inputs(params, batch["x"])
)


class Method(NamedTuple):
    """One row of the tables."""

    name: str
    keeps: str  # what it keeps of old tasks
    optimizer: Callable[[Lane], optax.GradientTransformationExtraArgs]
    strengths: tuple[float, ...] = (0.0,)
    objective: Callable[[Any, Now], chex.Array] = _plain
    extra: Callable[[Any, Now], dict] = _nothing
    scenarios: tuple[str, ...] = data.SCENARIOS
    # What its statistics are computed from.
    about: optax_cl.Task = _TASK
    # Batches of all tasks so far, as if nothing were ever out of reach.
    joint: bool = False
    # Whether Adam's moments start anew with each task, which trains other weights.
    resets: bool = False


def _adam(*modifiers, post=()):
    """Modifiers before decoupled Adam, and links behind it."""

    def optimizer(lane):
        return optax_cl.chain(
            *(modifier(lane) for modifier in modifiers),
            optax_cl.scale_by_decoupled_adam(),
            *post,
            optax.scale_by_learning_rate(lane.rate),
        )

    return optimizer


def _protected(rank, *links, **settings):
    def optimizer(lane):
        own = {k: v(lane) if callable(v) else v for k, v in settings.items()}
        inside = [link(lane) if callable(link) else link for link in links]
        return optax.chain(
            optax_cl.protect(rank, *inside, **own),
            optax.scale_by_learning_rate(lane.rate),
        )

    return optimizer


def _last(link):
    def optimizer(lane):
        return optax.chain(optax.adam(lane.rate), link)

    return optimizer


def _subspace(memory, scale=None):
    return _protected(
        64,
        optax_cl.scale_by_decoupled_adam(),
        optax_cl.project(scale=scale),
        statistic="inputs",
        memory=memory,
        threshold=lambda lane: lane.strength,
    )


def _attenuated(rule):
    return _protected(
        24,
        lambda lane: optax_cl.attenuate(rule(lane.strength)),
        optax_cl.scale_by_decoupled_adam(),
    )


_TOLD = ("domain", "task")
_DATA = f"{KEPT} examples a task"


def _methods() -> dict[str, Method]:
    large = (1.0, 10.0, 100.0, 1e3, 1e4)
    thresholds = (0.6, 0.8, 0.9, 0.95, 0.99)
    methods = [
        Method("fine-tuning", "nothing", _adam()),
        Method(
            "EWC",
            "anchor, Fisher",
            _adam(lambda lane: optax_cl.ewc(lane.strength)),
            large,
        ),
        Method(
            "online EWC",
            "anchor, Fisher",
            _adam(
                lambda lane: optax_cl.ewc(
                    lane.strength, anchors="latest", accumulate="decay", decay=0.9
                )
            ),
            large,
        ),
        Method(
            "Kronecker",
            "anchor, two factors",
            _adam(lambda lane: penalties.kronecker_laplace(lane.strength)),
            large,
        ),
        Method(
            "SI",
            "anchor, path integral",
            _adam(lambda lane: optax_cl.si(lane.strength)),
            (0.01, 0.05, 0.2, 1.0),
        ),
        Method(
            "MAS",
            "anchor, sensitivity",
            _adam(lambda lane: optax_cl.mas(lane.strength)),
            (0.003, 0.01, 0.1, 1.0, 10.0),
            about=optax_cl.Task(outputs=_sensitive),
        ),
        Method("LwF", "the last network", _adam(), (0.3, 1.0, 3.0, 10.0), _lwf),
        Method(
            "OGD",
            "40 gradients a task",
            _adam(post=(optax_cl.ogd(_TASKS, samples=KEPT, overflow="drop"),)),
        ),
        Method("GPM", "basis of inputs", _subspace("grow"), thresholds),
        Method("SGP", "basis of inputs", _subspace("grow", 10.0), thresholds),
        Method("Adam-NSCL", "basis of inputs", _subspace("all"), thresholds),
        Method(
            "ratchet",
            "24 directions, anchor",
            _attenuated(optax_cl.ratchet),
            (0.5, 0.75, 0.9, 1.0),
        ),
        Method(
            "balance",
            "24 directions, anchor, curvature",
            _attenuated(optax_cl.balance),
            large,
        ),
        Method("A-GEM", _DATA, _adam(lambda lane: optax_cl.agem()), extra=_reference),
        Method("A-GEM behind", _DATA, _adam(post=(optax_cl.agem(),)), extra=_reference),
        Method(
            "GEM",
            _DATA,
            _adam(lambda lane: optax_cl.gem(margin=lane.strength)),
            (0.0, 0.5, 1.0, 2.0),
            extra=_memories,
        ),
        Method(
            "PCGrad",
            _DATA,
            _adam(lambda lane: optax_cl.pcgrad(reduce="mean")),
            extra=_memories,
        ),
        Method(
            "replay",
            _DATA,
            _adam(lambda lane: optax_cl.mix_replay(lane.strength)),
            (0.25, 0.5, 0.75, 0.9),
            extra=_replayed,
        ),
        Method("DER++", f"{_DATA} and outputs", _adam(), (0.1, 0.5, 1.0, 2.0), _der),
        Method("ER-ACE", _DATA, _adam(), objective=_er_ace, scenarios=("class",)),
        Method(
            "iCaRL",
            f"{_DATA}, the last network",
            _adam(),
            objective=_icarl,
            scenarios=("class",),
        ),
        Method(
            "PackNet",
            "owners; task told",
            _last(isolation.packnet()),
            (0.5, 0.75, 0.85, 0.9),
            scenarios=_TOLD,
            resets=True,
        ),
        Method(
            "Progressive",
            "five columns; task told",
            _last(isolation.progressive(_TASKS, inputs="^in$")),
            objective=_progressive,
            scenarios=_TOLD,
            resets=True,
        ),
        Method("all data", "everything", _adam(), joint=True),
    ]
    return {m.name: m for m in methods}


METHODS = _methods()


class Setting(NamedTuple):
    """What is chosen for a method in a scenario."""

    scenario: str
    strength: float
    rate: float


def make_lanes(settings: list[Setting], seeds: dict[int, int]) -> Lane:
    """All settings and seeds, in this order of axes, as one tree.

    Args:
      settings: What is run.
      seeds: Seed to its index into the data.
    """
    found = [
        Lane(
            np.int32(seed),
            np.int32(index),
            np.int32(data.SCENARIOS.index(setting.scenario)),
            np.float32(setting.rate),
            np.float32(setting.strength),
        )
        for setting in settings
        for seed, index in seeds.items()
    ]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *found)
