"""Low-rank adapters on a pre-trained language model that learns six text tasks.

**Question.** What the digits say of adapters (``lora_digits``): does it hold for a real
model, SmolLM2-135M, on real text?

**Setting.** Film reviews, news topics, business reports, headlines, newsgroups and film
recommendations, each a question answered by one word; see ``_lora_text_data``. Every
seed has an order of its own. Weights are frozen; rank-8 adapters on the attention
kernels of the last layers are trained with Adam and merged after each task. All layers
run: those before the adapted ones once for each text, the others in every step.

**Sizes.** ``small`` adapts the last layer and reads short texts, so that two CPU cores
do it; ``full`` adapts all kernels of all layers, for a GPU.

**Mined pairs.** Published "adversarial" sequences have gradients that agree (mean
cosine .21 to .28). Here all pairs of a pool of yes-no questions are ranked by the
cosine of their mean gradients, the lowest are learnt one after the other, and SLICE is
compared with LoRA-GA. At the pre-trained weights every question's gradient says the
same first: answer yes or no. So the model learns this format before, with even odds for
both; see ``_lora_text_mining``.

**Other tasks.** ``--source`` takes a folder or an archive of tasks in the form of
Super-NaturalInstructions. Free answers are learnt and written token by token; see
``_lora_text_generation``. ``--order published`` learns the tasks of SAPT's two
benchmarks in its orders.

**Measures.** Accuracy on held-out texts, as for the digits, and Rouge-L of the answer
where answers are free; and the loss on text of no task, in nats per token: what the
model forgets of its language.

**Choices.** Every arm takes, for each stream, the learning rate of the best final
accuracy on a tuning order (or mined pair), which is not reported.
"""

import dataclasses
import shutil
from pathlib import Path
from typing import Literal

import numpy as np

from experiments import data, engine, run_folder
from experiments.models import smollm2
from experiments.studies import Study, field
from experiments.studies import _configs as configs
from experiments.studies import _lora_arms as arms
from experiments.studies import _lora_program as program
from experiments.studies import _lora_report as reporting
from experiments.studies import _lora_results as results
from experiments.studies import _lora_text_data as text
from experiments.studies import _lora_text_generation as free
from experiments.studies import _lora_text_materials as materials
from experiments.studies import _lora_text_mining_report as mining_report

# What is adapted in each layer that is.
_KERNELS = {
    "small": ("q", "k", "v", "o"),
    "full": ("q", "k", "v", "o", "gate", "up", "down"),
}
QUICK = ("LoRA", "EBLoRA", "init LoRA-GA", "SLICE 1")
CORE = (
    "LoRA",
    "O-LoRA .1",
    "frozen A",
    "EBLoRA",
    "EBLoRA steep",
    "EBLoRA no memory",
    "init LoRA",
    "init LoRA-GA",
    "SLICE 1",
    "SLICE global",
)
_MINED = (
    "init LoRA",
    "init LoRA-GA",
    "SLICE .5",
    "SLICE 1",
    "SLICE global",
    "always project",
)
# Adam moves each entry of an orthonormal factor, and the magnitude that all directions
# share, by the rate; in the same number of steps A and B get much further from zero.
_RATE_SCALES = {"eblora": 10.0}

_STREAM_WORDS = {
    "sequence": "text tasks one after another",
    "mined": "pairs of questions that conflict",
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the study; 0 means what the size suggests."""

    streams: tuple[Literal["sequence", "mined"], ...] = field(
        ("sequence", "mined"), quick=("sequence",), help="which streams to run"
    )
    source: str = field(
        "text6",
        help="text6, or a folder or archive of tasks as in Super-NaturalInstructions",
    )
    only: tuple[str, ...] = field((), help="tasks of the source to take; none: all")
    leave_out: tuple[str, ...] = field((), help="tasks of the source to leave out")
    order: Literal["own", "published"] = field(
        "own", help="own: of each seed's own; published: of SAPT, in turn"
    )
    size: Literal["small", "full"] = field(
        "small", help="small: the last layer, two CPU cores; full: a GPU"
    )
    arms: tuple[str, ...] = field(CORE, quick=QUICK, help="names of arms")
    tasks: int = field(6, quick=3, minimum=2, help="most tasks of a sequence")
    seeds: int = field(5, quick=2, minimum=2, help="orders (and pairs) reported")
    first_seed: int = field(1000, minimum=0, help="the first of them")
    tuning: int = field(2, quick=0, minimum=0, help="orders that choose learning rates")
    first_tuning_seed: int = field(0, minimum=0, help="the first of them")
    rates: tuple[float, ...] = field(
        (1e-3, 3e-3, 1e-2),
        quick=(1e-2,),
        minimum=1e-9,
        help="learning rates; EBLoRA's are ten times these",
    )
    layers: int = field(0, minimum=0, help="last layers that are adapted")
    length: int = field(0, minimum=0, help="tokens of an example")
    batch: int = field(0, minimum=0, help="examples in a batch")
    steps: int = field(0, quick=12, minimum=0, help="steps per task")
    warm: int = field(0, quick=30, minimum=0, help="steps before pairs are mined")
    train: int = field(0, quick=48, minimum=0, help="training texts of each task")
    test: int = field(0, quick=32, minimum=0, help="held-out texts of each task")
    answer: int = field(0, quick=8, minimum=0, help="most tokens of a free answer")


SIZES = {
    "small": {
        "layers": 1,
        "length": 48,
        "batch": 8,
        "steps": 60,
        "warm": 300,
        "train": 128,
        "test": 64,
        "answer": 16,
    },
    "full": {
        "layers": 30,
        "length": 128,
        "batch": 32,
        "steps": 500,
        "warm": 300,
        "train": 1024,
        "test": 512,
        "answer": 50,
    },
}


def check(config: Config) -> None:
    """Refuses unknown arms, seeds in two roles, rates without tuning, missing data."""
    configs.check_arms(config.arms, list(arms.ARMS))
    if len(config.rates) > 1 and not config.tuning:
        raise ValueError("more than one of `--rates` needs `--tuning` of at least 1.")
    configs.check_seeds(config)
    configs.check_distinct(config, "streams", "arms", "rates")
    tasks = _tasks(config)
    if config.order == "published":
        _orders(config, tasks, configs.seeds(config)[1])
    if "mined" in config.streams and not any(task.answers for task in tasks):
        raise ValueError(
            "all tasks have free answers, and pairs are mined from questions that one "
            "word answers; give `--streams sequence`."
        )
    data.model_file("smollm2")


def sized(config: Config) -> dict[str, int]:
    """What the size suggests, where the config says 0."""
    return {k: getattr(config, k) or v for k, v in SIZES[config.size].items()}


def programs(config: Config) -> dict[str, list[tuple[arms.Arm, str]]]:
    """The (arm, stream) pairs of each program: one for a stream and family."""
    found: dict[str, list[tuple[arms.Arm, str]]] = {}
    for stream in config.streams:
        for name in config.arms if stream == "sequence" else _MINED:
            arm = arms.ARMS[name]
            found.setdefault(f"{stream}-{arm.family}", []).append((arm, stream))
    return found


def _tasks(config):
    return data.load_text_tasks(config.source, config.only, config.leave_out)


def _orders(config, tasks, seeds):
    """Indices of each seed's tasks, ``[seeds, tasks of a sequence]``."""
    if config.order == "published":
        known = data.published_orders([task.name for task in tasks])
        orders = [known[seed % len(known)] for seed in seeds]
    else:
        orders = [np.random.default_rng(seed).permutation(len(tasks)) for seed in seeds]
    return np.array(orders, np.int32)[:, : config.tasks]


def run(config: Config, folder: Path, context: engine.Context) -> dict:
    """Trains every arm on every order; returns the numbers of ``results.json``."""
    size = sized(config)
    tuning, reported = configs.seeds(config)
    seeds = tuning + reported
    chosen = programs(config)
    tasks = _tasks(config)
    work = {"sequence": min(config.tasks, len(tasks)), "mined": 2}
    per_stream: dict[str, int] = {
        s: work[s] * size["steps"] * len(seeds) for s in config.streams
    }
    each = [per_stream[stream] for pairs in chosen.values() for _, stream in pairs]
    context.progress.plan(sum(each) * len(config.rates))

    model = smollm2.load()
    if size["layers"] > model.config.layers:
        raise ValueError(f"`--layers` must be at most {model.config.layers}.")
    for stream in config.streams:
        made_from = materials.Materials(
            model, size, _KERNELS[config.size], folder, context.progress.say
        )
        if stream == "sequence":
            # Of tasks with fewer texts than others, texts come again.
            counts = (
                min(size[part], max(len(getattr(task, part)) for task in tasks))
                for part in ("train", "test")
            )
            settings, arrays = made_from.data(stream, tasks, *counts)
            arrays = arrays._replace(order=_orders(config, tasks, seeds))
        else:
            settings, arrays = made_from.mined(tasks, len(tuning), len(reported))
        settings = settings._replace(tasks=work[stream])
        for name, pairs in chosen.items():
            if pairs[0][1] == stream:
                family = arms.FAMILIES[name.removeprefix(f"{stream}-")]
                made = program.make_program(
                    text.make_bench(settings), family, size["steps"]
                )
                scale = _RATE_SCALES.get(family.name, 1.0)
                rates = tuple(scale * rate for rate in config.rates)
                context.run(
                    made._replace(name=name),
                    arrays,
                    arms.make_lanes(pairs, text.STREAMS, rates, seeds),
                    chunk_steps=max(1, size["steps"] // 4),
                )
        if stream == "sequence":
            own = {
                name: pairs for name, pairs in chosen.items() if pairs[0][1] == stream
            }
            taken = [
                task._replace(
                    train=text.chosen(task.train, size["train"]),
                    test=text.chosen(task.test, size["test"]),
                )
                for task in tasks
            ]
            free.record(folder, own, taken, arrays.order, settings.answer, model)
    shutil.rmtree(folder / materials.TRUNK, ignore_errors=True)
    return reporting.summarize(_load(folder, config))


def _load(folder, config):
    """Results of a run, with the score that fits each task."""
    chosen = programs(config)
    loaded = results.load(folder, chosen, config, _RATE_SCALES)
    return free.with_rouge(loaded, folder, chosen)


def report(folder: Path):
    """Tables, figures and claims of a finished run."""
    config = run_folder.read_config(folder, Config)
    size = sized(config)
    # Matrices come by path, and within a path by layer.
    groups = {
        name: [size["layers"] * index + layer for layer in range(size["layers"])]
        for index, name in enumerate(sorted(_KERNELS[config.size]))
    }
    base_note = "General loss: nats per token on text of no task, at the end."
    if config.source != "text6":
        base_note += " Accuracy is Rouge-L for tasks with free answers."
    words = reporting.Words(
        streams=_STREAM_WORDS,
        base="general loss",
        base_note=base_note,
        groups=groups,
        base_higher=False,
    )
    _, reported = configs.seeds(config)
    adapted = "all" if size["layers"] == 30 else f"the last {size['layers']}"
    chosen = ", ".join(f"{r:g}" for r in config.rates)
    summary = (
        f"SmolLM2-135M (weights of 4 bits, dequantised), adapters on {adapted} of 30 "
        f"layers, {size['length']} tokens, {size['steps']} steps of {size['batch']} "
        f"texts a task, of {size['train']}. Accuracies on {size['test']} held-out "
        f"texts of each task, mean and standard error over {len(reported)} orders (of "
        f"mined pairs: over pairs). Learning rates from {chosen} (of EBLoRA "
        f"{_RATE_SCALES['eblora']:g} times these), by {config.tuning} other orders."
    )
    if config.source != "text6":
        summary += (
            f" Where answers are free, Rouge-L of the first {size['answer']} tokens "
            "written stands for accuracy."
        )
    loaded = _load(folder, config)
    content = reporting.report(loaded, words, summary)
    if "sequence" in config.streams and config.source != "text6":
        tables = free.tables(folder, loaded["sequence"])
        content = content._replace(tables=[*content.tables, *tables])
    if "mined" in config.streams:
        mined = run_folder.read_json(Path(folder) / "mined.json")
        tables = [*content.tables, *mining_report.tables(mined)]
        pictures = [*content.figures, mining_report.figure(mined)]
        content = content._replace(tables=tables, figures=pictures)
    return content


STUDY = Study(
    "lora_text",
    "low-rank adapters on a pre-trained language model, six text tasks",
    Config,
    run,
    report,
    check,
)
