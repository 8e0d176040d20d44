"""Progressive columns against separate networks, on digits with permuted pixels."""

import functools

import jax
import numpy as np
import optax
import pytest

import optax_cl
from optax_cl.isolation import progressive
from tests.permuted_digits import (
    HIDDEN,
    NUM_TASKS,
    accuracy,
    descend,
    digit_tasks,
    logits,
    start,
    summary,
)

ADAM = optax.adam(2e-3)
TX = optax.chain(ADAM, progressive(NUM_TASKS, inputs="w1"))


def loss(task, params, batch):
    return optax.softmax_cross_entropy_with_integer_labels(
        logits(params, batch).reshape(-1, NUM_TASKS, 10)[:, task], batch["y"]
    )


@jax.jit
def train(params, state, data, key, task):
    return descend(TX, params, state, data, key, functools.partial(loss, task))


@jax.jit
def train_alone(params, data, key):
    return descend(ADAM, params, ADAM.init(params), data, key)[0]


@jax.jit
def correct(params, data, task):
    found = logits(params, data).reshape(-1, NUM_TASKS, 10)[:, task].argmax(1)
    return (found == data["y"]).mean()


def accuracies(seed):
    """On each task right after it, at the end, and of a network for that task alone."""
    k1, k2, key = jax.random.split(jax.random.key(seed), 3)
    params = start((k1, k2), NUM_TASKS * HIDDEN, NUM_TASKS * 10)
    state, stream = TX.init(params), digit_tasks(seed)
    after, alone = [], []
    for i, (data, test) in enumerate(stream):
        key_train, *key_start = jax.random.split(jax.random.fold_in(key, i), 3)
        params, state = train(params, state, data, key_train, i)
        after.append(correct(params, test, i))
        alone.append(accuracy(train_alone(start(key_start), data, key_train), test))
        if i < NUM_TASKS - 1:
            none = [data["x"][:1]]
            stats = optax_cl.collect(
                state, params, none, task=optax_cl.Task(), key=jax.random.key(0)
            )
            state = optax_cl.end_task(state, params, stats, moments="reset")
    return after, [correct(params, d[1], i) for i, d in enumerate(stream)], alone


@pytest.mark.slow
def test_no_task_loses_anything_and_columns_learn_as_well_as_separate_networks():
    runs = [accuracies(seed) for seed in range(5)]
    after, end, alone = (
        summary(name, [run[i] for run in runs])
        for i, name in enumerate(("after", "end", "alone"))
    )
    assert np.array_equal(after, end)
    difference = end.mean(1) - alone.mean(1)
    print(f"{difference.mean():.4f} +- {difference.std(ddof=1) / 5**0.5:.4f}")
    assert end.min() > 0.9
    # As the docs have it.
    np.testing.assert_allclose([end.mean(), alone.mean()], [0.946, 0.941], atol=0.005)
