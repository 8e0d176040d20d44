"""Kronecker factors beside the diagonal Fisher, on digits with permuted pixels."""

import jax
import numpy as np
import optax
import pytest

import optax_cl
from optax_cl.penalties import kronecker_laplace
from tests.permuted_digits import TASK, accuracy, descend, digit_tasks, start, summary

# The best of 1, 3, ... 1000 on seeds 10 and 11, which are not those of the test.
STRENGTHS = {"ewc": 10.0, "kronecker": 10.0}


def optimizer(name, strength):
    penalty = optax_cl.ewc if name == "ewc" else kronecker_laplace
    return optax_cl.chain(
        penalty(strength),
        optax_cl.scale_by_decoupled_adam(),
        optax.scale_by_learning_rate(2e-3),
    )


def final_accuracies(name, strength, seed):
    """Test accuracy on each task after the last."""
    key = jax.random.key(seed)
    k1, k2, key = jax.random.split(key, 3)
    params, tx = start((k1, k2)), optimizer(name, strength)
    state = tx.init(params)
    train = jax.jit(lambda *args: descend(tx, *args))
    end = jax.jit(optax_cl.end_task)
    stream = digit_tasks(seed)
    for i, (data, _) in enumerate(stream):
        key_task, key_fisher = jax.random.split(jax.random.fold_in(key, i))
        params, state = train(params, state, data, key_task)
        rows = [slice(0, 200), slice(200, 300)]
        batches = [jax.tree.map(lambda x, r=r: x[r], data) for r in rows]
        stats = optax_cl.collect(state, params, batches, task=TASK, key=key_fisher)
        state = end(state, params, stats)
    return np.array([accuracy(params, test) for _, test in stream])


@pytest.mark.slow
def test_kronecker_factors_keep_more_than_the_diagonal_on_every_seed():
    runs = {
        name: summary(name, [final_accuracies(name, s, seed) for seed in (0, 1, 2)])
        for name, s in STRENGTHS.items()
    }
    plain = summary("plain", [final_accuracies("ewc", 0.0, s) for s in (0, 1, 2)])
    gain = (runs["kronecker"] - runs["ewc"]).mean(1)
    assert (gain > 0).all(), gain
    assert (runs["kronecker"].mean(1) > plain.mean(1) + 0.1).all()
