"""Progress & Compress, put together of its parts, on digits with permuted pixels."""

import functools

import jax
import numpy as np
import optax
import pytest

import optax_cl
from optax_cl.distillation import lwf_loss
from tests.permuted_digits import (
    TASK,
    accuracy,
    descend,
    digit_tasks,
    logits,
    start,
    summary,
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
    loss = functools.partial(loss, teacher)
    return descend(tx, params, state, data, key, loss)


def labels(teacher, params, batch):
    del teacher
    return TASK.loss(params, batch)


def distil(teacher, params, batch):
    return lwf_loss(logits(params, batch), logits(teacher, batch), temperature=1.0)


def final_accuracies(seed, strength):
    """Test accuracy of the knowledge base on each task after the last."""
    key = jax.random.key(seed)
    base = start(jax.random.split(key))
    state = compress(strength).init(base)
    stream = digit_tasks(seed)
    for i, (data, _) in enumerate(stream):
        keys = jax.random.split(jax.random.fold_in(key, i), 4)
        active = start(jax.random.split(keys[0]))
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
        strength: summary(
            strength, [final_accuracies(seed, strength) for seed in range(5)]
        )
        for strength in (0.0, STRENGTH)
    }
    free, held = found.values()
    assert (held.mean(1) > free.mean(1) + 0.05).all()
    assert held[:, -1].min() > 0.7  # and it still learns
    # As the docs have it.
    np.testing.assert_allclose([free.mean(), held.mean()], [0.651, 0.803], atol=0.01)
