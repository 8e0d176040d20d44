"""Rescaling by importance: the formula, its identities, and what Adam makes of it."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_cl
from optax_cl.penalties import rescale_by_importance

GRADS = {"w": jnp.array([1.0, -2.0, 3.0]), "b": jnp.array([5.0])}
IMPORTANCE = {"w": jnp.array([0.0, 1.0, 4.0]), "b": jnp.array([0.1])}


def remembered(tx, finish_task, *importances):
    state = tx.init(GRADS)
    for importance in importances or (IMPORTANCE,):
        state = finish_task(state, GRADS, importance)
    return state


@pytest.mark.parametrize(
    ("normalize", "strength", "w", "b"),
    [
        ("leaf_max", 0.5, [1.0, 0.875, 0.5], 0.5),
        ("leaf_max", 2.0, [1.0, 0.5, 0.0], 0.0),
        ("none", 0.5, [1.0, 0.5, 0.0], 0.95),
    ],
)
def test_each_coordinate_is_scaled_by_one_minus_its_importance_clipped(
    normalize, strength, w, b, finish_task
):
    tx = rescale_by_importance(strength, normalize=normalize)
    got, _ = tx.update(GRADS, remembered(tx, finish_task))
    np.testing.assert_allclose(got["w"], GRADS["w"] * jnp.array(w), rtol=1e-6)
    np.testing.assert_allclose(got["b"], GRADS["b"] * b, rtol=1e-6)


def test_importance_accumulates_over_tasks(finish_task):
    second = {"w": jnp.array([4.0, 0.0, 0.0]), "b": jnp.array([0.1])}
    tx = rescale_by_importance(1.0)
    got, _ = tx.update(GRADS, remembered(tx, finish_task, IMPORTANCE, second))
    np.testing.assert_allclose(got["w"], GRADS["w"] * jnp.array([0.0, 0.75, 0.0]))
    tx = rescale_by_importance(0.1, normalize="none", accumulate="ema", decay=0.5)
    got, _ = tx.update(GRADS, remembered(tx, finish_task, IMPORTANCE, second))
    np.testing.assert_allclose(
        got["w"], GRADS["w"] * (1 - 0.1 * jnp.array([2.0, 0.25, 1.0])), rtol=1e-6
    )


def test_a_leaf_without_importance_passes_unchanged_and_is_not_nan(finish_task):
    tx = rescale_by_importance(1.0)
    zero = {**IMPORTANCE, "b": jnp.zeros(1)}
    got, _ = tx.update(GRADS, remembered(tx, finish_task, zero))
    chex.assert_trees_all_equal(got["b"], GRADS["b"])


def test_a_leaf_without_entries_is_no_fault(finish_task):
    tx = rescale_by_importance(1.0)
    empty = jnp.zeros((0, 3))
    state = finish_task(tx.init(empty), empty, empty)
    assert tx.update(empty, state)[0].shape == (0, 3)


def test_gradients_pass_bit_for_bit_before_the_first_task_and_at_zero(finish_task):
    tx = rescale_by_importance(1.0)
    chex.assert_trees_all_equal(tx.update(GRADS, tx.init(GRADS))[0], GRADS)
    tx = rescale_by_importance(0.0)
    chex.assert_trees_all_equal(tx.update(GRADS, remembered(tx, finish_task))[0], GRADS)


@pytest.mark.parametrize(
    ("place", "expected"),
    [("routed", 1.0), ("max", 0.5), ("raw", 0.5), ("after", 0.5)],
)
def test_shared_moments_cancel_it_and_decoupled_ones_do_not(
    place, expected, finish_task
):
    second = "max" if place == "after" else place
    rescale = rescale_by_importance(0.5)
    adam = optax_cl.scale_by_decoupled_adam(second_moment=second)
    links = (adam, rescale) if place == "after" else (rescale, adam)
    tx = optax_cl.chain(*links)
    params = jnp.zeros(1)
    state = finish_task(tx.init(params), params, jnp.ones(1))
    moved = jnp.zeros(1)
    for _ in range(200):
        updates, state = tx.update(jnp.ones(1), state, params)
        moved += updates
    assert float(moved[0]) == pytest.approx(200 * expected, rel=1e-4)


def test_a_schedule_is_read_at_each_step(finish_task):
    tx = rescale_by_importance(optax.linear_schedule(0.0, 1.0, 2))
    state = remembered(tx, finish_task)
    for strength in (0.0, 0.5, 1.0):
        got, state = tx.update(GRADS, state)
        np.testing.assert_allclose(got["b"], 5.0 * (1 - strength), atol=1e-6)


def test_bfloat16_gradients_stay_bfloat16_and_memory_float32(finish_task):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), GRADS)
    tx = rescale_by_importance(0.5)
    state = finish_task(tx.init(half), half, IMPORTANCE)
    assert state.memory.importance["w"].dtype == jnp.float32
    assert state.memory.anchor is None
    got, _ = tx.update(half, state)
    assert got["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(jnp.float32(got["w"]), [1.0, -1.75, 1.5])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strength": -1.0}, "`strength`"),
        ({"normalize": "max"}, "`normalize` must be one of 'leaf_max', 'none'"),
        ({"accumulate": "ema"}, "needs `decay`"),
        ({"estimator": "fisher"}, "`estimator`"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        rescale_by_importance(**{"strength": 1.0, **arguments})
