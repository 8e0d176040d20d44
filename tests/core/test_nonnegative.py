"""The quadratic program over the orthant, against SciPy and its own conditions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from hypothesis import given
from hypothesis import strategies as st

from optax_cl._core import nonnegative

SEEDS = st.integers(0, 2**31 - 1)
K, SIZE = 20, 60

minimise = jax.jit(nonnegative.minimise)


def rows_of(kind, seed, count=K, size=SIZE):
    """Unit rows that are hard in one way, and a vector that they mostly oppose."""
    rng = np.random.default_rng(seed)
    g, common = rng.normal(size=(2, size))
    rows = rng.normal(size=(count, size))
    if kind == "all opposed":
        rows = 0.7 * rows - 0.5 * g
    elif kind == "equal":
        rows = np.tile((rows - 0.3 * g)[: count // 2], (2, 1))
    elif kind == "dependent":
        rows = rng.normal(size=(count, 3)) @ rows[:3]
    elif kind.startswith("parallel"):
        rows = common - 0.5 * g + float(kind.split()[1]) * rows
    elif kind.startswith("opposite"):
        signs = np.where(np.arange(count) % 2, 1, -1)[:, None]
        rows = signs * (common - 0.5 * g) + float(kind.split()[1]) * rows
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows, g / np.linalg.norm(g)


def program(kind, seed, **sizes):
    """The dual of the projection of g, as it comes in float32."""
    rows, g = rows_of(kind, seed, **sizes)
    return np.float32(rows @ rows.T), np.float32(rows @ g)


def ridge(matrix):
    unit = np.finfo(np.float32).eps
    return 32 * unit * np.trace(matrix) / len(matrix)


def by_scipy(matrix, linear):
    """The same program in float64, as least squares."""
    values, vectors = np.linalg.eigh(np.float64(matrix))
    values = np.sqrt(np.maximum(values, 0) + ridge(matrix))
    target = -(vectors.T @ np.float64(linear)) / values
    return scipy.optimize.nnls(values[:, None] * vectors.T, target, maxiter=10**4)[0]


def objective(matrix, linear, x):
    matrix = np.float64(matrix) + ridge(matrix) * np.eye(len(x))
    return x @ matrix @ x / 2 + linear @ x


KINDS = [
    "plain",
    "all opposed",
    "equal",
    "dependent",
    "parallel 1e-1",
    "parallel 1e-2",
    "parallel 1e-3",
    "parallel 1e-4",
    "opposite 3e-2",
]


@pytest.mark.parametrize("kind", KINDS)
def test_no_point_of_scipy_is_lower(kind):
    for seed in range(8):
        matrix, linear = program(kind, seed)
        x = np.float64(minimise(matrix, linear))
        assert (x >= 0).all()
        found = objective(matrix, linear, x)
        lowest = objective(matrix, linear, by_scipy(matrix, linear))
        assert found <= lowest + 1e-6 * abs(lowest)


@pytest.mark.parametrize("kind", [*KINDS, "opposite 1e-3"])
def test_the_gradient_is_zero_where_free_and_not_negative_elsewhere(kind):
    # Also where x is a hundred times what it acts on, and objectives say little.
    for seed in range(8):
        matrix, linear = program(kind, seed)
        x = np.float64(minimise(matrix, linear))
        gradient = np.float64(matrix) @ x + ridge(matrix) * x + linear
        scale = np.abs(matrix) @ x + np.abs(linear)
        unit = np.finfo(np.float32).eps
        assert (gradient >= -8 * unit * scale).all()
        # Elimination adds a rounding or two for each entry.
        assert (np.abs(gradient) <= K * unit * scale)[x > 0].all()


def test_sweeps_of_coordinate_descent_would_be_far_off():
    matrix, linear = program("parallel 1e-2", 0)
    x = np.zeros(K)
    for _ in range(200):
        for k in range(K):
            step = (matrix[k] @ x + linear[k]) / matrix[k, k]
            x[k] = max(x[k] - step, 0)
    exact = np.float64(minimise(matrix, linear))
    rows, _ = rows_of("parallel 1e-2", 0)
    assert np.linalg.norm(rows.T @ (x - exact)) > 1e-3
    lowest = by_scipy(matrix, linear)
    assert np.linalg.norm(rows.T @ (lowest - exact)) < 1e-5


@given(SEEDS)
def test_all_sizes_of_active_sets_come_out_right(seed):
    rng = np.random.default_rng(seed)
    rows, g = rows_of("plain", seed, count=6, size=8)
    shift = rng.uniform(-1, 1)
    matrix, linear = np.float32(rows @ rows.T), np.float32(rows @ g + shift)
    np.testing.assert_allclose(
        minimise(matrix, linear), by_scipy(matrix, linear), rtol=1e-3, atol=1e-4
    )


def test_nothing_negative_gives_zeros_and_one_unknown_is_a_division():
    matrix, linear = program("plain", 0)
    np.testing.assert_array_equal(minimise(matrix, np.abs(linear)), np.zeros(K))
    one = minimise(np.full((1, 1), 4, np.float32), np.full(1, -2, np.float32))
    np.testing.assert_allclose(one, [0.5], rtol=1e-5)


@pytest.mark.parametrize("kind", ["equal", "dependent", "parallel 1e-4"])
def test_a_matrix_that_rounding_made_indefinite_gives_no_garbage(kind):
    for seed in range(8):
        matrix, linear = program(kind, seed)
        noise = np.random.default_rng(seed).normal(size=matrix.shape) * 1e-6
        noisy = np.float32(matrix + np.triu(noise, 1) + np.triu(noise, 1).T)
        rows, g = rows_of(kind, seed)
        x = np.float64(minimise(noisy, linear))
        lowest = by_scipy(matrix, linear)
        assert (rows @ (g + rows.T @ x) >= -2e-5).all()
        assert np.linalg.norm(rows.T @ (x - lowest)) < 1e-3


def test_in_64_bits_the_ridge_is_smaller_by_as_much(x64):
    rows, g = rows_of("plain", 3)
    x = minimise(rows @ rows.T, rows @ g)
    exact, _ = scipy.optimize.nnls(rows.T, -g)
    np.testing.assert_allclose(x, exact, rtol=1e-10, atol=1e-12)


def test_the_ridge_follows_the_size_of_the_matrix():
    (rows, _), (matrix, linear) = rows_of("equal", 1), program("equal", 1)
    x = minimise(matrix, linear)
    for factor in (1e-12, 1e12):
        scaled = minimise(np.float32(factor * matrix), np.float32(factor * linear))
        # Equal rows may share differently.
        np.testing.assert_allclose(rows.T @ (scaled - x), np.zeros(SIZE), atol=1e-6)


def test_vmap_equals_a_loop():
    kinds = ["plain", "all opposed", "parallel 1e-2", "equal"]
    programs = [program(kind, 5) for kind in kinds]
    matrices, linears = (np.stack(x) for x in zip(*programs, strict=True))
    together = jax.jit(jax.vmap(nonnegative.minimise))(matrices, linears)
    for x, (matrix, linear) in zip(together, programs, strict=True):
        np.testing.assert_allclose(x, minimise(matrix, linear), atol=1e-5)
    assert jnp.all(jnp.isfinite(together))
