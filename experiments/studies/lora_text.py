"""Low-rank adapters on a pre-trained language model that learns six text tasks.

**Question.** What the digits say of adapters (``lora_digits``): does it hold for a real
model, SmolLM2-135M, on real text?

**Setting.** Film reviews, news topics, business reports, headlines, newsgroups and film
recommendations, each a question answered by one word; see ``_lora_text_data``. Every
seed has an order of its own. Weights are frozen; rank-8 adapters on the attention
kernels are trained with Adam and merged after each task.

**Sizes.** ``small`` keeps the first layers of the model and short texts, so that two
CPU cores do it; ``full`` is the whole model with all kernels adapted, for a GPU.

**Mined pairs.** Published "adversarial" sequences have gradients that agree (mean
cosine .21 to .28). Here all pairs of a pool of yes-no questions are ranked by the
cosine of their mean gradients at the pre-trained weights, the lowest are learnt one
after the other, and SLICE is compared with LoRA-GA. The table of pairs says whether any
of them conflict: with the first layers alone none did.

**Other tasks.** ``--source`` takes a folder of tasks in the form of
Super-NaturalInstructions, if their answers are a few words that start differently.

**Measures.** Accuracy on held-out texts, as for the digits; and the loss on text of no
task, in nats per token: what the model forgets of its language.

**Choices.** One learning rate for an arm, from tuning orders if more than one is given.
"""

import dataclasses
import difflib
from pathlib import Path
from typing import Literal

import numpy as np

from experiments import data, engine, run_folder
from experiments.models import llama, smollm2
from experiments.report import Table
from experiments.studies import Study, field
from experiments.studies import _lora_arms as arms
from experiments.studies import _lora_program as program
from experiments.studies import _lora_report as reporting
from experiments.studies import _lora_results as results
from experiments.studies import _lora_text_data as text

_ATTENTION = r"layers/(q|k|v|o)/kernel"
_ALL = r"layers/(q|k|v|o|gate|up|down)/kernel"
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
_MINED = ("init LoRA-GA", "SLICE .5", "SLICE 1", "SLICE global", "always project")
_GENERAL_WINDOWS = 16
_RANK = 8
_EXAMPLES = 64  # that a start or a memory reads, of each task
_TRAIN = {"sequence": 1024, "mined": 256}  # texts of each task


_STREAM_WORDS = {
    "sequence": "text tasks one after another",
    "mined": "the pairs of questions whose gradients agree least",
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the study; 0 means what the size suggests."""

    streams: tuple[Literal["sequence", "mined"], ...] = field(
        ("sequence", "mined"), quick=("sequence",), help="which streams to run"
    )
    source: str = field(
        "text6",
        help="text6, or a folder of tasks in the form of Super-NaturalInstructions",
    )
    size: Literal["small", "full"] = field(
        "small", help="small: first layers, two CPU cores; full: a GPU"
    )
    arms: tuple[str, ...] = field(CORE, quick=QUICK, help="names of arms")
    tasks: int = field(6, quick=3, minimum=2, help="most tasks of a sequence")
    seeds: int = field(3, quick=2, minimum=2, help="orders (and pairs) reported")
    first_seed: int = field(1000, minimum=0, help="the first of them")
    tuning: int = field(0, minimum=0, help="orders that choose learning rates")
    first_tuning_seed: int = field(0, minimum=0, help="the first of them")
    rates: tuple[float, ...] = field((1e-3,), minimum=1e-9, help="learning rates")
    layers: int = field(0, quick=2, minimum=0, help="layers of the model")
    length: int = field(0, quick=48, minimum=0, help="tokens of an example")
    batch: int = field(0, quick=8, minimum=0, help="examples in a batch")
    steps: int = field(0, quick=20, minimum=0, help="steps per task")
    test: int = field(0, quick=32, minimum=0, help="held-out texts of each task")


SIZES = {
    "small": {"layers": 6, "length": 64, "batch": 8, "steps": 60, "test": 64},
    "full": {"layers": 30, "length": 128, "batch": 32, "steps": 500, "test": 512},
}


def check(config: Config) -> None:
    """Refuses unknown arms, seeds in two roles, rates without tuning, missing data."""
    for name in config.arms:
        if name not in arms.ARMS:
            close = difflib.get_close_matches(name, arms.ARMS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else ", ".join(arms.ARMS)
            raise ValueError(f"`--arms` knows no {name!r}; {hint}")
    if len(config.rates) > 1 and not config.tuning:
        raise ValueError("more than one of `--rates` needs `--tuning` of at least 1.")
    tuning, reported = results.seeds(config)
    if both := sorted(set(tuning) & set(reported)):
        raise ValueError(
            f"the seeds {both} would choose learning rates and be reported; move "
            "`--first-seed` or `--first-tuning-seed`."
        )
    data.load_text_tasks(config.source)
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


def run(config: Config, folder: Path, context: engine.Context) -> dict:
    """Trains every arm on every order; returns the numbers of ``results.json``."""
    size = sized(config)
    tuning, reported = results.seeds(config)
    seeds = tuning + reported
    chosen = programs(config)
    tasks = data.load_text_tasks(config.source)
    work = {"sequence": min(config.tasks, len(tasks)), "mined": 2}
    per_stream = {s: work[s] * size["steps"] * len(seeds) for s in config.streams}
    each = [per_stream[stream] for pairs in chosen.values() for _, stream in pairs]
    context.progress.plan(sum(each) * len(config.rates))

    model = smollm2.load()
    cut, params = llama.truncate(model.config, model.params, size["layers"])
    pattern = _ALL if config.size == "full" else _ATTENTION
    frozen, adapted = text.split(params, pattern)
    general = text.windows(
        data.load_stream("mini8"), model.tokenizer, size["length"], _GENERAL_WINDOWS
    )
    for stream in config.streams:
        pool = tasks if stream == "sequence" else text.yes_no_pool(tasks)
        words, train, test = text.encode(
            pool,
            model.tokenizer,
            size["length"],
            min(_TRAIN[stream], *(len(task.train) for task in pool)),
            min(size["test"], *(len(task.test) for task in pool)),
        )
        settings = text.Settings(
            cut, pattern, _RANK, size["batch"], work[stream], _EXAMPLES
        )
        arrays = text.Data(
            frozen, adapted, words, train, test, general, np.zeros([1, 1], np.int32)
        )
        if stream == "sequence":
            order = [
                np.random.default_rng(seed).permutation(len(pool))[: work[stream]]
                for seed in seeds
            ]
            order = np.stack(order).astype(np.int32)
        else:
            cosines = text.mine(settings, arrays, _EXAMPLES)
            order = text.conflicting_pairs(cosines, len(seeds))
            mined = {
                "names": [task.name for task in pool],
                "cosines": cosines,
                "pairs": order,
            }
            run_folder.write_json(folder / "mined.json", mined)
        arrays = arrays._replace(order=order)
        bench = text.make_bench(settings)
        for name, pairs in chosen.items():
            if pairs[0][1] == stream:
                family = arms.FAMILIES[name.removeprefix(f"{stream}-")]
                made = program.make_program(bench, family, size["steps"])
                context.run(
                    made._replace(name=name),
                    arrays,
                    arms.make_lanes(pairs, text.STREAMS, config.rates, seeds),
                    chunk_steps=max(1, size["steps"] // 4),
                )
    return reporting.summarize(results.load(folder, chosen, config))


def report(folder: Path):
    """Tables, figures and claims of a finished run."""
    config = run_folder.read_config(folder, Config)
    size = sized(config)
    kernels = ("q", "k", "v", "o")
    if config.size == "full":
        kernels += ("gate", "up", "down")
    # Matrices come by path, and within a path by layer.
    groups = {
        name: [size["layers"] * index + layer for layer in range(size["layers"])]
        for index, name in enumerate(sorted(kernels))
    }
    words = reporting.Words(
        streams=_STREAM_WORDS,
        base="general loss",
        base_note="General loss: nats per token on text of no task, at the end.",
        groups=groups,
        base_higher=False,
    )
    _, reported = results.seeds(config)
    summary = (
        f"The first {size['layers']} of 30 layers of SmolLM2-135M (weights of 4 bits, "
        f"dequantised), {size['length']} tokens, {size['steps']} steps of "
        f"{size['batch']} texts a task. Accuracies on {size['test']} held-out texts of "
        f"each task, mean and standard error over {len(reported)} orders (of mined "
        "pairs: over pairs)."
    )
    loaded = results.load(folder, programs(config), config)
    content = reporting.report(loaded, words, summary)
    if "mined" in config.streams:
        mined = run_folder.read_json(Path(folder) / "mined.json")
        content = content._replace(tables=[*content.tables, _mined_table(mined)])
    return content


def _mined_table(mined):
    cosines = np.array(mined["cosines"])
    above = cosines[np.triu_indices(len(cosines), 1)]
    rows = [
        (mined["names"][i], mined["names"][j], float(cosines[i, j]))
        for i, j in mined["pairs"]
    ]
    return Table(
        "mined",
        "Mined pairs, and the cosine of their gradients",
        ("first", "second", "cosine"),
        rows,
        f"Of all {above.size} pairs of the pool the cosine is {above.mean():.2f} in "
        f"the mean, {above.min():.2f} at least, and below zero for "
        f"{(above < 0).mean():.0%}.",
    )


STUDY = Study(
    "lora_text",
    "low-rank adapters on a pre-trained language model, six text tasks",
    Config,
    run,
    report,
    check,
)
