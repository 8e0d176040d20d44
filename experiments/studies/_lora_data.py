"""Pixel-permuted digits for adapters, and a network that has learnt the upright ones.

The base task are scikit-learn's 8x8 digits as they are. Each of five later tasks
exchanges a random 40 of the 64 pixels among themselves, so that a network trained on
upright digits is right on about half of its images before it has seen any. In the
stream ``"labels"`` each task renames the classes by a random permutation as well:
the tasks contradict each other except through their inputs.

The model is a ReLU network 64-128-128-10. Its kernels and biases are trained on the
base task and then frozen; all later learning is in low-rank adapters of the kernels.
"""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.studies._lora_program import Bench
from optax_cl import lora

TASKS, CLASSES, PIXELS = 5, 10, 64
MOVED = 40  # pixels that a task exchanges
TRAIN = 1200  # of 1797 images; the others are for evaluation
SIZES = (PIXELS, 128, 128, CLASSES)
STREAMS = ("pixels", "labels")
_BASE_STEPS, _BASE_RATE, _BASE_BATCH = 1500, 1e-3, 64


class Data(NamedTuple):
    """The streams of several seeds, and the networks they start from.

    Task 0 is the base task; the first ``TRAIN`` images are for training.
    """

    images: chex.Array  # float32 [seeds, 1 + tasks, images, 64]
    labels: chex.Array  # int32 [seeds, streams, 1 + tasks, images]
    base: chex.ArrayTree  # parameters, each leaf [seeds, ...]


def make_data(seeds: tuple[int, ...]) -> Data:
    """Streams and base networks of the seeds; the held-out images differ by seed."""
    images, labels = zip(*(_stream(seed) for seed in seeds), strict=True)
    images, labels = np.stack(images), np.stack(labels)
    base = _train_base(images[:, 0, :TRAIN], labels[:, 0, 0, :TRAIN], np.array(seeds))
    return Data(images, labels, jax.tree.map(np.asarray, base))


def logits(params: chex.ArrayTree, images: chex.Array) -> chex.Array:
    """The network, ``[..., 64] -> [..., 10]``."""
    x = images
    for name in sorted(params):
        if name != "layer0":
            x = jax.nn.relu(x)
        x = x @ params[name]["kernel"] + params[name]["bias"]
    return x


def _cross_entropy(params, batch):
    return optax.softmax_cross_entropy_with_integer_labels(
        logits(params, batch["x"]), batch["y"]
    )


def _base(data, lane):
    return jax.tree.map(lambda x: x[lane.problem], data.base)


def _losses(data, lane, params, batch, targets, adapters):
    del data, lane
    if adapters is not None:
        params = lora.merge(targets, params, adapters)
    return _cross_entropy(params, batch)


def _first(data, lane, task, count):
    return {
        "x": data.images[lane.problem, task + 1, :count],
        "y": data.labels[lane.problem, lane.stream, task + 1, :count],
    }


def _draw(data, lane, tasks, key):
    which = jax.random.randint(key, tasks.shape, 0, TRAIN)
    return {
        "x": data.images[lane.problem, tasks + 1, which],
        "y": data.labels[lane.problem, lane.stream, tasks + 1, which],
    }


def _evaluate(data, lane, params, targets, stack):
    images = data.images[lane.problem, :, TRAIN:]
    labels = data.labels[lane.problem, lane.stream, :, TRAIN:]

    def accuracy(params, images, labels):
        return (logits(params, images).argmax(-1) == labels).mean()

    def one(adapters, images, labels):
        return accuracy(lora.merge(targets, params, adapters), images, labels)

    base = accuracy(params, images[0], labels[0])
    if stack is None:
        right = jax.vmap(accuracy, (None, 0, 0))(params, images[1:], labels[1:])
    else:
        right = jax.vmap(one)(stack, images[1:], labels[1:])
    return {"accuracy": right, "base": base}


@functools.cache
def _digits():
    from sklearn.datasets import load_digits

    digits = load_digits()
    return np.float32(digits.data / 16.0), np.int32(digits.target)


def _stream(seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    pixels, classes = _digits()
    order = random.permutation(len(pixels))
    pixels, classes = pixels[order], classes[order]
    images, names = [pixels], [np.arange(CLASSES)]
    for _ in range(TASKS):
        moved = random.choice(PIXELS, MOVED, replace=False)
        source = np.arange(PIXELS)
        source[moved] = random.permutation(moved)
        images.append(pixels[:, source])
        names.append(random.permutation(CLASSES))
    kept = np.stack([classes] * (1 + TASKS))
    renamed = np.stack([n[classes] for n in names])
    return np.stack(images), np.int32(np.stack([kept, renamed]))


@jax.jit
def _train_base(images, labels, seeds):
    """The base networks of all seeds, side by side."""
    tx = optax.adam(_BASE_RATE)

    def init(key):
        keys = jax.random.split(key, len(SIZES) - 1)
        return {
            f"layer{i}": {
                "kernel": jax.random.normal(k, [a, b]) * np.sqrt(2.0 / a),
                "bias": jnp.zeros(b),
            }
            for i, (k, a, b) in enumerate(zip(keys, SIZES[:-1], SIZES[1:], strict=True))
        }

    def train(images, labels, seed):
        key = jax.random.key(seed)
        params = init(jax.random.fold_in(key, 0))

        def step(carry, index):
            params, state = carry
            draw = jax.random.fold_in(jax.random.fold_in(key, 1), index)
            which = jax.random.randint(draw, [_BASE_BATCH], 0, TRAIN)
            batch = {"x": images[which], "y": labels[which]}
            grads = jax.grad(lambda p: _cross_entropy(p, batch).mean())(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        carry, _ = jax.lax.scan(
            step, (params, tx.init(params)), jnp.arange(_BASE_STEPS)
        )
        return carry[0]

    # One after another: a seed's network must not depend on which others are made.
    return jax.lax.map(lambda args: train(*args), (images, labels, seeds))


RANK = 8
BENCH = Bench(
    tasks=TASKS,
    batch=64,
    ranks={"kernel": RANK},
    # Two disjoint blocks of directions must fit beside each other in the last kernel.
    surgical_ranks={"layer2/kernel": CLASSES // 2, "kernel": RANK},
    matrices=None,
    memory=lambda path: 56 if path.startswith("layer0") else 96,
    start_examples=128,
    memory_examples=256,
    base=_base,
    losses=_losses,
    first=_first,
    draw=_draw,
    evaluate=_evaluate,
)
