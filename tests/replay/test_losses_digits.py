"""DER++ and ER-ACE against fine-tuning on digits, two classes at a time, one head."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_cl import replay
from tests import digit_pairs

TASKS, CLASSES, KEPT, STEPS, BATCH, HIDDEN = 5, 10, 100, 60, 16, 32
SEEDS = 5
TX = optax.sgd(0.1)


def network(params, x):
    hidden = jax.nn.relu(x @ params["w1"] + params["b1"][None])
    return hidden @ params["w2"] + params["b2"][None]


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def mean(weights, losses):
    return jnp.sum(weights * losses) / jnp.maximum(jnp.sum(weights), 1)


def objective(params, method, batch, draws, seen):
    logits = network(params, batch["x"])
    (first, w1), (second, w2) = draws
    if method == "er_ace":
        present = replay.classes_in(batch["y"], CLASSES)
        loss = replay.er_ace_loss(logits, batch["y"], present=present).mean()
        old = network(params, first["x"])
        loss += mean(w1, replay.er_ace_loss(old, first["y"], present=seen))
    else:
        loss = cross_entropy(logits, batch["y"]).mean()
    if method == "der++":
        dark = replay.der_loss(network(params, first["x"]), first["logits"])
        labelled = cross_entropy(network(params, second["x"]), second["y"])
        loss += 0.5 * mean(w1, dark) + 0.5 * mean(w2, labelled)
    return loss, logits


@functools.partial(jax.jit, static_argnums=0)
def train(method, key, data):
    """Final parameters, after all tasks in turn."""
    k1, k2, key = jax.random.split(key, 3)
    params = {
        "w1": jax.random.normal(k1, (64, HIDDEN)) / 8,
        "b1": jnp.zeros(HIDDEN),
        "w2": jax.random.normal(k2, (HIDDEN, CLASSES)) / 6,
        "b2": jnp.zeros(CLASSES),
    }
    item = {"x": jnp.zeros(64), "y": jnp.int32(0), "logits": jnp.zeros(CLASSES)}

    def step(carry, inputs):
        params, buffer, seen = carry
        task, key = inputs
        pick, add, one, two = jax.random.split(key, 4)
        rows = jax.random.randint(pick, [BATCH], 0, data["y"].shape[1])
        batch = jax.tree.map(lambda a: a[task, rows], data)
        draws = [replay.reservoir_sample(buffer, k, BATCH) for k in (one, two)]
        seen |= replay.classes_in(batch["y"], CLASSES)
        grads, logits = jax.grad(objective, has_aux=True)(
            params, method, batch, draws, seen
        )
        updates, _ = TX.update(grads, TX.init(params))
        buffer = replay.reservoir_add(buffer, {**batch, "logits": logits}, add)
        return (optax.apply_updates(params, updates), buffer, seen), None

    tasks = jnp.repeat(jnp.arange(TASKS), STEPS)
    keys = jax.random.split(key, len(tasks))
    start = params, replay.reservoir_init(KEPT, item), jnp.zeros(CLASSES, bool)
    return jax.lax.scan(step, start, (tasks, keys))[0][0]


def final_accuracies(method):
    """``[SEEDS, TASKS]``, on test data, one head for all."""
    found = []
    for seed in range(SEEDS):
        data, test = digit_pairs.load(seed)
        params = train(method, jax.random.key(seed), data)
        logits = network(params, test["x"].reshape(-1, 64))
        hits = np.asarray(logits).argmax(1) == test["y"].reshape(-1)
        found.append(hits.reshape(TASKS, -1).mean(1))
    return np.array(found)


@pytest.mark.slow
def test_both_beat_fine_tuning_on_every_seed_and_learn_the_last_task():
    plain, dark, ace = (final_accuracies(m) for m in ("plain", "der++", "er_ace"))
    assert plain[:, :-1].max() < 0.2  # forgotten
    for method in (dark, ace):
        assert (method.mean(1) > plain.mean(1) + 0.4).all()
        assert method[:, -1].mean() > 0.6
    # As the docs have it.
    means = [method.mean() for method in (plain, dark, ace)]
    np.testing.assert_allclose(means, [0.19, 0.82, 0.82], atol=0.03)
    last = [method[:, -1].mean() for method in (dark, ace)]
    np.testing.assert_allclose(last, [0.94, 0.69], atol=0.03)
