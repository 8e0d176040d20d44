"""Low-rank adapters on a network that has to learn five tasks more.

**Question.** Do the updates of low-rank adapters concentrate in few directions, is that
what makes a network forget, and does it help to start adapters away from directions
that hurt old tasks?

**Setting.** ``_lora_data``: a small network that has learnt the digits; five tasks,
each with other pixels exchanged; weights frozen, rank-8 adapters on every kernel,
merged after each task. 250 Adam steps of 64 images a task. A second stream renames the
classes from task to task as well, so that tasks contradict each other.

**Arms.** Adapters A B under plain training, O-LoRA (penalty, and projection), frozen A
with a memory of old gradients, and replay; EBLoRA with its parts taken away one by one:
the memory, the flat spectrum (singular values that fall by .6 each, at the same norm),
the common magnitude (one for each direction instead), the tangent map, the start.
Starts: LoRA, orthogonal, PiSSA, LoRAM, LoRA-GA, and SLICE with full and half strength,
per kernel and over all of them, and without its gate. Starts are compared with each
other only: they share ranks and scales that the other arms do not have.

**Choices.** Every arm takes, for each stream, the learning rate of the best final
accuracy on tuning seeds, which are disjoint from the reporting seeds.

**Controls.** Accuracy right after learning stands beside every final accuracy, and arms
are compared with plain LoRA where that learns equally well: a lower learning rate alone
forgets less too. An adapter for each task, picked by the task's number, is a bar that
needs to be told the task; replay one that keeps the data.
"""

import dataclasses
from pathlib import Path
from typing import Literal

from experiments import engine, run_folder
from experiments.studies import Study, field
from experiments.studies import _configs as configs
from experiments.studies import _lora_arms as arms
from experiments.studies import _lora_data as data
from experiments.studies import _lora_program as program
from experiments.studies import _lora_report as reporting
from experiments.studies import _lora_results as results

QUICK = (
    "LoRA",
    "frozen A",
    "EBLoRA",
    "EBLoRA steep",
    "EBLoRA no memory",
    "init LoRA",
    "init LoRA-GA",
    "SLICE 1",
)
_WORDS = reporting.Words(
    streams={
        "pixels": "pixels exchanged",
        "labels": "pixels exchanged and classes renamed",
    },
    base="base task",
    base_note="Base task: accuracy on upright digits at the end.",
    groups={"first kernel": [0], "second kernel": [1], "last kernel": [2]},
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the study."""

    streams: tuple[Literal["pixels", "labels"], ...] = field(
        ("pixels", "labels"), quick=("pixels",), help="which streams to run"
    )
    arms: tuple[str, ...] = field((), quick=QUICK, help="names of arms; none: all")
    seeds: int = field(10, quick=4, minimum=2, help="seeds that are reported")
    first_seed: int = field(1000, minimum=0, help="the first of them")
    tuning: int = field(3, quick=2, minimum=1, help="seeds that choose learning rates")
    first_tuning_seed: int = field(0, minimum=0, help="the first of them")
    rates: tuple[float, ...] = field(
        (3e-4, 1e-3, 3e-3, 1e-2),
        quick=(1e-3, 3e-3),
        minimum=1e-9,
        help="learning rates",
    )
    steps: int = field(250, minimum=1, help="steps per task")


def check(config: Config) -> None:
    """Refuses unknown arms, seeds in two roles, and missing images."""
    configs.check_arms(config.arms, list(arms.ARMS))
    configs.check_seeds(config)
    configs.check_distinct(config, "streams", "arms", "rates")
    configs.check_digits()


def programs(config: Config) -> dict[str, list[tuple[arms.Arm, str]]]:
    """The (arm, stream) pairs of each family that is run."""
    found: dict[str, list[tuple[arms.Arm, str]]] = {}
    for arm in arms.ARMS.values():
        if not config.arms or arm.name in config.arms:
            for stream in arm.streams:
                if stream in config.streams:
                    found.setdefault(arm.family, []).append((arm, stream))
    return found


def run(config: Config, folder: Path, context: engine.Context) -> dict:
    """Runs every arm; returns the numbers of ``results.json``."""
    tuning, reported = configs.seeds(config)
    seeds = tuning + reported
    chosen = programs(config)
    lanes = sum(map(len, chosen.values())) * len(config.rates) * len(seeds)
    context.progress.plan(lanes * data.TASKS * config.steps)
    everything = data.make_data(seeds)
    for name, pairs in chosen.items():
        context.run(
            program.make_program(data.BENCH, arms.FAMILIES[name], config.steps),
            everything,
            arms.make_lanes(pairs, data.STREAMS, config.rates, seeds),
            chunk_steps=config.steps,
        )
    return reporting.summarize(results.load(folder, chosen, config))


def report(folder: Path):
    """Tables, figures and claims of a finished run."""
    config = run_folder.read_config(folder, Config)
    tuning, reported = configs.seeds(config)
    summary = (
        f"Accuracies on held-out images, mean and standard error over {len(reported)} "
        f"seeds. Learning rates were chosen on {len(tuning)} other seeds, from "
        f"{', '.join(f'{r:g}' for r in config.rates)}."
    )
    loaded = results.load(folder, programs(config), config)
    return reporting.report(loaded, _WORDS, summary)


STUDY = Study(
    "lora_digits",
    "low-rank adapters: spectra, geometry, starts (minutes)",
    Config,
    run,
    report,
    check,
)
