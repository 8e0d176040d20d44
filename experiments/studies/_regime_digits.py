"""Part B: four streams of five tasks made of scikit-learn's 8x8 digits.

- ``perm``: another permutation of the pixels for each task, the first one identity;
- ``rot``: rotated by 0, 30, 60, 90 and 120 degrees;
- ``near``: rotated by -16 to 16 degrees, with another contrast and pixel noise for each
  task: tasks that agree;
- ``swap``: the same images, with the labels of one random pair of classes exchanged in
  each task: a direct conflict.

All tasks share one head, and nothing tells which task an image is from. The model is a
ReLU network 65-32-32-10 without biases; the 65th input is constant. Some pixels are
black in every image, so that whole rows of the first kernel never get a gradient.

Curvature may be taken under *tempered* logits z / T: labels are drawn from
p_T = softmax(z / T), and the score is J^T (e_y - p_T), which is the gradient of
T log p_T. Its Fisher J^T (diag(p_T) - p_T p_T^T) J is what the Hessian would be if the
network were less sure of itself; T = 1 is the ordinary Fisher.
"""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

import optax_cl
from experiments.studies._regime_program import Benchmark

STREAMS = ("perm", "rot", "near", "swap")
TASKS, CLASSES, SIDE = 5, 10, 8
SIZES = (SIDE * SIDE + 1, 32, 32, CLASSES)
TRAIN = 1297  # of 1797 images; the others are for evaluation


class Data(NamedTuple):
    """Streams of several seeds; the first ``TRAIN`` images are for training."""

    images: chex.Array  # float32 [seeds, streams, tasks, images, 65]
    labels: chex.Array  # int32 [seeds, streams, tasks, images]


@functools.cache
def _digits():
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.data / 16.0, digits.target


def make_data(seeds: tuple[int, ...]) -> Data:
    """The streams of the seeds; which images are held out depends on the seed too."""
    images, labels = zip(*(_streams(seed) for seed in seeds), strict=True)
    return Data(np.stack(images), np.stack(labels))


def _streams(seed):
    random = np.random.default_rng(seed)
    pixels, classes = _digits()
    order = random.permutation(len(pixels))
    pixels, classes = pixels[order], classes[order]
    identity = np.arange(SIDE * SIDE)
    contrasts = random.permutation(np.linspace(0.7, 1.3, TASKS))
    images, labels = [], []
    for stream in STREAMS:
        for task in range(TASKS):
            x, y = pixels, classes
            if stream == "perm":
                x = x[:, random.permutation(identity) if task else identity]
            elif stream == "rot":
                x = x @ rotation(30.0 * task).T
            elif stream == "near":
                x = contrasts[task] * (x @ rotation(8.0 * (task - 2)).T)
                x = x + 0.1 * random.normal(size=x.shape)
            else:
                one, other = random.choice(CLASSES, 2, replace=False)
                names = np.arange(CLASSES)
                names[[one, other]] = names[[other, one]]
                y = names[y]
            images.append(np.pad(x, ((0, 0), (0, 1)), constant_values=1.0))
            labels.append(y)
    shape = len(STREAMS), TASKS, len(pixels)
    return (
        np.float32(images).reshape(*shape, SIZES[0]),
        np.int32(labels).reshape(shape),
    )


def rotation(degrees: float) -> np.ndarray:
    """The matrix ``[64, 64]`` that rotates a flat image about its middle, bilinear."""
    angle = np.deg2rad(degrees)
    at = np.arange(SIDE) - (SIDE - 1) / 2
    rows, columns = (g.ravel() for g in np.meshgrid(at, at, indexing="ij"))
    from_row = np.cos(angle) * rows - np.sin(angle) * columns + (SIDE - 1) / 2
    from_column = np.sin(angle) * rows + np.cos(angle) * columns + (SIDE - 1) / 2

    def weights(places):
        # How near each source row (or column) is to a place; zero beyond one pixel.
        return np.maximum(0.0, 1.0 - np.abs(places[:, None] - np.arange(SIDE)))

    near = weights(from_row)[:, :, None] * weights(from_column)[:, None, :]
    return near.reshape(SIDE * SIDE, SIDE * SIDE)


def logits(params: chex.ArrayTree, images: chex.Array) -> chex.Array:
    """The network, ``[..., 65] -> [..., 10]``."""
    hidden = jax.nn.relu(images @ params["in"])
    return jax.nn.relu(hidden @ params["middle"]) @ params["out"]


def _init(key):
    names = "in", "middle", "out"
    keys = jax.random.split(key, len(names))
    return {
        name: jax.random.normal(k, [a, b]) * np.sqrt(2.0 / a)
        for name, k, a, b in zip(names, keys, SIZES[:-1], SIZES[1:], strict=True)
    }


def _sample(data, problem, regime, task, key, count):
    which = jax.random.randint(key, [count], 0, TRAIN)
    images, labels = data.images[problem, regime], data.labels[problem, regime]
    return {"x": images[task, which], "y": labels[task, which]}


def _evaluate(data, problem, regime, params):
    def one(images, labels):
        out = logits(params, images)
        log_prob = jax.nn.log_softmax(out)[jnp.arange(len(labels)), labels]
        right = jnp.argmax(out, axis=-1) == labels
        # Not a number is no answer, though argmax makes it class 0.
        right = right & jnp.isfinite(log_prob)
        return {"error": 1 - right.mean(), "loss": -log_prob.mean()}

    images, labels = data.images[problem, regime], data.labels[problem, regime]
    return jax.vmap(one)(images[:, TRAIN:], labels[:, TRAIN:])


def _tempered() -> optax_cl.Task:
    def outputs(params, batch):
        return logits(params, batch["x"]) / batch["temperature"][:, None]

    def log_prob(params, batch, labels):
        scores = jax.nn.log_softmax(outputs(params, batch))
        chosen = jnp.take_along_axis(scores, labels[:, None], axis=-1)[:, 0]
        return batch["temperature"] * chosen

    return optax_cl.Task(
        loss=lambda params, batch: -log_prob(params, batch, batch["y"]),
        outputs=outputs,
        log_prob=log_prob,
        sample_label=lambda out, key: jax.random.categorical(key, out),
    )


def _loss(params, batch):
    scores = jax.nn.log_softmax(logits(params, batch["x"]))
    return -jnp.take_along_axis(scores, batch["y"][:, None], axis=-1).mean()


BENCHMARK = Benchmark(
    regimes=STREAMS,
    tasks=TASKS,
    batch=32,
    memory=7,
    init=_init,
    sample=_sample,
    loss=_loss,
    evaluate=_evaluate,
    task=_tempered(),
)
