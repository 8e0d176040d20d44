"""Sensitivity to the order of tasks."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_cl import metrics

FINAL = np.array([[0.5, 1.0], [0.75, 0.25], [1.0, 0.75]])  # Three orders, two tasks.


def test_order_sensitivity_by_hand():
    got = metrics.order_sensitivity(FINAL)
    np.testing.assert_allclose(got.mean, (0.75 + 0.5 + 0.875) / 3)
    np.testing.assert_allclose(got.range, 0.375)
    mean = 2.125 / 3
    squares = (0.75 - mean) ** 2 + (0.5 - mean) ** 2 + (0.875 - mean) ** 2
    np.testing.assert_allclose(got.sd, (squares / 2) ** 0.5)
    np.testing.assert_array_equal(got.opd, [0.5, 0.75])
    assert got.aopd == 0.625
    assert got.mopd == 0.75


@hypothesis.given(st.integers(0, 2**32 - 1))
def test_spread_of_the_average_is_at_most_the_mean_disparity(seed):
    final = np.random.default_rng(seed).uniform(size=(6, 4))
    got = metrics.order_sensitivity(final)
    assert got.sd <= got.range + 1e-12
    assert got.range <= got.aopd + 1e-12
    assert got.aopd <= got.mopd + 1e-12
    losses = metrics.order_sensitivity(2.0 - final)
    np.testing.assert_allclose(losses.opd, got.opd)
    np.testing.assert_allclose(losses.sd, got.sd)


def test_orders_that_change_nothing_have_no_spread():
    got = metrics.order_sensitivity(np.full((5, 3), 0.5))
    assert got.mean == 0.5
    assert got.sd == got.range == got.aopd == got.mopd == 0.0


def test_values_by_position_are_not_values_by_task():
    # Every task ends on a value of its own, whatever the order: no disparity.
    orders = np.array([[0, 1, 2], [2, 0, 1], [1, 2, 0]])
    own = np.array([0.2, 0.5, 0.9])
    by_position = own[orders]
    assert metrics.order_sensitivity(by_position).mopd > 0.5
    sorted_out = metrics.by_task(by_position, orders)
    np.testing.assert_array_equal(sorted_out, np.broadcast_to(own, (3, 3)))
    assert metrics.order_sensitivity(sorted_out).mopd == 0.0


def test_one_order_serves_a_batch():
    values = np.arange(6.0).reshape(2, 3)
    got = metrics.by_task(values, [2, 0, 1])
    np.testing.assert_array_equal(got, [[1.0, 2.0, 0.0], [4.0, 5.0, 3.0]])


def test_orders_work_over_batches_jit_and_vmap():
    final = np.random.default_rng(0).uniform(size=(3, 5, 4))
    orders = np.random.default_rng(1).permuted(
        np.broadcast_to(np.arange(4), (5, 4)), axis=-1
    )

    def run(values):
        return metrics.order_sensitivity(metrics.by_task(values, orders))

    expected = [run(x) for x in final]
    got = jax.jit(jax.vmap(run))(jnp.asarray(final))
    for i, one in enumerate(expected):
        jax.tree.map(
            lambda x, y, i=i: np.testing.assert_allclose(x[i], y, rtol=1e-5, atol=1e-6),
            got,
            one,
        )
    batched = metrics.order_sensitivity(final)
    assert batched.opd.shape == (3, 4) and batched.mopd.shape == (3,)


def test_wrong_results_are_refused():
    for shape in ((4,), (1, 4), (0, 4), (3, 0)):
        with pytest.raises(ValueError, match="`final` must have shape"):
            metrics.order_sensitivity(np.zeros(shape))
    broken = FINAL.copy()
    broken[1, 0] = np.nan
    with pytest.raises(ValueError, match=r"final\[1, 0\]"):
        metrics.order_sensitivity(broken)


def test_wrong_orders_are_refused():
    for orders in ([[0, 1]], [0, 1, 2], [[0], [1], [0]]):
        with pytest.raises(ValueError, match="`orders` must have one entry per value"):
            metrics.by_task(FINAL, orders)
    for orders in ([0, 0], [1, 2], [-1, 0]):
        with pytest.raises(ValueError, match=r"permutations of 0, \.\.\., 1"):
            metrics.by_task(FINAL, orders)
    with pytest.raises(TypeError, match="integers"):
        metrics.by_task(FINAL, [0.0, 1.0])
    with pytest.raises(TypeError, match="known at trace time"):
        jax.jit(lambda o: metrics.by_task(FINAL, o))(jnp.array([0, 1]))
