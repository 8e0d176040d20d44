"""Text tasks as arrays, and a pre-trained language model that answers them.

An example is a question, a text cut to what fits, and "Answer:"; some places of it ask
for the token that comes next. A question that one word answers has one such place, the
last, and asks for the first token of the right word. One with free answers asks for all
tokens of one, see ``_lora_text_generation``. The loss is the cross-entropy over the
whole vocabulary, mean over what is asked; accuracy compares the task's words only.

Only the last layers of the model are adapted. What enters them, the residual stream
after all layers before, is the same in every step and for every arm, so it is computed
once for each text (``read``) and takes the place of the tokens.

The stream ``"sequence"`` are tasks in an order of each seed's own. The stream
``"mined"`` are pairs of yes-no questions, see ``_lora_text_mining``.
"""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optax_cl
from experiments.data import Stream, TextTask
from experiments.models import llama
from experiments.studies import _lora_text_generation as free
from experiments.studies._lora_program import Bench
from optax_cl import lora

STREAMS = ("sequence", "mined")
_CHUNK = 16  # texts that are evaluated, or read, at once on one device
_GENERAL_ASKED = 8  # places of a text of no task whose next token is asked for


_Row = TypeVar("_Row")


class Examples(NamedTuple):
    """Examples; any leading axes, such as the task's and the example's."""

    # int32 [..., length], tokens padded on the right; or float [..., length, width],
    # the stream that they become before the adapted layers.
    inputs: chex.Array
    where: chex.Array  # int32 [..., asked], places whose next token is asked for
    target: chex.Array  # int32 [..., asked], that token; -1: none
    # int32 [...], index of the right word; -1: no such words, or a text once more
    answer: chex.Array


class Data(NamedTuple):
    """Everything the lanes share."""

    frozen: chex.ArrayTree  # the last layers without the adapted kernels
    adapted: chex.ArrayTree  # the adapted kernels
    words: chex.Array  # int32 [tasks, most words], first tokens; -1: none
    train: Examples  # [tasks, examples]
    test: Examples  # [tasks, examples]
    general: Examples  # [windows], text of no task
    order: chex.Array  # int32 [seeds, tasks of a sequence]
    writer: free.Writer | None = None  # for tasks with free answers


class Form(NamedTuple):
    """How texts become examples."""

    tokenizer: Any  # the model's
    length: int  # tokens of an example; texts are cut to what fits
    answer: free.Answer = free.NONE  # how long free answers are and how they end


class Settings(NamedTuple):
    """What fixes the shapes."""

    config: llama.LlamaConfig  # of the last layers
    pattern: str  # of the adapted kernels
    rank: int
    batch: int
    tasks: int  # of a sequence
    examples: int  # that a start or a memory reads, of each task
    answer: free.Answer = free.NONE


class Network(NamedTuple):
    """The last layers as they are at one moment of learning."""

    config: llama.LlamaConfig
    params: Any  # all of them, the adapted kernels too
    targets: Any = None  # with adapters: what they adapt
    adapters: Any = None


def network(
    settings: Settings,
    data: Data,
    params: Any,
    targets: Any = None,
    adapters: Any = None,
) -> Network:
    """The last layers with these adapted kernels, and adapters on them if there are."""
    return Network(settings.config, join(data.frozen, params), targets, adapters)


def split(params: chex.ArrayTree, pattern: str) -> tuple[Any, Any]:
    """The parameters without the adapted kernels, and those alone, both with holes."""
    chosen = lora.targets(params, {pattern: 1}, alpha=1.0, matrices=views())

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
    tasks: tuple[TextTask, ...], form: Form, train: int, test: int
) -> tuple[np.ndarray, Examples, Examples]:
    """Words and examples of the tasks as tokens.

    Of a task with fewer texts than asked for, all are taken, again and again.

    Args:
      tasks: The tasks.
      form: How texts become examples.
      train: How many examples for training.
      test: How many for testing; repeated ones have no answer there.

    Raises:
      ValueError: If two words of a task start with the same token, or no text fits.
    """
    most = max(1, *(len(task.answers) for task in tasks))
    words = np.full([len(tasks), most], -1, np.int32)
    for i, task in enumerate(tasks):
        first = [form.tokenizer.encode(f" {word}").ids[0] for word in task.answers]
        if len(set(first)) < len(first):
            raise ValueError(
                f"two answers of {task.name} start with the same token: "
                f"{', '.join(task.answers)}. Leave the task out."
            )
        words[i, : len(first)] = first
    if all(task.answers for task in tasks):
        form = form._replace(answer=form.answer._replace(tokens=1))
    parts = []
    for part, count in (("train", train), ("test", test)):
        encoded = [
            _repeat(
                _examples(task, chosen(getattr(task, part), count), first, form), count
            )
            for task, first in zip(tasks, words, strict=True)
        ]
        parts.append(jax.tree.map(lambda *each: np.stack(each), *encoded))
    return words, parts[0], parts[1]


def chosen(rows: Sequence[_Row], count: int) -> tuple[_Row, ...]:
    """At most ``count`` of a task's rows, the same in each call."""
    order = np.random.default_rng(0).permutation(len(rows))
    return tuple(rows[i] for i in order[:count])


def _examples(task, rows, words, form):
    tokenizer, length, answer = form
    before = tokenizer.encode(f"{task.question}\n").ids
    after = tokenizer.encode("\nAnswer:").ids
    # The last token of an answer is asked for and not read.
    taken = len(before) + len(after) + (0 if task.answers else answer.tokens - 1)
    room = length - taken
    if room < 8:
        raise ValueError(
            f"`--length` {length} leaves no room for a text beside the question of "
            f"{task.name} and its answer; it needs {taken + 8} at least."
        )
    tokens = np.zeros([len(rows), length], np.int32)
    where = np.zeros([len(rows), answer.tokens], np.int32)
    target = np.full([len(rows), answer.tokens], -1, np.int32)
    for i, (text, right) in enumerate(rows):
        # More characters than any text of that many tokens has been seen to take.
        prompt = before + tokenizer.encode(text[: 12 * room]).ids[:room] + after
        if task.answers:
            asked = [words[right]]
        else:
            asked = free.answer_tokens(tokenizer, answer, right[0])
        ids = [*prompt, *asked[:-1]]
        tokens[i, : len(ids)] = ids
        where[i] = len(prompt) - 1
        where[i, : len(asked)] += np.arange(len(asked), dtype=np.int32)
        target[i, : len(asked)] = asked
    right = [right if task.answers else -1 for _, right in rows]
    return Examples(tokens, where, target, np.array(right, np.int32))


def _repeat(examples, count):
    own = len(examples.answer)
    examples = jax.tree.map(lambda x: x[np.arange(count) % own], examples)
    examples.answer[own:] = -1
    return examples


def windows(stream: Stream, form: Form, count: int) -> Examples:
    """Held-out text of all domains of a stream, asked what goes on here and there."""
    length, found = form.length, []
    for i in range(count):
        text = stream.heldout[i % len(stream.heldout)].tobytes()
        start = 1000 * (i // len(stream.heldout))
        piece = text[start : start + 20 * length].decode("utf-8", "ignore")
        found.append(form.tokenizer.encode(piece).ids[:length])
    tokens = np.array(found, np.int32)
    # In the second half, where there is something to go by.
    where = np.linspace(length // 2, length - 2, _GENERAL_ASKED).astype(np.int32)
    where = np.tile(where, [count, 1])
    target = np.take_along_axis(tokens, where + 1, axis=1)
    return Examples(tokens, where, target, np.full([count], -1, np.int32))


def read(
    config: llama.LlamaConfig,
    params: Any,
    examples: Examples,
    layers: int,
    path: Path,
) -> Examples:
    """The examples with the stream that enters the last layers for their tokens.

    Args:
      config: Sizes of the whole model.
      params: Its parameters.
      examples: Examples of tokens.
      layers: How many layers are adapted. If all are, nothing is to be computed.
      path: A file that keeps the streams, and has them if a run goes on.

    Returns:
      The examples, with streams.
    """
    if layers == config.layers:
        return examples
    if not path.exists():
        tokens = examples.inputs.reshape(-1, examples.inputs.shape[-1])
        partial_path = path.with_suffix(".partial.npy")
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(partial_path, _streams(config, params, tokens, layers))
        os.replace(partial_path, path)
    streams = np.load(path)
    return examples._replace(inputs=streams.reshape(*examples.inputs.shape, -1))


def _streams(config, params, tokens, layers):
    """Float ``[n, length, width]`` for tokens ``[n, length]``, on all devices."""
    mesh = jax.make_mesh((jax.device_count(),), ("texts",), axis_types=(AxisType.Auto,))
    over = NamedSharding(mesh, PartitionSpec("texts"))
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    size = _CHUNK * jax.device_count()
    run = jax.jit(partial(llama.trunk, config, layers=config.layers - layers))
    found = []
    for start in range(0, len(tokens), size):
        # The last ones come twice rather than in a smaller batch.
        chunk = tokens[np.arange(start, start + size) % len(tokens)]
        found.append(np.asarray(run(params, jax.device_put(chunk, over))))
    return np.concatenate(found)[: len(tokens)]


def make_bench(settings: Settings) -> Bench:
    """The tasks as the adapter programs want them."""

    def base(data, lane):
        del lane
        return data.adapted

    def losses(data, lane, params, batch, targets, adapters):
        del lane
        net = network(settings, data, params, targets, adapters)
        return answer_losses(net, batch)

    def first(data, lane, task, count):
        source = data.order[lane.problem, task]
        return jax.tree.map(lambda x: x[source, :count], data.train)

    def draw(data, lane, tasks, key):
        which = jax.random.randint(key, tasks.shape, 0, data.train.answer.shape[1])
        source = data.order[lane.problem, tasks]
        return jax.tree.map(lambda x: x[source, which], data.train)

    def evaluate(data, lane, params, targets, stack):
        sources = data.order[lane.problem]

        def each(measure):
            """``measure(data, task, net)`` of every task with its adapters, if any."""
            return jax.lax.map(
                lambda pair: measure(
                    data, pair[0], network(settings, data, params, targets, pair[1])
                ),
                (sources, stack),
            )

        general = answer_losses(network(settings, data, params), data.general)
        found = {"accuracy": each(_accuracy), "base": general.mean()}
        if data.writer is not None:
            found["written"] = each(partial(_written, settings.answer))
        return found

    return Bench(
        tasks=settings.tasks,
        batch=settings.batch,
        ranks={settings.pattern: settings.rank},
        surgical_ranks={settings.pattern: settings.rank},
        matrices=views(),
        memory=lambda path: 8 * settings.rank,
        start_examples=settings.examples,
        memory_examples=settings.examples,
        base=base,
        losses=losses,
        first=first,
        draw=draw,
        evaluate=evaluate,
    )


def views():
    """How the parameters are read as matrices."""
    return optax_cl.matrix_views(stacked="layers", embeddings="skip")


def _name(path):
    return "/".join(str(entry.key) for entry in path)


def answer_losses(net: Network, batch: Examples) -> chex.Array:
    """Nats per token asked for, of each example."""
    asked = (batch.target >= 0).sum(-1)
    return token_losses(net, batch).sum(-1) / jnp.maximum(asked, 1)


def token_losses(net: Network, batch: Examples) -> chex.Array:
    """Nats of each token asked for, ``[B, asked]``; zero where there is none."""
    losses = optax.softmax_cross_entropy_with_integer_labels(
        llama.unembed(net.params, _features(net, batch)), jnp.maximum(batch.target, 0)
    )
    return losses * (batch.target >= 0)


def _features(net, batch):
    """``[B, asked, width]`` where something is asked."""
    stream = batch.inputs
    if jnp.issubdtype(stream.dtype, jnp.integer):
        stream = llama.trunk(net.config, net.params, stream, 0)
    return llama.rest(
        net.config, net.params, stream, net.adapters, net.targets, batch.where
    )


def _accuracy(data, task, net):
    words = data.words[task]

    def right(example):
        hidden = _features(net, jax.tree.map(lambda x: x[None], example))
        logits = net.params["embed"]["embedding"][words] @ hidden[0, 0]
        return jnp.where(words >= 0, logits, -jnp.inf).argmax() == example.answer

    examples = jax.tree.map(lambda x: x[task], data.test)
    found = jax.lax.map(right, examples, batch_size=_CHUNK)
    return found.sum() / jnp.maximum((examples.answer >= 0).sum(), 1)


def _written(answer, data, task, net):
    whole = net.params
    if net.adapters is not None:
        whole = lora.merge(net.targets, whole, net.adapters)
    return free.write(net.config, data.writer, answer, task, whole)
