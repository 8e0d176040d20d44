"""The arms of the adapter studies: what is trained, where it starts, what protects.

Arms of one family share one compilation: numbers and starts are traced.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_cl import lora


class Arm(NamedTuple):
    """One row of the tables; numbers that its family does not read stay as they are."""

    name: str
    family: str
    start: str = "lora"
    strength: float = 0.0  # O-LoRA's lambda, or SLICE's c
    threshold: float = 0.0  # share of gradient energy that the memory keeps; 0: none
    decay: float = 1.0  # singular values fall by this factor from one to the next
    magnitude: float = 0.02  # EBLoRA's |s| at the start of a task
    multiplier: float = 1.0  # of EBLoRA's steps on the directions
    streams: tuple[str, ...] = ("pixels",)


class Lane(NamedTuple):
    """One arm, learning rate and seed."""

    seed: chex.Array  # int32 []
    problem: chex.Array  # int32 [], the seed's index into the data
    stream: chex.Array  # int32 []
    rate: chex.Array  # float32 []
    start: chex.Array  # int32 [], index into STARTS
    strength: chex.Array  # float32 []
    threshold: chex.Array  # float32 []
    decay: chex.Array  # float32 []
    magnitude: chex.Array  # float32 []
    multiplier: chex.Array  # float32 []


class Started(NamedTuple):
    """How a task begins."""

    params: chex.ArrayTree  # frozen from here on
    adapters: lora.Adapters
    open: chex.Array  # float32 [matrices], whether the surgery's gate was open
    cosine: chex.Array  # float32 [matrices], of the task's gradient to the old tasks'


class Given(NamedTuple):
    """What a start may read."""

    params: chex.ArrayTree
    gradients: dict[str, chex.Array]  # of the new task
    reference: dict[str, chex.Array]  # mean over the old tasks; zero for the first
    conflicts: chex.Array  # bool [], false for the first task
    memory: dict[str, chex.Array] | None  # where the family has one
    key: chex.PRNGKey


class Family(NamedTuple):
    """What one compilation runs."""

    name: str
    # (targets, lane, memory columns by path) -> optimizer of the adapters
    optimizer: Callable[..., optax.GradientTransformationExtraArgs]
    # (targets, lane, given) -> Started
    start: Callable[[lora.Targets, Lane, Given], Started]
    # Scale and ranks of the papers that compare starts.
    surgical: bool = False
    # Half of each batch is from old tasks.
    replay: bool = False
    # An adapter for each task, picked by the task's number.
    separate: bool = False


CAPACITY = 8  # tasks that O-LoRA remembers
STARTS = (
    "lora",
    "orthogonal",
    "pissa",
    "loram",
    "lora_ga",
    "slice without",
    "slice",
    "slice global",
    "slice always",
)


def _adam(rate):
    return optax.chain(optax.scale_by_adam(), optax.scale_by_learning_rate(rate))


def _plain(targets, lane, memory):
    return _adam(lane.rate)


def _olora(targets, lane, memory):
    return optax.chain(
        lora.olora(lane.strength, capacity=CAPACITY, overflow="oldest"),
        _adam(lane.rate),
    )


def _olora_project(targets, lane, memory):
    return optax.chain(
        _adam(lane.rate), lora.olora_project(capacity=CAPACITY, overflow="oldest")
    )


def _frozen_a(targets, lane, memory):
    return optax.chain(
        lora.frozen_a(targets=targets, memory_rank=memory, threshold=lane.threshold),
        _adam(lane.rate),
    )


def _eblora(metric):
    def optimizer(targets, lane, memory):
        return lora.eblora(
            _adam(lane.rate),
            _adam(lane.rate),
            targets=targets,
            memory_rank=memory,
            threshold=lane.threshold,
            metric=metric,
            step_multiplier=lane.multiplier,
        )

    return optimizer


def matrices(targets: lora.Targets) -> int:
    """How many kernels are adapted, those of a stack counted one by one."""
    return sum(math.prod(t.matrix_shape[:-2]) for t in targets.values())


def _quiet(targets, params, adapters):
    nothing = jnp.zeros([matrices(targets)], jnp.float32)
    return Started(params, adapters, nothing, nothing)


def _lora_start(targets, lane, given):
    return _quiet(targets, *lora.lora_init(targets, given.params, given.key)[:2])


def _frozen_start(targets, lane, given):
    adapters = lora.frozen_a_init(targets, given.gradients, given.memory)
    return _quiet(targets, given.params, adapters)


def _eblora_start(diagonal):
    def start(targets, lane, given):
        adapters = lora.eblora_init(
            targets, given.gradients, given.memory, magnitude=lane.magnitude
        )
        if diagonal:
            adapters = {
                path: a._replace(s=jnp.repeat(a.s[..., None], a.v.shape[-1], axis=-1))
                for path, a in adapters.items()
            }
        return _quiet(targets, given.params, adapters)

    return start


def flat(tree: dict[str, chex.Array]) -> chex.Array:
    """One number per matrix, by path, as ``[matrices]``."""
    parts = [jnp.ravel(tree[path]).astype(jnp.float32) for path in sorted(tree)]
    return jnp.concatenate(parts)


def view(lane: Lane, adapters: lora.Adapters) -> lora.Adapters:
    """The adapters as the network uses them: with the arm's spectrum."""

    def one(adapter):
        if (
            not isinstance(adapter, lora.Spectral)
            or adapter.s.ndim == adapter.v.ndim - 1
        ):
            return adapter
        weights = lane.decay ** jnp.arange(adapter.v.shape[-1], dtype=jnp.float32)
        weights = weights / jnp.sqrt(jnp.mean(weights**2))  # the same Frobenius norm
        return adapter._replace(s=adapter.s[..., None] * weights)

    return {path: one(a) for path, a in adapters.items()}


def _surgical_start(targets, lane, given):
    def plain(init):
        return lambda: _quiet(targets, *init()[:2])

    def surgery(granularity, gate="conflict"):
        def run():
            started = lora.slice_init(
                targets,
                given.params,
                given.gradients,
                given.reference,
                strength=jnp.where(given.conflicts, lane.strength, 0.0),
                granularity=granularity,
                gate=gate,
            )
            d = started.diagnostics
            return Started(
                started.params, started.adapters, flat(d.gate_open), flat(d.cosine)
            )

        return run

    params, gradients, key = given.params, given.gradients, given.key
    branches = {
        "lora": plain(lambda: lora.lora_init(targets, params, key)),
        "orthogonal": plain(lambda: lora.orthogonal_init(targets, params, key)),
        "pissa": plain(lambda: lora.pissa_init(targets, params)),
        "loram": plain(lambda: lora.loram_init(targets, params)),
        "lora_ga": plain(lambda: lora.lora_ga_init(targets, params, gradients)),
        # As SLICE compares with it: in the other order, as large as LoRAM.
        "slice without": plain(lambda: lora.slice_init(targets, params, gradients)),
        "slice": surgery("leaf"),
        "slice global": surgery("global"),
        "slice always": surgery("leaf", "always"),
    }
    return jax.lax.switch(lane.start, [branches[name] for name in STARTS])


FAMILIES = {
    f.name: f
    for f in (
        Family("lora", _olora, _lora_start),
        Family("olora-project", _olora_project, _lora_start),
        Family("frozen-a", _frozen_a, _frozen_start),
        Family("eblora", _eblora("euclidean"), _eblora_start(False)),
        Family("canonical", _eblora("canonical"), _eblora_start(False)),
        Family("diagonal", _eblora("euclidean"), _eblora_start(True)),
        Family("replay", _olora, _lora_start, replay=True),
        Family("separate", _olora, _lora_start, separate=True),
        Family("starts", _plain, _surgical_start, surgical=True),
    )
}
_BOTH = ("pixels", "labels")


def _arms() -> dict[str, Arm]:
    kept = 0.95
    arms = [
        Arm("LoRA", "lora"),
        Arm("O-LoRA .1", "lora", strength=0.1),
        Arm("O-LoRA .5", "lora", strength=0.5),
        Arm("O-LoRA projected", "olora-project"),
        Arm("frozen A", "frozen-a", threshold=kept),
        Arm("EBLoRA", "eblora", threshold=kept),
        Arm("EBLoRA steep", "eblora", threshold=kept, decay=0.6),
        Arm("EBLoRA no memory", "eblora"),
        Arm("EBLoRA steep no memory", "eblora", decay=0.6),
        Arm("EBLoRA s0=0", "eblora", threshold=kept, magnitude=0.0),
        Arm("EBLoRA x22.6", "eblora", threshold=kept, multiplier=float(np.sqrt(512))),
        Arm("EBLoRA canonical", "canonical", threshold=kept),
        Arm("EBLoRA diagonal", "diagonal", threshold=kept),
        Arm("LoRA + replay", "replay"),
        Arm("LoRA per task", "separate"),
        Arm("init LoRA", "starts", "lora", streams=_BOTH),
        Arm("init orthogonal", "starts", "orthogonal"),
        Arm("init PiSSA", "starts", "pissa"),
        Arm("init LoRAM", "starts", "loram", streams=_BOTH),
        Arm("init LoRA-GA", "starts", "slice without", streams=_BOTH),
        Arm("init LoRA-GA published", "starts", "lora_ga"),
        Arm("SLICE .5", "starts", "slice", 0.5, streams=_BOTH),
        Arm("SLICE 1", "starts", "slice", 1.0, streams=_BOTH),
        Arm("SLICE global", "starts", "slice global", 1.0, streams=_BOTH),
        Arm("always project", "starts", "slice always", 1.0, streams=_BOTH),
    ]
    return {arm.name: arm for arm in arms}


ARMS = _arms()


def make_lanes(
    chosen: list[tuple[Arm, str]],
    streams: tuple[str, ...],
    rates: tuple[float, ...],
    seeds: tuple[int, ...],
) -> Any:
    """All (arm, stream), rates and seeds, in this order of axes, as one tree."""
    lanes = [
        Lane(
            seed=np.int32(seed),
            problem=np.int32(index),
            stream=np.int32(streams.index(stream)),
            rate=np.float32(rate),
            start=np.int32(STARTS.index(arm.start)),
            strength=np.float32(arm.strength),
            threshold=np.float32(arm.threshold),
            decay=np.float32(arm.decay),
            magnitude=np.float32(arm.magnitude),
            multiplier=np.float32(arm.multiplier),
        )
        for arm, stream in chosen
        for rate in rates
        for index, seed in enumerate(seeds)
    ]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *lanes)
