"""Progress & Compress, put together of its parts, on digits with permuted pixels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_cl
from optax_cl.distillation import lwf_loss
from tests.penalties.test_ewc_digits import (
    BATCH,
    HIDDEN,
    STEPS,
    TASK,
    accuracy,
    digit_tasks,
    logits,
)

STRENGTH = 30.0  # chosen from 3, 10, 30 and 100 on seeds 10 and 11
PROGRESS = optax.adam(2e-3)


def compress(strength):
    """Online EWC, whose Fisher decays."""
    return optax_cl.chain(
        optax_cl.ewc(strength, anchors="latest", accumulate="decay", decay=0.9),
        optax_cl.scale_by_decoupled_adam(),
        optax.scale_by_learning_rate(2e-3),
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def train(make, loss, params, state, data, key, strength, teacher):
    tx = PROGRESS if make is None else make(strength)

    def step(carry, key):
        params, state = carry
        rows = jax.random.randint(key, [BATCH], 0, len(data["y"]))
        batch = jax.tree.map(lambda x: x[rows], data)
        grads = jax.grad(lambda p: loss(p, batch, teacher).mean())(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, state), jax.random.split(key, STEPS))[0]


def labels(params, batch, teacher):
    del teacher
    return TASK.loss(params, batch)


def distil(params, batch, teacher):
    return lwf_loss(logits(params, batch), logits(teacher, batch), temperature=1.0)


def start(key):
    k1, k2 = jax.random.split(key)
    return {
        "w1": jax.random.normal(k1, (64, HIDDEN)) / 8,
        "b1": jnp.zeros(HIDDEN),
        "w2": jax.random.normal(k2, (HIDDEN, 10)) / 8,
        "b2": jnp.zeros(10),
    }


def final_accuracies(seed, strength):
    """Test accuracy of the knowledge base on each task after the last."""
    key = jax.random.key(seed)
    base = start(key)
    state = compress(strength).init(base)
    stream = digit_tasks(seed)
    for i, (data, _) in enumerate(stream):
        keys = jax.random.split(jax.random.fold_in(key, i), 4)
        active = start(keys[0])
        active, _ = train(
            None, labels, active, PROGRESS.init(active), data, keys[1], 0.0, active
        )
        base, state = train(
            compress, distil, base, state, data, keys[2], strength, active
        )
        batches = [jax.tree.map(lambda x, r=r: x[r : r + 150], data) for r in (0, 150)]
        stats = optax_cl.collect(state, base, batches, task=TASK, key=keys[3])
        state = optax_cl.end_task(state, base, stats)
    return [accuracy(base, test) for _, test in stream]


@pytest.mark.slow
def test_a_knowledge_base_held_by_online_ewc_forgets_less():
    found = {
        strength: np.array([final_accuracies(seed, strength) for seed in range(5)])
        for strength in (0.0, STRENGTH)
    }
    for strength, runs in found.items():
        error = runs.mean(1).std(ddof=1) / 5**0.5
        print(f"{strength}: {runs.mean(0).round(3)} {runs.mean():.3f} +- {error:.3f}")
    free, held = found.values()
    assert (held.mean(1) > free.mean(1) + 0.05).all()
    assert held[:, -1].min() > 0.7  # and it still learns
    # As the docs have it.
    np.testing.assert_allclose([free.mean(), held.mean()], [0.651, 0.803], atol=0.01)
