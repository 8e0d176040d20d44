"""GEM: the projection and its margin, its places in a chain, and the wrappers."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_cl
from optax_cl.projections import agem, gem
from tests.arrays import distance, normal

SEEDS = st.integers(0, 2**31 - 1)
K, SHAPES = 5, {"dense": {"kernel": (4, 3), "bias": (3,)}, "gain": ()}
ALL = np.ones(K, bool)


def is_shape(node):
    return isinstance(node, tuple)


def tree_of(vector):
    """Vectors, ``[..., 16]``, as a tree of float32 leaves."""
    leaves, structure = jax.tree.flatten(SHAPES, is_leaf=is_shape)
    ends = np.cumsum([int(np.prod(shape)) for shape in leaves])
    parts = np.split(np.float32(vector), ends[:-1], axis=-1)
    lead = np.shape(vector)[:-1]
    return jax.tree.unflatten(
        structure,
        [
            jnp.asarray(p.reshape(lead + shape))
            for p, shape in zip(parts, leaves, strict=True)
        ],
    )


def flat(tree, lead=0):
    return np.concatenate(
        [np.float64(x).reshape(*np.shape(x)[:lead], -1) for x in jax.tree.leaves(tree)],
        axis=-1,
    )


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


@functools.partial(jax.jit, static_argnames="sign")
def route(g, memories, mask=ALL, margin=0.0, sign="gradient"):
    tx = gem(margin=jnp.asarray(margin), sign=sign)
    return tx.update(g, tx.init(g), memory_updates=memories, memory_mask=mask)[0]


def problem(seed, kind="plain"):
    """A gradient and memories as float32 numbers, in float64 arrays."""
    rng = np.random.default_rng(seed)
    g, common = rng.normal(size=(2, 16))
    rows = rng.normal(size=(K, 16))
    if kind == "all opposed":
        rows -= 0.7 * g
    elif kind == "equal":
        rows = (rows - 0.3 * g)[[0, 1, 1, 0, 2]]
    elif kind == "dependent":
        # In whole numbers, so that they still are in float32.
        rows = rng.integers(-3, 4, (K, 2)) @ rng.integers(-4, 5, (2, 16)) * 1.0
    elif kind == "nearly parallel":
        rows = common - 0.5 * g + 1e-3 * rows
    elif kind == "zero rows":
        rows = (rows - 0.3 * g) * np.array([1, 0, 1, 0, 1])[:, None]
    elif kind == "scales":
        rows = (rows - 0.3 * g) * np.array([1e-8, 1e4, 1, 1e-8, 1e4])[:, None]
    return np.float64(np.float32(g)), np.float64(np.float32(rows))


KINDS = [
    "plain",
    "all opposed",
    "equal",
    "dependent",
    "nearly parallel",
    "zero rows",
    "scales",
]


def routed(g, rows, mask=ALL, **kwargs):
    return flat(route(tree_of(g), tree_of(rows), mask, **kwargs))


def unit(rows):
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows / np.where(lengths > 0, lengths, 1)


def by_nnls(g, rows):
    """The dual in float64, without a ridge."""
    directions = unit(rows)
    return g + directions.T @ scipy.optimize.nnls(directions.T, -g)[0]


def by_active_sets(g, rows, margin):
    """The same with a floor on the duals: every active set is tried."""
    gram, dots = rows @ rows.T, rows @ g
    if (dots >= 0).all():
        return g
    found = []
    for free in itertools.product([False, True], repeat=len(rows)):
        free = np.array(free)
        v = np.full(len(rows), float(margin))
        right = -(dots + gram @ (v * ~free))[free]
        v[free] = np.linalg.solve(gram[np.ix_(free, free)], right)
        slopes = gram @ v + dots
        if (v >= margin - 1e-9).all() and (slopes >= -1e-9)[~free].all():
            found.append(v)
    (v,) = found
    return g + rows.T @ v


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
    assert bits(route(g, tree_of(rows), ALL, 0.5)) == bits(g)


def test_cancelling_memories_leave_a_finite_result_that_is_not_longer():
    # Cosines of -1 + 1e-6: the duals are a hundred times the gradient.
    for seed in range(12):
        g, rows = problem(seed, "nearly parallel")
        rows *= np.array([1, -1, 1, -1, 1])[:, None]
        out = routed(g, rows)
        assert np.linalg.norm(out) <= (1 + 1e-4) * np.linalg.norm(g)
        assert (unit(rows) @ out >= -5e-4 * np.linalg.norm(g)).all()


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


# Places in a chain


def stream(seed, steps=60, size=12):
    """Gradients and three memories each that conflict, in coordinates of all sizes."""
    scale = jnp.logspace(-2, 0, size)
    grads = (normal(seed, steps, size) + 0.3) * scale[None]
    return grads, (normal(seed + 1, steps, 3, size) - 0.3) * scale[None, None]


def run(tx, grads, memories, params=None):
    """All updates of a chain over a stream, in one scan."""
    params = jnp.ones_like(grads[0]) if params is None else params

    def step(state, data):
        g, rows = data
        updates, state = tx.update(
            g, state, params, memory_updates=rows, memory_mask=jnp.arange(3) < 2
        )
        return state, updates

    return jax.jit(lambda *data: jax.lax.scan(step, tx.init(params), data)[1])(
        grads, memories
    )


def worst_cosines(updates, memories):
    rows = unit(np.float64(memories[:, :2]))
    updates = np.float64(updates)
    dots = np.einsum("tki,ti->tk", rows, updates).min(1)
    return dots / np.maximum(np.linalg.norm(updates, axis=1), 1e-9)


def test_pre_keeps_the_gradient_from_opposing_but_not_the_step_of_adam():
    grads, memories = stream(7, steps=300, size=20)
    adam = optax.scale_by_adam()
    opposed = [
        np.mean(
            worst_cosines(run(optax.chain(*links), grads, memories), memories) < -1e-4
        )
        for links in ([adam], [gem()], [gem(), adam], [adam, gem()])
    ]
    assert opposed[0] > 0.8 and opposed[2] > 0.6
    assert opposed[1] == opposed[3] == 0


def test_post_holds_at_every_step_despite_momentum_and_weight_decay():
    grads, memories = stream(8, steps=200)
    links = [optax.scale_by_adam(), optax.add_decayed_weights(0.3)]
    post = optax.chain(*links, gem(), optax.scale_by_learning_rate(0.1))
    updates = run(post, grads, memories, -jnp.logspace(0, 1, 12))
    assert worst_cosines(-updates, memories).min() > -1e-4


def test_post_before_and_after_the_learning_rate_are_the_same_with_their_signs():
    grads, memories = stream(9)
    adam, rate = optax.scale_by_adam(), optax.scale_by_learning_rate(0.01)
    before = run(optax.chain(adam, gem(), rate), grads, memories)
    after = run(optax.chain(adam, rate, gem(sign="descent")), grads, memories)
    np.testing.assert_allclose(before, after, atol=1e-6)
    for links in ((adam, gem(sign="descent"), rate), (adam, rate, gem())):
        harm = worst_cosines(-run(optax.chain(*links), grads, memories), memories)
        assert harm.min() < -0.1  # the wrong sign lets harmful steps pass


def test_averaging_over_devices_must_come_before_the_projection():
    grads = np.array([[1.0, 0.0], [-3.0, 0.0]], np.float32)
    rows = jnp.array([[-1.0, 1.0]])
    tx = gem()

    def one(g):
        return tx.update(g, tx.init(g), memory_updates=rows, memory_mask=ALL[:1])[0]

    before = one(grads.mean(0))
    np.testing.assert_array_equal(before, [-1.0, 0.0])
    assert jnp.abs(before - jax.vmap(one)(grads).mean(0)).max() > 0.2


# Wrappers and transformations of JAX


def small(hidden=9.0):
    g = {"in": jnp.array([-1.0, 2.0]), "out": jnp.array([hidden])}
    rows = {"in": jnp.array([[1.0, 0.0], [0.0, 1.0]]), "out": jnp.ones((2, 1))}
    return g, {"memory_updates": rows, "memory_mask": jnp.ones(2, bool)}


def test_masked_leaves_take_no_part_in_the_inner_products():
    g, extra = small()
    for compatible in (False, True):
        tx = optax.masked(
            gem(), {"in": True, "out": False}, mask_compatible_extra_args=compatible
        )
        if compatible:
            extra = {**extra, "memory_mask": np.ones(2, bool)}
        updates, _ = jax.jit(tx.update)(g, tx.init(g), **extra)
        np.testing.assert_allclose(updates["in"], [0.0, 2.0], atol=1e-5)
        np.testing.assert_array_equal(updates["out"], g["out"])


def test_partition_projects_each_part_by_itself():
    g, extra = small(hidden=-9.0)
    tx = optax.partition({"a": gem(), "b": gem(margin=2.0)}, {"in": "a", "out": "b"})
    updates, _ = tx.update(g, tx.init(g), **extra)
    np.testing.assert_allclose(updates["in"], [0.0, 2.0], atol=1e-5)
    # Two equal memories with floors of 2 and a dual sum of 9.
    np.testing.assert_allclose(updates["out"], [0.0], atol=1e-4)


def test_multisteps_uses_the_memories_of_the_last_micro_step():
    grads = jnp.array([[1.0, 0.0], [3.0, 0.0]])
    rows = jnp.array([[[0.0, -1.0]], [[-1.0, 1.0]]])
    tx = optax.MultiSteps(gem(), 2)
    state = tx.init(grads[0])
    for g, memories in zip(grads, rows, strict=True):
        updates, state = jax.jit(tx.update)(
            g, state, memory_updates=memories, memory_mask=jnp.ones(1, bool)
        )
    np.testing.assert_allclose(updates, [1.0, 1.0], atol=1e-5)


def test_inject_hyperparams_passes_the_margin_as_an_array():
    grads, memories = stream(11)
    expected = run(gem(margin=0.5), grads, memories)
    injected = optax.inject_hyperparams(gem)(margin=0.5)
    np.testing.assert_allclose(run(injected, grads, memories), expected, atol=1e-6)


def test_vmap_over_margins_and_seeds_equals_a_loop():
    problems = [problem(seed, "all opposed") for seed in range(3)]
    g, rows = (np.stack(x) for x in zip(*problems, strict=True))
    rows[0, 3:] = np.nan  # masked there, and read for the others
    margins = np.array([0.0, 0.2, 0.9], np.float32)
    masks = np.arange(K) < np.array([[3], [1], [5]])
    together = jax.jit(jax.vmap(route))(tree_of(g), tree_of(rows), masks, margins)
    for i, margin in enumerate(margins):
        alone = routed(g[i], rows[i], masks[i], margin=margin)
        np.testing.assert_allclose(flat(together, 1)[i], alone, atol=1e-5)


def test_one_compilation_with_donation_while_the_memory_fills():
    traces = []
    tx = optax.chain(gem(margin=0.1), optax.scale_by_adam())

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(g, state, rows, count):
        traces.append(None)
        mask = jnp.arange(K) < count
        return tx.update(g, state, memory_updates=rows, memory_mask=mask)

    g, rows = problem(0, "all opposed")
    state = tx.init(tree_of(g))
    for count in range(K + 1):
        updates, state = step(tree_of(g), state, tree_of(rows), count)
    assert len(traces) == 1
    assert np.isfinite(flat(updates)).all()


def test_holes_and_empty_trees_pass_and_bad_gradients_are_skipped():
    g, extra = small()
    g["hole"] = None
    extra["memory_updates"]["hole"] = None
    tx = optax.apply_if_finite(gem(), 3)
    updates, state = tx.update(g, tx.init(g), **extra)
    assert updates["hole"] is None and np.isfinite(updates["in"]).all()
    bad = {**g, "in": jnp.array([np.nan, 1.0])}
    _, state = tx.update(bad, state, **extra)
    assert int(state.notfinite_count) == 1
    tx, mask = gem(), extra["memory_mask"]
    assert tx.update({}, tx.init({}), memory_updates={}, memory_mask=mask)[0] == {}
    assert jax.tree.leaves(tx.init(g)) == []


def test_bfloat16_gradients_are_projected_to_their_rounding():
    g, rows = problem(6, "all opposed")
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (tree_of(g), tree_of(rows)))
    out = route(*low)
    assert {x.dtype for x in jax.tree.leaves(out)} == {jnp.dtype(jnp.bfloat16)}
    expected = by_nnls(flat(low[0]), flat(low[1], 1))
    bound = 2.0**-8 * np.abs(expected) + 1e-5 * np.linalg.norm(g)
    assert (np.abs(flat(out) - expected) <= bound).all()


def test_in_64_bits_the_oracle_is_met_closely(x64):
    g, rows = (jnp.asarray(x) for x in problem(7, "all opposed"))
    out, _ = gem().update(
        g, optax.EmptyState(), memory_updates=rows, memory_mask=jnp.asarray(ALL)
    )
    expected = by_nnls(np.asarray(g), np.asarray(rows))
    np.testing.assert_allclose(out, expected, atol=1e-12)


def test_sharded_leaves_give_what_one_device_gives():
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    g = {"w": normal(0, 16, 3), "b": normal(1, 3)}
    rows = {"w": normal(2, K, 16, 3) - 0.4 * g["w"][None], "b": normal(3, K, 3)}
    expected = route(g, rows)
    assert distance(expected, g) > 0.1

    def place(tree, *specs):
        shardings = dict(
            zip(("w", "b"), (NamedSharding(mesh, s) for s in specs), strict=True)
        )
        return jax.device_put(tree, shardings)

    out = route(place(g, P("model"), P()), place(rows, P(None, "model"), P()))
    assert out["w"].sharding.spec == P("model")
    assert distance(out, expected) < 1e-5

    # Inside `shard_map` every device has all of it, and a loop's carry must vary alike.
    def on_each(g, rows):
        mean = functools.partial(jax.lax.pmean, axis_name="model")
        return jax.tree.map(mean, route(g, rows))

    mapped = jax.shard_map(on_each, mesh=mesh, in_specs=(P(), P()), out_specs=P())
    assert distance(jax.jit(mapped)(g, rows), expected) < 1e-5
    split = jax.shard_map(
        lambda g, rows: route(g[0], rows[0])[None],
        mesh=mesh,
        in_specs=P("model"),
        out_specs=P("model"),
    )
    grads, memories = normal(4, 8, 6), normal(5, 8, K, 6)
    apart = jax.jit(split)(grads, memories)
    for i in range(8):
        assert distance(apart[i], route(grads[i], memories[i])) < 1e-5


def test_compiled_size_grows_linearly_with_the_number_of_leaves():
    def lines(n):
        g = {str(i): jnp.ones([80, 80]) for i in range(n)}
        rows = jax.tree.map(lambda x: jnp.stack([x, -x]), g)
        compiled = route.lower(g, rows, ALL[:2]).compile()
        return len(compiled.as_text().splitlines())

    assert lines(40) < 2.5 * lines(20)


# Bad input


def test_missing_arguments_name_the_fix():
    g, extra = small()
    tx = optax.chain(gem(), optax.scale_by_adam())
    for name in extra:
        short = {k: v for k, v in extra.items() if k != name}
        with pytest.raises(ValueError, match=r"memory_mask=\.\.\..*all False"):
            tx.update(g, tx.init(g), **short)


def test_memories_of_other_shapes_name_the_leaf():
    g, extra = small()
    tx = gem()
    rows = extra["memory_updates"]
    with pytest.raises(
        ValueError, match=r"axis of 3.*`in` got \(2, 2\), expected \(3,"
    ):
        tx.update(g, tx.init(g), memory_updates=rows, memory_mask=jnp.ones(3, bool))
    with pytest.raises(ValueError, match=r"`out` got \(1,\), expected \(2, 1\)"):
        extra["memory_updates"] = {**rows, "out": jnp.ones(1)}
        tx.update(g, tx.init(g), **extra)
    with pytest.raises(ValueError, match="`memory_updates` must have the tree"):
        extra["memory_updates"] = {"in": rows["in"]}
        tx.update(g, tx.init(g), **extra)


def test_a_mask_of_other_kind_is_refused():
    g, extra = small()
    tx = gem()
    for mask, error, match in [
        (jnp.array([1, 0]), TypeError, "must be boolean; got int32.*arange"),
        (jnp.ones((), bool), ValueError, r"shape \[K\].*got \(\)"),
        (jnp.ones((0,), bool), ValueError, r"shape \[K\].*got \(0,\)"),
    ]:
        with pytest.raises(error, match=match):
            tx.update(g, tx.init(g), **{**extra, "memory_mask": mask})


def test_leaves_that_are_no_real_numbers_are_refused():
    tx, mask = gem(), jnp.ones(1, bool)
    g = {"w": jnp.ones(2, jnp.int32)}
    with pytest.raises(TypeError, match="at `w` got int32"):
        tx.update(g, tx.init(g), memory_updates={"w": g["w"][None]}, memory_mask=mask)


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"`margin` must be .* \[0, inf"):
        gem(margin=-0.1)
    with pytest.raises(TypeError, match="`margin` must be a number"):
        gem(margin="0.5")
    with pytest.raises(ValueError, match="`sign` must be one of 'gradient', 'descent'"):
        gem(sign="minus")


def test_the_same_in_decoupled_adamw():
    grads, memories = stream(12)
    tx = optax_cl.decoupled_adamw(0.1, post=[gem()])
    assert worst_cosines(-run(tx, grads, memories), memories).min() > -1e-4
