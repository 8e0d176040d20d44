"""A small language model learns text domains one after another.

**Question.** Under Adam, does it matter which gradient each moment reads when a method
against forgetting modifies the gradient? And what does each method buy, once learning
less is not mistaken for forgetting less?

**Model.** A causal transformer over bytes (``experiments.models.byte_lm``), trained
from scratch with Adam (b2 = 0.99), whose state is carried from domain to domain; the
learning rate decays linearly to zero within each domain.

**Boundaries.** The stream tells when a domain ends. There 32 batches of it give what a
method asks for: gradients with labels drawn from the model span the protected subspace
(8 directions on the fan-in side of every kernel, all finished domains together) and
give the curvature in it; 256 windows give EWC's Fisher. Adam's state is kept.

**Stream.** Each seed draws an order of the domains and a new model. All arms of one
seed see the same order and the same batches, so differences to plain Adam ("vanilla")
are taken seed by seed.

**Measures**, on text held out from every domain, in nats per byte and as perplexity:
final loss, forgetting (final minus best loss before the last domain, mean over all
domains but the last), and the loss right after learning each domain: a method that
learns less forgets less, so the first two mean nothing without the third.

**Choices.** Strengths .25 to 1 and kappa = 1 are set, not tuned. The share of replay
and the weight of EWC were chosen by final loss on seeds that are never reported.

**Controls.** Vanilla with other learning rates gives a curve of final loss over
learning loss; every arm is compared with that curve at its own learning loss.
"""

import dataclasses
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import numpy as np

from experiments import data, engine, run_folder
from experiments.models import byte_lm
from experiments.studies import Study, field
from experiments.studies import _configs as configs
from experiments.studies import _stream_arms as arms
from experiments.studies import _stream_program as program
from experiments.studies import _stream_report as reporting

# Seeds on which settings may be chosen. Reporting seeds start at 0 and stay below.
TUNING_SEEDS = range(1_000_000, 1_000_100)


class Size(NamedTuple):
    """A model and how it wants to be trained."""

    model: byte_lm.ByteLMConfig
    batch: int  # windows per batch
    steps: int  # per domain
    learning_rate: float
    b2: float  # the second moment forgets well within one domain
    rank: int


SIZES = {
    "small": Size(byte_lm.SMALL, 8, 250, 4e-3, b2=0.99, rank=8),
    # Made for text of your own: mini8 would be read a hundred times over.
    "full": Size(byte_lm.FULL, 32, 2_000, 3e-4, b2=0.999, rank=64),
}
_CHUNKS_PER_TASK = 5
_COLLECT_BATCHES = 32
_EVALUATED_WINDOWS = 256
_PROBE_WINDOWS = 16


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the study; 0 means what the model's size suggests."""

    stream: str = field(
        "mini8", help="mini8, aws16, ng16, or a folder with one text file per domain"
    )
    arms: tuple[str, ...] = field(
        ("core",), quick=("quick",), help="core, quick, all, or names of arms"
    )
    seeds: int = field(5, quick=2, minimum=2, maximum=1_000_000, help="number of seeds")
    first_seed: int = field(0, minimum=0, maximum=999_999, help="the first seed")
    domains: int = field(
        0, quick=4, minimum=0, help="most domains that a seed visits; 0: all"
    )
    size: Literal["small", "full"] = field(
        "small", help="small: two CPU cores; full: a GPU (12 layers of width 768)"
    )
    steps: int = field(0, minimum=0, help="steps per domain; 0: as the size suggests")
    batch: int = field(0, minimum=0, help="windows per batch; 0: as the size suggests")
    learning_rate: float = field(
        0.0, minimum=0.0, help="Adam's rate; 0: as the size suggests"
    )
    rank: int = field(
        0, minimum=0, help="columns of each protected basis; 0: as the size suggests"
    )
    buffer: float = field(
        0.005, minimum=1e-6, maximum=1.0, help="share of a domain that replay may keep"
    )


def check(config: Config) -> None:
    """Raises ValueError for a stream or arms that cannot be run."""
    chosen_arms(config.arms)
    if config.first_seed + config.seeds > TUNING_SEEDS.start:
        raise ValueError(
            f"`--first-seed` {config.first_seed} with {config.seeds} seeds runs into "
            f"the seeds kept for tuning, {TUNING_SEEDS.start} and up."
        )
    stream = data.load_stream(config.stream)
    if config.domains == 1:
        raise ValueError(
            "`--domains` must be 0 or at least 2: with one domain nothing is forgotten."
        )
    model = SIZES[config.size].model
    narrowest = min(model.width, model.hidden)
    if config.rank > narrowest:
        raise ValueError(
            f"`--rank` {config.rank} is larger than {narrowest}, the smallest fan-in "
            f"of the model's kernels."
        )
    context = model.context
    for name, text in zip(stream.names, stream.heldout, strict=True):
        if len(text) <= context:
            raise ValueError(
                f"the domain {name!r} of {config.stream!r} is too short for a context "
                f"of {context} bytes: its held-out tenth has {len(text)}."
            )


def chosen_arms(names: tuple[str, ...]) -> tuple[arms.Arm, ...]:
    """The arms behind names and names of groups; vanilla always comes first."""
    groups = {"core": arms.CORE, "quick": arms.QUICK, "all": tuple(arms.ARMS)}
    wanted = ["vanilla"]
    for name in names:
        wanted += groups.get(name, (name,))
    configs.check_arms(wanted, [*groups, *arms.ARMS])
    return tuple(arms.ARMS[name] for name in dict.fromkeys(wanted))


def orders(config: Config, num_domains: int) -> np.ndarray:
    """Each seed's order of domains, ``[seeds, domains]``, from the seed alone."""
    count = min(config.domains or num_domains, num_domains)
    return np.stack(
        [
            np.random.default_rng(seed).permutation(num_domains)[:count]
            for seed in _seeds(config)
        ]
    ).astype(np.int32)


def _seeds(config):
    """The reporting seeds."""
    return list(range(config.first_seed, config.first_seed + config.seeds))


def run(config: Config, folder: Path, context: engine.Context) -> dict:
    """Trains every arm on every seed; returns the summary of ``results.json``."""
    stream = data.load_stream(config.stream)
    divergences = data.divergence_matrix(stream)
    context.progress.say(data.divergence_table(stream.names, divergences))
    order = orders(config, len(stream.names))
    # Before the first step, so that nobody has seen a result when the orders are fixed.
    run_folder.write_json(
        folder / "stream.json",
        {
            "names": stream.names,
            "seeds": _seeds(config),
            "orders": order,
            "divergences": divergences,
        },
    )
    settings = _settings(config, stream, order.shape[1])
    arrays = program.make_data(
        stream, settings.model.context, _EVALUATED_WINDOWS, _PROBE_WINDOWS
    )
    selected = chosen_arms(config.arms)
    work = len(selected) * order.size * settings.steps
    context.progress.plan(work)
    for family in arms.FAMILIES.values():
        members = [arm for arm in selected if arm.family == family.name]
        if members:
            context.run(
                program.make_program(family, settings),
                arrays,
                _lanes(config, members, order, arrays),
                chunk_steps=max(1, settings.steps // _CHUNKS_PER_TASK),
            )
    return reporting.summarize(folder, selected)


def report(folder: Path):
    """Tables, figures and claims of a finished run."""
    config = run_folder.read_json(Path(folder) / "config.json")["config"]
    return reporting.report(Path(folder), chosen_arms(tuple(config["arms"])))


def _settings(config, stream, tasks):
    size = SIZES[config.size]
    mean_length = np.mean([len(text) for text in stream.train])
    return program.Settings(
        model=size.model,
        common=program.Common(size.b2, config.rank or size.rank),
        tasks=tasks,
        steps=config.steps or size.steps,
        batch=config.batch or size.batch,
        memory=max(1, round(config.buffer * mean_length / (size.model.context + 1))),
        collect_batches=_COLLECT_BATCHES,
    )


def _lanes(config, members, order, arrays):
    """All pairs of an arm and a seed, arms outermost, as one tree of arrays."""
    rate = config.learning_rate or SIZES[config.size].learning_rate
    lanes = [
        program.Lane(
            seed=np.int32(seed),
            order=order[index],
            learning_rate=np.float32(rate * arm.learning_rate),
            strength=np.float32(arm.strength),
            joint=np.bool_(arm.joint),
            digest=np.uint32(program.digest(arrays)),
        )
        for arm in members
        for index, seed in enumerate(_seeds(config))
    ]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *lanes)


STUDY = Study(
    "domain_stream",
    "text domains one after another: routing, strength, penalties, replay",
    Config,
    run,
    report,
    check,
)
