"""The digits of scikit-learn, pixels permuted in every task: stream, network, training.

For end-to-end tests, which differ in the optimizer and in what a task's end does.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import optax_cl

NUM_TASKS, STEPS, BATCH, HIDDEN = 3, 250, 32, 64


def digit_tasks(seed):
    """For each task the training and the test data."""
    rng = np.random.default_rng(seed)
    x, y = load_digits(return_X_y=True)
    x, order = np.float32(x / 16), rng.permutation(len(y))
    split = order[:1200], order[1200:]
    pixels = [rng.permutation(64) for _ in range(NUM_TASKS)]
    return [[{"x": x[rows][:, p], "y": y[rows]} for rows in split] for p in pixels]


def start(key, width=HIDDEN, outputs=10):
    k1, k2 = key
    return {
        "w1": jax.random.normal(k1, (64, width)) / 8,
        "b1": jnp.zeros(width),
        "w2": jax.random.normal(k2, (width, outputs)) / 8,
        "b2": jnp.zeros(outputs),
    }


def logits(params, batch):
    hidden = jax.nn.relu(batch["x"] @ params["w1"] + params["b1"][None])
    return hidden @ params["w2"] + params["b2"][None]


TASK = optax_cl.classification(logits, lambda batch: batch["y"])


def descend(tx, params, state, data, key, loss=TASK.loss):
    """``STEPS`` steps on random batches; to be jitted."""

    def step(carry, key):
        params, state = carry
        rows = jax.random.randint(key, [BATCH], 0, len(data["y"]))
        batch = jax.tree.map(lambda x: x[rows], data)
        grads = jax.grad(lambda p: loss(p, batch).mean())(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, state), jax.random.split(key, STEPS))[0]


@jax.jit
def accuracy(params, data):
    return jnp.mean(logits(params, data).argmax(1) == data["y"])


def summary(name, runs):
    """Prints the mean over tasks and seeds (``-s`` shows it), and returns it."""
    runs = np.array(runs)
    error = runs.mean(1).std(ddof=1) / len(runs) ** 0.5
    print(f"{name}: {runs.mean(0).round(3)} {runs.mean():.3f} +- {error:.3f}")
    return runs
