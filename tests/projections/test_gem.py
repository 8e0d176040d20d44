"""GEM: the projection, memories that take no part, and the margin."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from hypothesis import given
from hypothesis import strategies as st

from optax_cl._core import nonnegative
from optax_cl.projections import agem, gem
from tests.projections.memories import (
    ALL,
    KINDS,
    SEEDS,
    K,
    bits,
    by_active_sets,
    by_nnls,
    flat,
    problem,
    route,
    routed,
    tree_of,
    unit,
)

# The projection


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_closest_point_that_opposes_no_task(kind):
    for seed in range(12):
        g, rows = problem(seed, kind)
        out, expected = routed(g, rows), by_nnls(g, rows)
        tolerance = 1e-5 * np.linalg.norm(g)
        assert (unit(rows) @ out >= -tolerance).all()
        assert np.linalg.norm(out - g) <= np.linalg.norm(expected - g) + tolerance
        np.testing.assert_allclose(out, expected, atol=20 * tolerance)


def test_the_primal_problem_has_the_same_solution():
    for seed in range(4):
        g, rows = problem(seed, "all opposed")
        solved = scipy.optimize.minimize(
            lambda v, g=g: ((v - g) ** 2).sum() / 2,
            g,
            jac=lambda v, g=g: v - g,
            constraints={
                "type": "ineq",
                "fun": lambda v, rows=rows: rows @ v,
                "jac": lambda v, rows=rows: rows,
            },
            options={"ftol": 1e-12},
        )
        np.testing.assert_allclose(routed(g, rows), solved.x, atol=1e-4)


@given(SEEDS)
def test_it_opposes_neither_the_tasks_nor_the_gradient_and_is_not_longer(seed):
    g, rows = problem(seed)
    out = routed(g, rows)
    length = np.linalg.norm(g)
    assert (unit(rows) @ out >= -1e-5 * length).all()
    assert out @ g >= -1e-5 * length**2
    assert np.linalg.norm(out) <= (1 + 1e-6) * length


@given(SEEDS)
def test_it_is_idempotent(seed):
    g, rows = problem(seed, "all opposed")
    once = routed(g, rows)
    np.testing.assert_allclose(routed(once, rows), once, atol=1e-5 * np.linalg.norm(g))


@given(SEEDS, st.sampled_from([1e-20, 1e-3, 0.3, 1e6, 1e15]))
def test_scaling_the_gradient_scales_the_result(seed, factor):
    g, rows = problem(seed)
    np.testing.assert_allclose(
        routed(factor * g, rows) / factor,
        routed(g, rows),
        atol=2e-6 * np.linalg.norm(g),
    )


@given(SEEDS)
def test_lengths_of_memory_gradients_do_not_matter(seed):
    g, rows = problem(seed)
    factors = 10.0 ** np.random.default_rng(seed).uniform(-8, 8, size=(K, 1))
    np.testing.assert_allclose(
        routed(g, factors * rows), routed(g, rows), atol=5e-6 * np.linalg.norm(g)
    )


@given(SEEDS)
def test_neither_order_nor_duplicates_of_memories_matter(seed):
    g, rows = problem(seed, "all opposed")
    expected = routed(g, rows, np.arange(K) < 3)
    tolerance = 1e-5 * np.linalg.norm(g)
    shuffled = routed(g, rows[[2, 4, 1, 3, 0]], np.isin([2, 4, 1, 3, 0], [0, 1, 2]))
    np.testing.assert_allclose(shuffled, expected, atol=tolerance)
    doubled = routed(g, rows[[0, 1, 2, 2, 0]])
    np.testing.assert_allclose(doubled, expected, atol=tolerance)


@given(SEEDS)
def test_one_memory_is_agem(seed):
    g, rows = problem(seed)
    tx, ref = agem(), tree_of(rows[3])
    expected, _ = tx.update(tree_of(g), tx.init(tree_of(g)), reference_updates=ref)
    out = routed(g, rows, np.arange(K) == 3)
    np.testing.assert_allclose(out, flat(expected), atol=1e-5 * np.linalg.norm(g))


def test_a_task_that_the_mean_hides_is_protected():
    # The mean of both memories agrees with the gradient, so A-GEM lets it pass.
    g, rows = jnp.array([1.0, 1.0]), jnp.array([[-1.0, 0.0], [3.0, 1.0]])
    tx = agem()
    passed, _ = tx.update(g, tx.init(g), reference_updates=rows.mean(0))
    np.testing.assert_array_equal(passed, g)
    tx = gem()
    out, _ = tx.update(
        g, tx.init(g), memory_updates=rows, memory_mask=jnp.ones(2, bool)
    )
    np.testing.assert_allclose(out, [0.0, 1.0], atol=1e-5)


def test_repairing_one_task_after_the_other_is_not_enough():
    # Off the second memory it opposes the first again: both must be active at once.
    g, rows = np.array([-1.0, 0.2]), np.array([[1.0, 0.0], [-0.8, 0.6]])
    step = g
    for r in rows:
        step = step - min(step @ r, 0) / (r @ r) * r
    tx, (gradient, memories) = gem(), map(jnp.float32, (g, rows))
    out, _ = tx.update(
        gradient, tx.init(gradient), memory_updates=memories, memory_mask=ALL[:2]
    )
    np.testing.assert_allclose(out, [0.0, 0.2], atol=1e-5)
    rows[1] = [-0.8, -0.6]
    step = g
    for r in rows:
        step = step - min(step @ r, 0) / (r @ r) * r
    assert (rows @ step).min() < -0.05
    out, _ = tx.update(
        gradient,
        tx.init(gradient),
        memory_updates=jnp.float32(rows),
        memory_mask=ALL[:2],
    )
    np.testing.assert_allclose(out, [0.0, 0.0], atol=1e-5)


@given(SEEDS)
def test_without_conflict_the_gradient_passes_bit_for_bit(seed):
    g, rows = problem(seed)
    rows *= np.where(rows @ g < 0, -1, 1)[:, None]
    for margin in (0.0, 0.5):
        out = route(tree_of(g), tree_of(rows), ALL, margin)
        assert bits(out) == bits(tree_of(g))


def test_an_orthogonal_memory_is_no_conflict_and_minus_zero_survives():
    g = tree_of(np.r_[-0.0, 1.5, np.zeros(14)])
    rows = np.zeros((K, 16))
    rows[:, 0] = -3.0
    for sign in ("gradient", "descent"):
        assert bits(route(g, tree_of(rows), ALL, 0.5, sign=sign)) == bits(g)


def test_cancelling_memories_leave_a_finite_result_that_is_not_longer():
    # Cosines of -1 + 1e-6: the duals are a hundred times the gradient.
    for seed in range(12):
        g, rows = problem(seed, "nearly parallel")
        rows *= np.array([1, -1, 1, -1, 1])[:, None]
        out = routed(g, rows)
        assert np.linalg.norm(out) <= (1 + 1e-4) * np.linalg.norm(g)
        assert (unit(rows) @ out >= -5e-4 * np.linalg.norm(g)).all()


def test_rounding_does_not_send_the_program_in_circles(monkeypatch, request):
    # Where rows depend on each other a gradient is zero but for rounding; whoever takes
    # its sign for a fact goes on to the limit, of 18 systems.
    systems, solve = [], nonnegative._solve_on

    def counted(*args):
        jax.debug.callback(lambda: systems.append(None))
        return solve(*args)

    monkeypatch.setattr(nonnegative, "_solve_on", counted)
    nonnegative.minimise.clear_cache()
    request.addfinalizer(nonnegative.minimise.clear_cache)
    run = jax.jit(lambda g, rows: route.__wrapped__(g, rows))  # traced anew
    for seed in (5, 12, 26):
        systems.clear()
        run(*map(tree_of, problem(seed, "dependent")))
        jax.effects_barrier()
        assert 0 < len(systems) <= K


# Memories that take no part


@pytest.mark.parametrize("margin", [0.0, 0.5])
@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf, -np.inf, 1e30, 1e-30])
def test_a_memory_without_a_direction_is_left_out(bad, margin):
    for seed in range(3):
        g, rows = problem(seed, "all opposed")
        expected = routed(g, rows, np.array([1, 0, 1, 0, 1], bool), margin=margin)
        rows[1] *= bad if np.isfinite(bad) else 1
        rows[1, 7] = bad if np.isnan(bad) or abs(bad) > 1 else rows[1, 7]
        rows[3] = bad
        out = routed(g, rows, margin=margin)
        np.testing.assert_array_equal(out, expected)
        assert np.isfinite(out).all()


def test_where_squares_of_a_memory_underflow_it_is_left_out():
    # Of sixteen squares one is a normal number: taken for the whole of its length, it
    # would make the correction eleven times too long.
    rows = np.full((K, 16), -1.05e-19)
    rows[:, 0] = -1.15e-19
    for margin in (0.0, 0.5):
        out = routed(np.ones(16), rows, margin=margin)
        np.testing.assert_array_equal(out, 1.0)


def test_a_memory_whose_inner_product_overflows_is_left_out_and_others_are_not():
    g, rows = problem(3, "all opposed")
    expected = routed(1e25 * g, rows, np.arange(K) != 2)
    rows[2] *= 1e17
    assert (rows[2] @ (1e25 * g)) < -1e39
    np.testing.assert_array_equal(routed(1e25 * g, rows), expected)


def test_a_correction_that_float32_cannot_hold_is_not_made():
    g, rows = problem(3, "all opposed")
    g, rows = tree_of(1e25 * g), tree_of(1e-15 * rows)
    assert bits(route(g, rows)) == bits(g)


def test_a_masked_memory_may_hold_anything():
    g, rows = problem(0, "all opposed")
    mask = np.array([True, False, True, True, False])
    expected = routed(g, rows, mask)
    rows[~mask] = [[1e9], [np.nan]]
    np.testing.assert_array_equal(routed(g, rows, mask), expected)
    # Or else the mask would not be needed.
    rows[~mask] = -g
    assert np.abs(routed(g, rows) - expected).max() > 0.1


@pytest.mark.parametrize("fault", ["mask", "zero", "nan", "gradient"])
def test_where_nothing_can_be_protected_the_gradient_passes_bit_for_bit(fault):
    g, rows = problem(1, "all opposed")
    mask = ALL & (fault != "mask")
    rows = {"zero": 0 * rows, "nan": np.nan * rows}.get(fault, rows)
    if fault == "gradient":
        g[3], g[5] = np.nan, np.inf
    for margin in (0.0, 0.5):
        out = route(tree_of(g), tree_of(rows), mask, margin)
        assert bits(out) == bits(tree_of(g))


def test_an_absolute_ridge_would_give_short_gradients_up():
    # The reference adds 1e-3 to the diagonal. In a trained network squared lengths of
    # gradients are far below.
    g, rows = problem(2, "all opposed")
    rows *= 1e-3
    gram, lengths = rows @ rows.T, np.linalg.norm(rows, axis=1)
    factor = np.linalg.cholesky(gram + 1e-3 * np.eye(K))
    wrong_v, _ = scipy.optimize.nnls(factor.T, -np.linalg.solve(factor, rows @ g))
    wrong = g + rows.T @ wrong_v
    assert (rows @ wrong / lengths).min() < -0.5
    assert (rows @ routed(g, rows) / lengths).min() > -1e-5 * np.linalg.norm(g)


def test_one_ridge_for_all_would_give_the_shorter_of_two_memories_up():
    g, rows = problem(3, "scales")
    gram = rows @ rows.T
    factor = np.linalg.cholesky(gram + 1e-6 * np.trace(gram) / K * np.eye(K))
    wrong_v, _ = scipy.optimize.nnls(factor.T, -np.linalg.solve(factor, rows @ g))
    wrong = g + rows.T @ wrong_v
    assert (unit(rows) @ wrong).min() < -0.1
    assert (unit(rows) @ routed(g, rows)).min() > -1e-5 * np.linalg.norm(g)


# The margin


@pytest.mark.parametrize("margin", [0.0, 0.1, 0.5, 3.0])
def test_the_margin_is_a_floor_on_the_duals(margin):
    for seed in range(6):
        for kind in ("plain", "all opposed"):
            g, rows = problem(seed, kind)
            expected = by_active_sets(g, rows, margin)
            np.testing.assert_allclose(
                routed(g, rows, margin=margin),
                expected,
                atol=2e-5 * np.linalg.norm(expected),
            )


def test_other_readings_of_the_margin_give_something_else():
    g, rows = problem(4, "all opposed")
    out = routed(g, rows, margin=0.5)
    v, _ = scipy.optimize.nnls(rows.T, -g)
    added = g + rows.T @ (v + 0.5)
    assert np.abs(out - added).max() > 0.1
    # As a margin of the inner products, <v, g_k> >= 0.5.
    gap, _ = scipy.optimize.nnls(
        np.linalg.cholesky(rows @ rows.T).T,
        -np.linalg.solve(np.linalg.cholesky(rows @ rows.T), rows @ g - 0.5),
    )
    assert np.abs(out - (g + rows.T @ gap)).max() > 0.1


def test_one_opposed_task_adds_the_margin_of_every_task():
    # Orthogonal memories: only the first is opposed, and hardly.
    rows = 2 * np.eye(K, 16)
    g = np.r_[-0.01, np.ones(15)]
    out = routed(g, rows, np.arange(K) < 4, margin=0.5)
    np.testing.assert_allclose(out, g + 0.5 * rows[:4].sum(0), atol=1e-6)
    # It is longer than the gradient, and half the gradient does not give half of it.
    assert np.linalg.norm(out) > 1.1 * np.linalg.norm(g)
    half = routed(g / 2, rows, np.arange(K) < 4, margin=0.5)
    assert np.abs(half - out / 2).max() > 0.1


def test_a_margin_far_above_the_conflict_loses_no_digits():
    g, rows = problem(5)
    rows[0] -= (rows[0] @ g + 1e-5) / (g @ g) * g
    rows = np.float64(np.float32(rows))
    expected = by_active_sets(g, rows, 100.0)
    np.testing.assert_allclose(
        routed(g, rows, margin=100.0), expected, atol=1e-5 * np.linalg.norm(expected)
    )


def test_the_slightest_conflict_adds_a_margin_of_any_size():
    rows = np.eye(K, 16)
    out = routed(-1e-30 * rows[0], rows, np.arange(K) < 1, margin=1e10)
    np.testing.assert_allclose(out, 1e10 * rows[0], rtol=1e-6)
