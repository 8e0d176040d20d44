"""Means, standard errors and paired differences over seeds."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_cl import metrics


def test_standard_error_by_hand():
    mean, se = metrics.mean_and_error([2.0, 4.0, 6.0])
    assert mean == 4.0
    # Sample variance (4 + 0 + 4) / 2 = 4; error of the mean 2 / sqrt(3).
    np.testing.assert_allclose(se, 2.0 / np.sqrt(3.0))


def test_paired_difference_by_hand():
    mean, se = metrics.paired_difference([3.0, 5.0, 10.0], [2.0, 3.0, 7.0])
    assert mean == 2.0
    np.testing.assert_allclose(se, 1.0 / np.sqrt(3.0))


@hypothesis.given(st.integers(0, 2**32 - 1))
def test_what_the_seeds_share_drops_out_of_a_paired_difference(seed):
    rng = np.random.default_rng(seed)
    a, b, shared = rng.normal(size=(3, 5, 2))
    expected = metrics.paired_difference(a, b)
    got = metrics.paired_difference(a + 100.0 * shared, b + 100.0 * shared)
    np.testing.assert_allclose(got.mean, expected.mean, atol=1e-10)
    np.testing.assert_allclose(got.se, expected.se, atol=1e-10)
    swapped = metrics.paired_difference(b, a)
    np.testing.assert_allclose(swapped.mean, -expected.mean)
    np.testing.assert_allclose(swapped.se, expected.se)


def test_every_number_of_a_summary_is_averaged_over_seeds():
    matrix = np.random.default_rng(0).uniform(size=(5, 4, 3))
    numbers = metrics.summary(matrix)
    over_seeds = jax.tree.map(metrics.mean_and_error, numbers)
    mean, _ = over_seeds.backward_transfer
    each = [metrics.backward_transfer(m) for m in matrix]
    np.testing.assert_allclose(mean, np.mean(each))
    curves = np.random.default_rng(0).uniform(size=(5, 3, 9))
    jax.tree.map(metrics.mean_and_error, metrics.curve_summary(curves, [2, 5]))


def test_another_axis_and_jit():
    values = np.random.default_rng(0).normal(size=(3, 6))
    expected = metrics.mean_and_error(values.T)
    for got in (
        metrics.mean_and_error(values, axis=-1),
        jax.jit(lambda x: metrics.mean_and_error(x, axis=1))(jnp.asarray(values)),
        jax.vmap(metrics.mean_and_error)(jnp.asarray(values)),
    ):
        np.testing.assert_allclose(got.mean, expected.mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(got.se, expected.se, rtol=1e-5)


def test_one_seed_has_no_standard_error():
    for values, axis in (([1.0], 0), (1.0, 0), ([1.0, 2.0], 1), (np.zeros((3, 1)), 1)):
        with pytest.raises(ValueError, match="at least two seeds"):
            metrics.mean_and_error(values, axis=axis)


def test_seeds_that_do_not_pair_or_are_not_finite_are_refused():
    with pytest.raises(ValueError, match=r"one shape.*\(2,\) and \(3,\)"):
        metrics.paired_difference([1.0, 2.0], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="at least two seeds"):
        metrics.paired_difference([1.0], [1.0])
    with pytest.raises(ValueError, match=r"nan at b\[1\]"):
        metrics.paired_difference([1.0, 2.0], [1.0, np.nan])
    with pytest.raises(ValueError, match=r"inf at values\[0\]"):
        metrics.mean_and_error([np.inf, 1.0])
