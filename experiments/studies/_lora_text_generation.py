"""Tasks with free answers: what the model writes, and how much of it is right.

Answers are generated inside ``jit``, greedily, and recorded as tokens. Their Rouge-L is
computed afterwards, on strings; it then stands where the accuracy of a task stands that
is answered by one of a few words.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from experiments import rouge, run_folder
from experiments.data import TextTask
from experiments.models import generation
from experiments.models.llama import LlamaConfig
from experiments.models.smollm2 import SmolLM2
from experiments.report import Table
from experiments.studies import _lora_arms as arms
from experiments.studies._lora_results import ArmResults
from optax_cl import metrics

_SHOWN = 80  # characters of a text in the table of examples
_CHUNK = 16  # prompts that are continued at once
Programs = dict[str, list[tuple[arms.Arm, str]]]


class Answer(NamedTuple):
    """The form of free answers."""

    tokens: int = 1  # at most, with the one that ends it
    stop: int = 0  # the token that ends one


NONE = Answer()  # where no answers are free


class Writer(NamedTuple):
    """What answers are generated from, beside the last layers of the model."""

    first: chex.ArrayTree  # parameters of the layers before them, maybe none
    prompts: chex.Array  # int32 [tasks, rows, length], test texts as tokens
    last: chex.Array  # int32 [tasks, rows], place of each prompt's last token
    rows: chex.Array  # int32 [tasks], of how many free answers are wanted


def make_writer(
    params: Any,
    layers: int,
    tasks: Sequence[TextTask],
    prompts: np.ndarray,
    where: np.ndarray,
) -> Writer | None:
    """What writes the free answers to the tasks' test texts, if there are any.

    Args:
      params: Parameters of the whole model.
      layers: How many of the last layers are adapted.
      tasks: The tasks.
      prompts: int32 ``[tasks, rows, length]``, their test texts as tokens.
      where: int32 ``[tasks, rows, asked]``, of which the first is a prompt's last.
    """
    if all(task.answers for task in tasks):
        return None
    first = jax.tree.map(lambda x: x[: len(x) - layers], params["layers"])
    rows = [
        0 if task.answers else min(len(task.test), prompts.shape[1]) for task in tasks
    ]
    return Writer(first, prompts, where[..., 0], np.array(rows, np.int32))


def answer_tokens(tokenizer: Any, form: Answer, answer: str) -> list[int]:
    """The tokens of an answer and the stop token, of all these the first few."""
    return [*tokenizer.encode(f" {answer}").ids, form.stop][: form.tokens]


def write(
    config: LlamaConfig, writer: Writer, form: Answer, task: chex.Array, params: Any
) -> chex.Array:
    """Greedy answers to the test texts of a task, if its answers are free.

    Args:
      config: Sizes of the model's last layers.
      writer: The layers before them, and the texts.
      form: The answers' form.
      task: int32 ``[]``, its index.
      params: Parameters of the last layers, embedding and norm.

    Returns:
      int32 ``[rows, tokens]``, after the stop token only stop tokens; zeros behind the
      rows that answers are wanted of, but for the chunk in which these end.
    """
    layers = jax.tree.map(
        lambda a, b: jnp.concatenate([a, b]), writer.first, params["layers"]
    )
    count = jax.tree.leaves(layers)[0].shape[0]
    config = dataclasses.replace(config, layers=count)
    whole = {**params, "layers": layers}
    tokens, last = writer.prompts[task], writer.last[task]
    chunks = -(-len(tokens) // _CHUNK)
    which = (jnp.arange(chunks * _CHUNK) % len(tokens)).reshape(chunks, _CHUNK)

    def chunk(which):
        prompts, mask = left_padded(tokens[which], last[which])
        return jax.lax.cond(
            which[0] < writer.rows[task],
            lambda: generation.generate(
                config, whole, prompts, form.tokens, stop=form.stop, mask=mask
            ),
            lambda: jnp.zeros([_CHUNK, form.tokens], jnp.int32),
        )

    written = jax.lax.map(chunk, which)
    return written.reshape(-1, form.tokens)[: len(tokens)]


def left_padded(tokens: chex.Array, last: chex.Array) -> tuple[chex.Array, chex.Array]:
    """Prompts ``[B, length]`` that end at the end, and which tokens are theirs."""
    length = tokens.shape[1]
    shift = length - 1 - last
    turned = jax.vmap(jnp.roll)(tokens, shift)
    return turned, jnp.arange(length)[None] >= shift[:, None]


def text_of(tokenizer: Any, stop: int, ids: Sequence[int]) -> str:
    """What was written before the stop token."""
    ids = list(ids)
    end = ids.index(stop) if stop in ids else len(ids)
    return tokenizer.decode(ids[:end]).strip()


def scores(
    written: np.ndarray,
    order: np.ndarray,
    right: Sequence[Sequence[Any]],
    decode: Callable[[Sequence[int]], str],
) -> np.ndarray:
    """Mean Rouge-L of the answers to each task.

    Args:
      written: int ``[lanes, T + 1, T, rows, most]``, tokens; lanes go through all seeds
        again and again.
      order: int ``[seeds, T]``, each seed's tasks.
      right: Of each task the right answers to its rows, the first of ``rows``; none
        where it is answered by one of its words.
      decode: Tokens to text.

    Returns:
      ``[lanes, T + 1, T]``, NaN for tasks of the latter kind.
    """
    known: dict[tuple[int, int, bytes], float] = {}

    def score(task, row, ids):
        # Most answers stay the same from one task to the next, or from arm to arm.
        key = task, row, ids.tobytes()
        if key not in known:
            known[key] = rouge.rouge_l(decode(ids.tolist()), right[task][row])
        return known[key]

    result = np.full(written.shape[:3], np.nan)
    for lane, after, place in np.ndindex(*result.shape):
        task = order[lane % len(order), place]
        rows = written[lane, after, place][: len(right[task])]
        if len(rows):
            each = [score(task, row, ids) for row, ids in enumerate(rows)]
            result[lane, after, place] = np.mean(each)
    return result


def record(
    folder: Path,
    programs: Programs,
    tasks: Sequence[TextTask],
    order: np.ndarray,
    form: Answer,
    model: SmolLM2,
) -> None:
    """Scores what a sequence's programs wrote, and leaves what a report tells of it.

    That is ``raw/<program>-rouge.npz``, if answers were free, and ``tasks.json``.

    Args:
      folder: The run folder.
      programs: Each finished program's (arm, stream) pairs.
      tasks: All tasks, with the rows that were taken in the order in which they were.
      order: int ``[seeds, T]``, each seed's tasks.
      form: The form of free answers.
      model: Whose tokenizer was used.
    """
    decode = partial(text_of, model.tokenizer, form.stop)
    right = [[] if t.answers else [row[1] for row in t.test] for t in tasks]
    shown, by = [], ""
    if any(right):
        for program, pairs in programs.items():
            written = run_folder.load_program(folder, program)["evaluate/written"]
            found = {"rouge": scores(written, order, right, decode)}
            run_folder.save_arrays(folder / "raw" / f"{program}-rouge.npz", found)
            if not shown:
                # The first lanes are one arm's at the first rate, seed by seed.
                lane, by = len(order) - 1, pairs[0][0].name
                shown = examples(written[lane], order[lane], tasks, decode)
    listed = [
        (
            task.name,
            f"one of {len(task.answers)} words" if task.answers else "free text",
            len(task.train),
            len(task.test),
            task.note or None,
        )
        for task in tasks
    ]
    told = {"tasks": listed, "examples": shown, "by": by}
    run_folder.write_json(folder / "tasks.json", told)


def examples(
    written: np.ndarray,
    order: np.ndarray,
    tasks: Sequence[TextTask],
    decode: Callable[[Sequence[int]], str],
) -> list[list[str]]:
    """What one lane wrote about the first text of each task with free answers.

    Args:
      written: int ``[T + 1, T, rows, most]``, tokens.
      order: int ``[T]``, the lane's tasks.
      tasks: All tasks, with rows in the order in which they were asked.
      decode: Tokens to text.

    Returns:
      Of each such task its name, the end of the text, a right answer, and what was
      written before training, after learning the task and at the end.
    """
    rows = []
    for place, task in enumerate(tasks[index] for index in order):
        if not task.answers:
            text, right = task.test[0]
            when = (0, place + 1, len(order))
            wrote = [decode(written[after, place, 0].tolist()) for after in when]
            rows.append([task.name, text[-_SHOWN:], right[0], *wrote])
    return rows


def with_rouge(
    loaded: dict[str, dict[str, ArmResults]], folder: Path, programs: Programs
) -> dict[str, dict[str, ArmResults]]:
    """The results with Rouge-L where answers were free, if any were."""
    changed = {stream: dict(of) for stream, of in loaded.items()}
    for program, pairs in programs.items():
        path = Path(folder) / "raw" / f"{program}-rouge.npz"
        if not path.exists():
            continue
        found = run_folder.load_arrays(path)["rouge"]
        found = found.reshape(len(pairs), -1, *found.shape[1:])
        for (arm, stream), own in zip(pairs, found, strict=True):
            r = loaded[stream][arm.name]
            own = own.reshape(r.matrix.shape)
            matrix = np.where(np.isnan(own), r.matrix, own)
            changed[stream][arm.name] = r._replace(matrix=matrix)
    return changed


def tables(folder: Path, of: dict[str, ArmResults]) -> list[Table]:
    """The tasks, some answers, and the measures by which such sequences are known."""
    found = run_folder.read_json(Path(folder) / "tasks.json")
    tasks = Table(
        "tasks",
        "Tasks",
        ("task", "answers", "training texts", "held-out texts", "note"),
        found["tasks"],
        "A task of words is scored by accuracy among them; one of free text by Rouge-L "
        "(F, words by their stems) of what is written greedily, against the right "
        "answer that it matches best. Measures of all tasks average both.",
    )
    shown = Table(
        "answers",
        "What is written about one text",
        ("task", "text ends", "right", "before", "after its task", "at the end"),
        found["examples"],
        f"By {found['by']} at the first of its learning rates, in the last order.",
    )
    return [tasks, *([shown] if found["examples"] else []), published_table(of)]


def published_table(of: dict[str, ArmResults]) -> Table:
    """The measures by which the sequences of SAPT are published, in percent."""
    alone = of.get("LoRA per task")
    rows = []
    for name, r in of.items():
        own = r.matrix[r.chosen, r.tuning :]
        seen = np.tril(np.ones(own.shape[-1:] * 2))
        # They have no figures of tasks to come.
        own = np.concatenate([own[:, :1], own[:, 1:] * seen], axis=1)
        gain = None
        if alone is not None and r is not alone:
            theirs = np.diagonal(
                alone.matrix[alone.chosen, alone.tuning :, 1:], axis1=1, axis2=2
            )
            gain = _percent(metrics.gain_over_independent(own, theirs))
        rows.append(
            (
                name,
                _percent(metrics.average_accuracy(own)),
                _percent(metrics.chaudhry_forgetting(own)),
                gain,
            )
        )
    return Table(
        "published",
        "The measures of SAPT, in percent",
        ("arm", "AP", "F.Ra", "FWT"),
        rows,
        "AP: mean over the tasks at the end. F.Ra: the best after learning a task, "
        "before the last one, minus the end, mean over all tasks but the last. FWT: "
        "right after learning, minus an adapter that learned this task alone (the arm "
        "`LoRA per task`), mean over tasks. Not to be compared with figures of other "
        "models, lengths and numbers of steps. There, tasks of few words are scored by "
        "Rouge-L too, and here by accuracy.",
    )


def _percent(values: Any) -> tuple[float, float]:
    mean, error = metrics.mean_and_error(100 * values)
    return float(mean), float(error)
