"""Digits for the classic methods: two streams of five tasks, three scenarios.

- ``domain``: the pixels of all digits, permuted anew in every task; one head of ten.
- ``class``: two digits after two, one head of ten, and nothing tells the task.
- ``task``: the same stream, and the task is told: its two classes alone compete.

The model is a ReLU network 65-64-64-10 without biases, which no basis would protect;
the 65th input is constant. Rows of two classes alternate, 125 of each for training.
"""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

SCENARIOS = ("domain", "class", "task")
TASKS, CLASSES, PIXELS = 5, 10, 64
HIDDEN = 64
TRAIN, TEST = 1250, 450
_OF_CLASS = 125, 45  # images of one class for training and evaluation


class Data(NamedTuple):
    """Streams of several seeds; the first ``TRAIN`` rows are for training.

    Rows of the second stream are repeated five times, so that shapes agree; the first
    250 of them are all that there is.
    """

    images: chex.Array  # float32 [seeds, 2, tasks, TRAIN + TEST, 65]
    labels: chex.Array  # int32 [seeds, 2, tasks, TRAIN + TEST]


def make_data(seeds: tuple[int, ...]) -> Data:
    """The streams of the seeds; which images are held out depends on the seed too."""
    parts = [[_permuted(seed), _pairs(seed)] for seed in seeds]
    images = np.stack([[images for images, _ in both] for both in parts])
    labels = np.stack([[labels for _, labels in both] for both in parts])
    ones = np.ones((*images.shape[:-1], 1))
    return Data(np.float32(np.concatenate([images, ones], -1)), np.int32(labels))


@functools.cache
def _digits():
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.data / 16.0, digits.target


def _permuted(seed):
    random = np.random.default_rng(seed)
    pixels, classes = _digits()
    rows = random.permutation(len(pixels))[: TRAIN + TEST]
    moved = [random.permutation(PIXELS) for _ in range(TASKS)]
    return np.stack([pixels[rows][:, p] for p in moved]), np.stack(
        [classes[rows]] * TASKS
    )


def _pairs(seed):
    random = np.random.default_rng(seed)
    pixels, classes = _digits()
    order = random.permutation(CLASSES).reshape(TASKS, 2)
    train, test = _OF_CLASS
    tasks = []
    for pair in order:
        rows = [random.permutation(np.flatnonzero(classes == c)) for c in pair]
        alternating = np.stack([r[: train + test] for r in rows], 1).ravel()
        parts = alternating[: 2 * train], alternating[2 * train :]
        tasks.append(np.concatenate([np.tile(part, 5) for part in parts]))
    rows = np.stack(tasks)
    # A class is known by its place in the stream, so that masks are the same for all.
    place = np.argsort(order.ravel())
    return pixels[rows], place[classes[rows]]


def init(key: chex.PRNGKey, width: int = HIDDEN, outputs: int = CLASSES):
    """Parameters of the network; He's initialization."""
    sizes = {"in": (PIXELS + 1, width), "middle": (width, width)}
    sizes["out"] = (width, outputs)
    keys = jax.random.split(key, len(sizes))
    return {
        name: jax.random.normal(k, shape) * np.sqrt(2.0 / shape[0])
        for k, (name, shape) in zip(keys, sizes.items(), strict=True)
    }


def inputs(params: chex.ArrayTree, x: chex.Array) -> dict[str, chex.Array]:
    """What each kernel multiplies; of the last one these are the features."""
    first = jax.nn.relu(x @ params["in"])
    return {"in": x, "middle": first, "out": jax.nn.relu(first @ params["middle"])}


def outputs(params: chex.ArrayTree, x: chex.Array) -> chex.Array:
    """The network's outputs, all of them."""
    return inputs(params, x)["out"] @ params["out"]


def rows(data: Data, lane, task: chex.Array, which: chex.Array) -> dict:
    """Some rows of a task (or one row each of many) as a batch.

    ``may`` says which classes compete.
    """
    stream = jnp.minimum(lane.scenario, 1)
    y = data.labels[lane.problem, stream, task, which]
    pairs = jnp.broadcast_to(jnp.arange(CLASSES) // 2, (*y.shape, CLASSES))
    own = pairs == (y // 2)[..., None]
    told = lane.scenario == SCENARIOS.index("task")
    return {
        "x": data.images[lane.problem, stream, task, which],
        "y": y,
        "may": own | ~told,
    }
