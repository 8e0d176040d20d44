"""GEM, PCGrad and replay on digits that come two classes at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_cl
from tests import digit_pairs
from tests.permuted_digits import summary

TASKS, KEPT, STEPS, BATCH, HIDDEN = 3, 40, 60, 16, 32
TRACES = []


def loss(params, x, y, weights):
    hidden = jax.nn.relu(x @ params["w1"] + params["b1"][None])
    logits = hidden @ params["w2"] + params["b2"][None]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
    return jnp.sum(weights * losses) / jnp.maximum(weights.sum(), 1), logits


def gradient(params, x, y, weights):
    return jax.grad(lambda p: loss(p, x, y, weights)[0])(params)


def _mean(updates, state, params=None, *, memory_updates, memory_mask, **_):
    """Of the gradients of all tasks: replay, with no surgery."""
    del params
    count = 1 + memory_mask.sum()

    def mean(g, past):
        return (g + jnp.tensordot(1.0 * memory_mask, past, 1)) / count

    return jax.tree.map(mean, updates, memory_updates), state


ARMS = {
    "plain": (),
    "gem": (optax_cl.gem(),),
    "margin": (optax_cl.gem(margin=0.5),),
    "replay": (optax.GradientTransformationExtraArgs(lambda p: (), _mean),),
    "pcgrad": (optax_cl.pcgrad(reduce="mean"),),
}


def optimizer(arm):
    return optax_cl.chain(*ARMS[arm], optax.sgd(0.1))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def train(arm, params, state, memory, data, task, key):
    TRACES.append(arm)
    tx = optimizer(arm)

    def step(carry, key):
        params, state, memory = carry
        pick, add = jax.random.split(key)
        rows = jax.random.randint(pick, [BATCH], 0, len(data["y"]))
        batch = jax.tree.map(lambda a: a[rows], data)
        kept = jnp.arange(KEPT)[None] < memory.seen[:, None]
        memory_updates = jax.vmap(gradient, (None, 0, 0, 0))(
            params, memory.items["x"], memory.items["y"], 1.0 * kept
        )
        grads = gradient(params, batch["x"], batch["y"], jnp.ones(BATCH))
        updates, state = tx.update(
            grads,
            state,
            params,
            memory_updates=memory_updates,
            memory_mask=jnp.arange(TASKS) < task,
        )
        # One reservoir for each task: only that of the current one is offered items.
        current = jnp.repeat((jnp.arange(TASKS) == task)[:, None], BATCH, 1)
        memory = jax.vmap(optax_cl.reservoir_add, (0, None, 0, 0))(
            memory, batch, jax.random.split(add, TASKS), current
        )
        return (optax.apply_updates(params, updates), state, memory), None

    keys = jax.random.split(key, STEPS)
    return jax.lax.scan(step, (params, state, memory), keys)[0]


def final_accuracies(arm, seed):
    """Accuracy on each task's test data after the last task, one head for all."""
    k1, k2, key = jax.random.split(jax.random.key(seed), 3)
    params = {
        "w1": jax.random.normal(k1, (64, HIDDEN)) / 8,
        "b1": jnp.zeros(HIDDEN),
        "w2": jax.random.normal(k2, (HIDDEN, 10)) / 6,
        "b2": jnp.zeros(10),
    }
    state = optimizer(arm).init(params)
    both = digit_pairs.load(seed, TASKS)
    # Tasks of one size are one compilation.
    stream = [
        [{k: v[task] for k, v in part.items()} for part in both]
        for task in range(TASKS)
    ]
    item = jax.tree.map(lambda a: a[0], stream[0][0])
    empty = optax_cl.reservoir_init(KEPT, item)
    memory = jax.tree.map(lambda a: jnp.stack([a] * TASKS), empty)
    for task, (data, _) in enumerate(stream):
        key_task = jax.random.fold_in(key, task)
        params, state, memory = train(
            arm, params, state, memory, data, jnp.int32(task), key_task
        )
    np.testing.assert_array_equal(memory.seen, STEPS * BATCH)
    accuracies = []
    for _, test in stream:
        _, logits = loss(params, test["x"], test["y"], np.ones(len(test["y"])))
        accuracies.append(np.mean(np.asarray(logits).argmax(1) == test["y"]))
    return np.array(accuracies)


@pytest.mark.slow
def test_gem_beats_fine_tuning_a_margin_beats_none_and_all_compile_once():
    found = {
        arm: summary(arm, [final_accuracies(arm, seed) for seed in range(5)])
        for arm in ARMS
    }
    plain, projected, margin = (found[arm] for arm in ("plain", "gem", "margin"))
    assert plain[:, :2].max() < 0.2  # forgotten
    assert (projected.mean(1) > plain.mean(1) + 0.25).all()
    assert (margin.mean(1) > projected.mean(1) + 0.1).all()
    assert min(found[arm][:, -1].min() for arm in ("gem", "margin", "pcgrad")) > 0.8
    # As the docs have it.
    means = [runs.mean() for runs in found.values()]
    np.testing.assert_allclose(means, [0.33, 0.73, 0.95, 0.93, 0.93], atol=0.03)
    difference = (found["pcgrad"] - found["replay"]).mean(1)
    print(f"{difference.mean():.4f} +- {difference.std(ddof=1) / 5**0.5:.4f}")
    assert sorted(TRACES) == sorted(ARMS)
