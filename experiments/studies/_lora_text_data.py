"""Text tasks as token arrays, and a pre-trained language model that answers them.

An example is a question, a text cut to what fits, and "Answer:"; the model answers with
the first token of one of the task's words. Its loss is the cross-entropy of that token
over the whole vocabulary; its accuracy compares the words only.

The stream ``"sequence"`` are six tasks in an order of each seed's own. The stream
``"mined"`` are pairs of yes-no questions: of all pairs of a pool, those whose mean
gradients at the pre-trained weights have the lowest cosine.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_cl
from experiments.data import Stream, TextTask
from experiments.models import llama
from experiments.studies._lora_program import Bench
from optax_cl import lora

STREAMS = ("sequence", "mined")
_CHUNK = 16  # texts that are evaluated at once


class Tokens(NamedTuple):
    """Examples of several tasks."""

    tokens: chex.Array  # int32 [tasks, examples, length], padded on the right
    last: chex.Array  # int32 [tasks, examples], place of the last real token
    answer: chex.Array  # int32 [tasks, examples], index of the right word


class Data(NamedTuple):
    """Everything the lanes share."""

    frozen: chex.ArrayTree  # the model without the adapted kernels
    adapted: chex.ArrayTree  # the adapted kernels
    words: chex.Array  # int32 [tasks, most words], first tokens; -1: none
    train: Tokens
    test: Tokens
    general: chex.Array  # int32 [windows, length], text of no task
    order: chex.Array  # int32 [seeds, tasks of a sequence]


class Settings(NamedTuple):
    """What fixes the shapes."""

    config: llama.LlamaConfig
    pattern: str  # of the adapted kernels
    rank: int
    batch: int
    tasks: int  # of a sequence
    examples: int  # that a start or a memory reads, of each task


def split(params: chex.ArrayTree, pattern: str) -> tuple[Any, Any]:
    """The parameters without the adapted kernels, and those alone, both with holes."""
    chosen = lora.targets(params, {pattern: 1}, alpha=1.0, matrices=_views())

    def pick(keep):
        return jax.tree_util.tree_map_with_path(
            lambda path, x: x if (_name(path) in chosen) == keep else None, params
        )

    return pick(False), pick(True)


def join(frozen: Any, adapted: Any) -> Any:
    """The whole parameters again."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, frozen, adapted, is_leaf=lambda x: x is None
    )


def encode(
    tasks: tuple[TextTask, ...], tokenizer: Any, length: int, train: int, test: int
) -> tuple[np.ndarray, Tokens, Tokens]:
    """Words and examples of the tasks as tokens.

    Raises:
      ValueError: If two words of a task start with the same token, or no text fits.
    """
    most = max(len(task.answers) for task in tasks)
    words = np.full([len(tasks), most], -1, np.int32)
    for i, task in enumerate(tasks):
        first = [tokenizer.encode(f" {word}").ids[0] for word in task.answers]
        if len(set(first)) < len(first):
            raise ValueError(f"two answers of {task.name} start with the same token.")
        words[i, : len(first)] = first
    parts = []
    for part, count in (("train", train), ("test", test)):
        encoded = [
            _examples(t, getattr(t, part), tokenizer, length, count) for t in tasks
        ]
        parts.append(Tokens(*(np.stack(field) for field in zip(*encoded, strict=True))))
    return words, parts[0], parts[1]


def _examples(task, rows, tokenizer, length, count):
    if len(rows) < count:
        raise ValueError(f"{task.name} has {len(rows)} texts; {count} were asked for.")
    chosen = np.random.default_rng(0).permutation(len(rows))[:count]
    before = tokenizer.encode(f"{task.question}\n").ids
    after = tokenizer.encode("\nAnswer:").ids
    room = length - len(before) - len(after)
    if room < 8:
        raise ValueError(
            f"`--length` {length} leaves no room for a text beside the question of "
            f"{task.name}; it needs {len(before) + len(after) + 8} at least."
        )
    tokens = np.zeros([count, length], np.int32)
    last = np.zeros([count], np.int32)
    for i, row in enumerate(chosen):
        # More characters than any text of that many tokens has been seen to take.
        text = tokenizer.encode(rows[row][0][: 12 * room]).ids[:room]
        ids = before + text + after
        tokens[i, : len(ids)] = ids
        last[i] = len(ids) - 1
    return tokens, last, np.array([rows[row][1] for row in chosen], np.int32)


def windows(stream: Stream, tokenizer: Any, length: int, count: int) -> np.ndarray:
    """Held-out text of all domains of a stream as tokens, ``[count, length]``."""
    found = []
    for i in range(count):
        text = stream.heldout[i % len(stream.heldout)].tobytes()
        start = 1000 * (i // len(stream.heldout))
        piece = text[start : start + 20 * length].decode("utf-8", "ignore")
        found.append(tokenizer.encode(piece).ids[:length])
    return np.array(found, np.int32)


def yes_no_pool(tasks: tuple[TextTask, ...]) -> tuple[TextTask, ...]:
    """One yes-no question for each class of each task, as often yes as no."""
    pool = []
    for task in tasks:
        for index, word in enumerate(task.answers):
            parts = {}
            for part in ("train", "test"):
                rows = getattr(task, part)
                yes = [(text, 1) for text, answer in rows if answer == index]
                no = [(text, 0) for text, answer in rows if answer != index]
                count = min(len(yes), len(no))
                random = np.random.default_rng(0)
                kept = [
                    side[i]
                    for side in (yes, no)
                    for i in random.permutation(len(side))[:count]
                ]
                parts[part] = tuple(kept[i] for i in random.permutation(len(kept)))
            question = f"Is this '{word}', yes or no?"
            pool.append(
                TextTask(f"{task.name}: {word}", question, ("no", "yes"), **parts)
            )
    return tuple(pool)


def mine(settings: Settings, data: Data, examples: int) -> np.ndarray:
    """Cosines of the tasks' mean gradients at the pre-trained weights, ``[n, n]``."""
    targets = lora.targets(
        data.adapted, {settings.pattern: 1}, alpha=1.0, matrices=_views()
    )
    data = jax.tree.map(jnp.asarray, data)

    @jax.jit
    def gradient(data, task):
        batch = _take(data.train, data.words, task, jnp.arange(examples))
        stacked = jax.tree.map(
            lambda x: x.reshape(-1, settings.batch, *x.shape[1:]), batch
        )
        return lora.mean_gradients(
            targets,
            lambda params, b: _answer_losses(settings, data, params, b, None, None),
            data.adapted,
            stacked,
            stacked=True,
        )

    flat = []
    for task in range(len(data.words)):
        leaves = jax.tree.leaves(gradient(data, jnp.int32(task)))
        vector = np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in leaves])
        flat.append(vector / max(np.linalg.norm(vector), 1e-30))
    return np.stack(flat) @ np.stack(flat).T


def conflicting_pairs(cosines: np.ndarray, count: int) -> np.ndarray:
    """The pairs of lowest cosine, no task in two of them, ``[count, 2]``."""
    n = len(cosines)
    ranked = sorted((cosines[i, j], i, j) for i in range(n) for j in range(i))
    pairs, used = [], set()
    for _, i, j in ranked:
        if len(pairs) < count and not {i, j} & used:
            pairs.append((j, i))
            used |= {i, j}
    if len(pairs) < count:
        raise ValueError(
            f"the pool has {n} questions, which make {len(pairs)} disjoint pairs; "
            f"`--seeds` asks for {count}."
        )
    return np.array(pairs, np.int32)


def make_bench(settings: Settings) -> Bench:
    """The tasks as the adapter programs want them."""

    def base(data, lane):
        del lane
        return data.adapted

    def losses(data, lane, params, batch, targets, adapters):
        del lane
        return _answer_losses(settings, data, params, batch, targets, adapters)

    def first(data, lane, task, count):
        which = jnp.arange(count)
        return _take(data.train, data.words, data.order[lane.problem, task], which)

    def draw(data, lane, tasks, key):
        which = jax.random.randint(key, tasks.shape, 0, data.train.last.shape[1])
        source = data.order[lane.problem, tasks]
        return {
            "tokens": data.train.tokens[source, which],
            "last": data.train.last[source, which],
            "word": data.words[source, data.train.answer[source, which]],
        }

    def evaluate(data, lane, params, targets, stack):
        sources = data.order[lane.problem]

        def one(pair):
            source, adapters = pair
            return _accuracy(settings, data, params, source, targets, adapters)

        right = jax.lax.map(one, (sources, stack))
        return {"accuracy": right, "base": _general_loss(settings, data, params)}

    return Bench(
        tasks=settings.tasks,
        batch=settings.batch,
        ranks={settings.pattern: settings.rank},
        surgical_ranks={settings.pattern: settings.rank},
        matrices=_views(),
        memory=lambda path: 8 * settings.rank,
        start_examples=settings.examples,
        memory_examples=settings.examples,
        base=base,
        losses=losses,
        first=first,
        draw=draw,
        evaluate=evaluate,
    )


def _views():
    return optax_cl.matrix_views(stacked="layers", embeddings="skip")


def _name(path):
    return "/".join(str(entry.key) for entry in path)


def _take(tokens, words, task, which):
    return {
        "tokens": tokens.tokens[task, which],
        "last": tokens.last[task, which],
        "word": words[task, tokens.answer[task, which]],
    }


def _last_logits(settings, data, params, tokens, last, targets, adapters):
    """Logits ``[B, vocabulary]`` of the token after the last real one."""
    whole = join(data.frozen, params)
    hidden, _ = llama.features(settings.config, whole, tokens, adapters, targets)
    chosen = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    return llama.unembed(whole, chosen)


def _answer_losses(settings, data, params, batch, targets, adapters):
    logits = _last_logits(
        settings, data, params, batch["tokens"], batch["last"], targets, adapters
    )
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["word"])


def _accuracy(settings, data, params, task, targets, adapters):
    words = data.words[task]

    def right(example):
        chunk = jax.tree.map(lambda x: x[None], example)
        logits = _last_logits(
            settings, data, params, chunk.tokens, chunk.last, targets, adapters
        )
        scores = jnp.where(words >= 0, logits[:, words], -jnp.inf)
        return scores.argmax(-1)[0] == example.answer

    examples = jax.tree.map(lambda x: x[task], data.test)
    return jax.lax.map(right, examples, batch_size=_CHUNK).mean()


def _general_loss(settings, data, params):
    """Nats per token on text of no task."""
    whole = join(data.frozen, params)

    def loss(window):
        logits = llama.forward(settings.config, whole, window[None])
        return llama.next_token_loss(logits, window[None])

    return jax.lax.map(loss, data.general).mean()
