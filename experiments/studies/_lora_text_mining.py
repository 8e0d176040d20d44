"""Pairs of yes-no questions whose gradients conflict, for the stream ``"mined"``.

At pre-trained weights the gradients of all such questions say the same first: answer
yes or no. So the adapted kernels first learn this *format*: to answer every question
with even odds, which is what answers drawn at random teach in the mean. No right answer
is used, so there is nothing else to learn. After that a mean gradient, over as many
texts to be answered yes as no, tells what a question asks. Where odds are not even, it
tells this instead: a question that the model affirms too often then "conflicts" with
one that it denies too often, whatever they are about.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.data import TextTask
from experiments.studies import _lora_text_data as text
from optax_cl import lora


class Odds(NamedTuple):
    """How a model answers the questions of a pool, each ``[questions]``."""

    mass: chex.Array  # mean probability of its two words
    yes: chex.Array  # mean share of "yes" in that
    right: chex.Array  # accuracy, on the texts it was asked about


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
                TextTask(
                    f"{task.name}: {word}",
                    question,
                    ("no", "yes"),
                    parts["train"],
                    parts["test"],
                )
            )
    return tuple(pool)


def warm_up(
    settings: text.Settings, data: text.Data, steps: int, rate: float, seed: int = 0
) -> tuple[Any, np.ndarray]:
    """The adapted kernels once they answer yes or no with even odds.

    Args:
      settings: Of the bench.
      data: The pool of questions as tasks.
      steps: Steps of Adam on the kernels themselves.
      rate: Its learning rate at the start; it falls to zero along a cosine.
      seed: Of the batches.

    Returns:
      The kernels, and the loss of each step; log 2 is all that can be had.
    """
    tx = optax.adam(optax.cosine_decay_schedule(rate, steps))
    tasks, count = data.train.answer.shape

    def step(carry, index):
        params, state, data = carry
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), index))
        task = jax.random.randint(keys[0], [settings.batch], 0, tasks)
        example = jax.random.randint(keys[1], [settings.batch], 0, count)
        batch = jax.tree.map(lambda x: x[task, example], data.train)

        def loss(params):
            net = text.network(settings, data, params)
            return _word_losses(net, batch, data.words[task, :2]).mean()

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state, data), value

    @jax.jit
    def run(data):
        start = data.adapted, tx.init(data.adapted), data
        (params, _, _), losses = jax.lax.scan(step, start, jnp.arange(steps))
        return params, losses

    params, losses = run(jax.tree.map(jnp.asarray, data))
    return params, np.asarray(losses)


def _word_losses(net, batch, words):
    """Loss of each example if it asked for each of two words ``[B, 2]``, as ``[B, 2]``.

    The words are asked for at one place, as two targets of it.
    """
    both = batch._replace(where=jnp.repeat(batch.where[:, :1], 2, axis=1), target=words)
    return text.token_losses(net, both)


def odds(settings: text.Settings, data: text.Data) -> Odds:
    """How the model answers the questions about its training texts."""

    @jax.jit
    def ask(data, task):
        batch = jax.tree.map(lambda x: x[task], data.train)
        words = jnp.tile(data.words[task, :2], [len(batch.answer), 1])
        net = text.network(settings, data, data.adapted)
        scores = -_word_losses(net, batch, words)
        both = jax.nn.logsumexp(scores, axis=1)
        right = (scores.argmax(1) == batch.answer).mean()
        yes = jnp.exp(scores[:, 1] - both).mean()
        return Odds(jnp.exp(both).mean(), yes, right)

    data = jax.tree.map(jnp.asarray, data)
    found = [ask(data, jnp.int32(task)) for task in range(len(data.words))]
    return jax.tree.map(lambda *each: np.array(each), *found)


def general_loss(settings: text.Settings, data: text.Data) -> float:
    """Nats per token on text of no task."""
    loss = jax.jit(
        lambda data: text.answer_losses(
            text.network(settings, data, data.adapted), data.general
        ).mean()
    )
    return float(loss(jax.tree.map(jnp.asarray, data)))


def mine(settings: text.Settings, data: text.Data, examples: int) -> np.ndarray:
    """Cosines of the questions' mean gradients at the adapted kernels, ``[n, n]``."""
    targets = lora.targets(
        data.adapted, {settings.pattern: 1}, alpha=1.0, matrices=text.views()
    )
    data = jax.tree.map(jnp.asarray, data)
    # Questions about a rare class have few texts.
    there = data.train.answer.shape[1]
    size = min(settings.batch, there)
    count = max(1, min(examples, there) // size)

    @jax.jit
    def gradient(data, task):
        def losses(params, weighted):
            weight, batch = weighted
            net = text.network(settings, data, params)
            return weight * text.answer_losses(net, batch)

        batch = jax.tree.map(lambda x: x[task, : count * size], data.train)
        # Yes and no count the same, however many there are.
        same = batch.answer[:, None] == batch.answer[None]
        weighted = 0.5 / same.mean(1), batch
        stacked = jax.tree.map(lambda x: x.reshape(count, size, *x.shape[1:]), weighted)
        return lora.mean_gradients(targets, losses, data.adapted, stacked, stacked=True)

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
