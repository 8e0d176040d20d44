"""Which averages of an optimizer a reset reaches."""

import warnings

import jax
import numpy as np
import optax
import pytest

import optax_cl
import optax_cl.testing
from tests.arrays import normal

OPTIMIZERS = {
    "adabelief": optax.adabelief(0.1),
    "adadelta": optax.adadelta(0.1),
    "adafactor": optax.adafactor(0.1, momentum=0.9),
    "adafactor, factored": optax.adafactor(0.1, min_dim_size_to_factor=2),
    "adagrad": optax.adagrad(0.1),
    "adamw": optax.adamw(0.1),
    "amsgrad": optax.amsgrad(0.1),
    "lion": optax.lion(0.1),
    "muon": optax.contrib.muon(0.1),
    "novograd": optax.novograd(0.1),
    "rmsprop": optax.rmsprop(0.1, centered=True, momentum=0.9),
    "sgd": optax.sgd(0.1, momentum=0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_reset_reaches_every_average(name):
    tx = OPTIMIZERS[name]
    params = {"w": normal(0, 4, 3), "b": np.ones((1, 3), np.float32)}
    init, update = jax.jit(tx.init), jax.jit(tx.update)
    state = first = init(params)
    for seed in range(2):
        grads = jax.tree.map(lambda p, s=seed: normal(s, *p.shape), params)
        _, state = update(grads, state, params)
    statistics = optax_cl.collect(
        state, params, [], task=optax_cl.Task(), key=jax.random.key(0)
    )
    state = optax_cl.end_task(state, params, statistics, moments="reset")
    for (path, leaf), begun in zip(
        jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(first), strict=True
    ):
        # Muon's state holds the coefficients of its iteration too.
        kept = jax.tree_util.GetAttrKey("ns_coeffs") in path
        expected = begun if kept else np.zeros_like(begun)
        np.testing.assert_array_equal(leaf, expected, str(path))


@pytest.mark.parametrize("policy", ["reset", "project"])
def test_averages_that_nothing_names_are_told_of(policy):
    tx = optax.masked(optax.adan(0.1), {"w": True})
    if policy == "project":
        tx = optax_cl.protect(1, optax_cl.scale_by_decoupled_adam(), tx)
    params = {"w": np.ones((4, 3), np.float32)}
    state = tx.init(params)
    statistics = optax_cl.testing.collect_synthetic(state, params)
    with pytest.warns(UserWarning, match=r"leaves `ScaleByAdanState` as it is"):
        optax_cl.end_task(state, params, statistics, moments=policy)


def test_wrappers_of_known_averages_are_not_told_of():
    tx = optax.inject_hyperparams(optax.adamw)(0.1)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.masked(tx, {"w": True}))
    tx = optax.chain(tx, optax.apply_every(2), optax.contrib.reduce_on_plateau())
    tx = optax.MultiSteps(optax.apply_if_finite(tx, 3), 2)
    params = {"w": np.ones((4, 3), np.float32)}
    ours = optax_cl.protect(1, optax_cl.scale_by_decoupled_adam(), optax.sgd(0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optax_cl.reset_state(tx.init(params))
        optax_cl.reset_state(jax.vmap(lambda _: tx.init(params))(np.arange(2)))
        # What a wrapper holds is no average of the wrapper's.
        optax_cl.reset_state(optax.masked(ours, {"w": True}).init(params))


@pytest.mark.parametrize("place", ["modifier", "post"])
@pytest.mark.parametrize("moments", ["scale_by_decoupled_adam", "scale_by_adam"])
def test_projected_moments_keep_the_bound_on_steps(place, moments):
    # The first input is never seen in training, but is at the boundary: its second
    # moment is zero, and the basis has a share of it.
    task = optax_cl.classification(lambda p, b: b["x"] @ p, lambda b: b["y"])
    labels = np.random.default_rng(0).integers(0, 4, (200, 64), np.int32)
    batches = {"x": np.asarray(normal(1, 200, 64, 16)), "y": labels}
    unseen = {**batches, "x": batches["x"] * (np.arange(16) > 0).astype(np.float32)}
    adam = getattr(optax_cl, moments, None) or getattr(optax, moments)
    links = [adam(), optax_cl.project()]
    if place == "modifier":
        links = [optax_cl.attenuate(0.5), adam()]
    tx = optax_cl.protect(4, *links)

    def step(carry, batch):
        w, state = carry
        grads = jax.grad(lambda w: task.loss(w, batch).mean())(w)
        updates, state = tx.update(grads, state, w)
        return (w - 0.01 * updates, state), updates

    w = np.asarray(normal(2, 16, 4)) / 10
    (w, state), _ = jax.lax.scan(step, (w, tx.init(w)), unseen)
    statistics = optax_cl.collect(
        state,
        w,
        jax.tree.map(lambda x: x[:4], batches),
        task=task,
        key=jax.random.key(3),
        stacked=True,
    )
    state = optax_cl.end_task(state, w, statistics, moments="project")
    _, updates = jax.jit(step)((w, state), jax.tree.map(lambda x: x[0], unseen))
    assert np.abs(updates).max() < 3.2  # Adam's, at (1 - b1) / sqrt(1 - b2)


def test_an_optimizer_whose_second_moment_is_a_sum_is_no_modifier():
    tx = optax_cl.decoupled_adamw(0.1, modifiers=[optax.adagrad(0.1)])
    with pytest.raises(ValueError, match=r"`modifiers\[0\]` holds a second moment"):
        tx.init(np.ones(3, np.float32))


def test_what_apply_every_gathered_is_dropped_at_the_boundary():
    tx = optax.chain(optax.sgd(1.0), optax.apply_every(2))
    params = {"w": np.zeros(2, np.float32)}
    state = tx.init(params)
    _, state = tx.update({"w": np.full(2, 100, np.float32)}, state, params)
    state = optax_cl.end_task(state, params, optax_cl.Statistics(np.ones([]), {}))
    given = []
    for _ in range(2):
        updates, state = tx.update({"w": np.ones(2, np.float32)}, state, params)
        given.append(float(updates["w"][0]))
    assert given == [0, -2]
