"""PCGrad, against the published loop over orders in float64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import optax_cl
from optax_cl.projections import pcgrad
from tests.projections.memories import ALL, SEEDS, K, bits, flat, problem, tree_of

TX = pcgrad()


@functools.partial(jax.jit, static_argnames="reduce")
def route(g, memories, mask=ALL, count=0, reduce="sum"):
    tx = pcgrad(reduce=reduce)
    state = tx.init(g)._replace(count=jnp.int32(count))
    return tx.update(g, state, memory_updates=memories, memory_mask=mask)[0]


def routed(g, rows, mask=ALL, **kwargs):
    return flat(route(tree_of(g), tree_of(rows), np.asarray(mask), **kwargs))


def part(gradients, i, order):
    """What is left of gradient i, as the paper's algorithm has it."""
    left = gradients[i].copy()
    for j in order:
        dot = left @ gradients[j]
        if j != i and dot < 0:
            left -= dot / (gradients[j] @ gradients[j]) * gradients[j]
    return left


def outcomes(gradients):
    """The sum of what is left, for every choice of one order for each gradient."""
    count = len(gradients)
    parts = [
        [
            part(gradients, i, order)
            for order in itertools.permutations(j for j in range(count) if j != i)
        ]
        for i in range(count)
    ]
    return np.array([sum(choice) for choice in itertools.product(*parts)])


@given(SEEDS, st.sampled_from(["plain", "all opposed", "scales"]))
def test_of_two_gradients_each_loses_what_opposes_the_other(seed, kind):
    g, rows = problem(seed, kind)
    out = routed(g, rows, np.arange(K) == 1)
    pair = np.array([g, rows[1]])
    (expected,) = outcomes(pair)
    size = np.abs(pair).max()
    np.testing.assert_allclose(out, expected, atol=1e-5 * size)
    # And neither part opposes the other gradient.
    mine, past = part(pair, 0, [1]), part(pair, 1, [0])
    assert min(mine @ rows[1], past @ g) >= -1e-9 * size**2


@given(SEEDS)
def test_of_three_it_is_the_papers_loop_in_some_order(seed):
    g, rows = problem(seed, "all opposed")
    out = routed(g, rows, np.arange(K) < 2, count=seed % 1000)
    distances = np.abs(outcomes(np.array([g, *rows[:2]])) - out).max(1)
    assert distances.min() < 1e-5 * np.abs(rows).max()


def test_every_gradient_has_an_order_of_its_own_and_orders_change_with_the_step():
    # The authors' code shuffles, and does not use what it shuffled.
    g, rows = problem(1)
    three = np.array([g, *rows[:2]])
    three -= three.sum(0) / 2  # each opposes both others
    g, rows[:2] = three[0], three[1:]
    wanted = outcomes(three)
    gaps = np.abs(wanted[:, None] - wanted[None]).max(-1)[np.triu_indices(8, 1)]
    assert gaps.min() > 0.01  # eight different results
    found = {
        int(np.abs(wanted - routed(g, rows, np.arange(K) < 2, count=n)).max(1).argmin())
        for n in range(60)
    }
    assert found == set(range(8))


@given(SEEDS)
def test_without_conflicts_it_is_the_sum_and_the_mean_of_all(seed):
    rng = np.random.default_rng(seed)
    gradients = np.float32(rng.uniform(0, 1, size=(K + 1, 16)))
    g, rows = gradients[0], gradients[1:]
    total = gradients.sum(0)
    np.testing.assert_allclose(routed(g, rows), total, rtol=1e-6)
    np.testing.assert_allclose(routed(g, rows, reduce="mean"), total / 6, rtol=1e-6)
    some = np.arange(K) < 2
    np.testing.assert_allclose(
        routed(g, rows, some, reduce="mean"), gradients[:3].mean(0), rtol=1e-6
    )


def test_opposite_gradients_leave_nothing():
    g, rows = problem(0)
    rows[2] = -g
    np.testing.assert_array_equal(routed(g, rows, np.arange(K) == 2), np.zeros(16))


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf, 1e30, 1e-30])
def test_a_memory_without_a_direction_and_a_masked_one_take_no_part(bad):
    g, rows = problem(4, "all opposed")
    expected = routed(g, rows, np.arange(K) == 0)
    rows[1] = bad
    rows[2:] = np.nan
    np.testing.assert_array_equal(routed(g, rows, np.arange(K) < 2), expected)
    mean = routed(g, rows, np.arange(K) < 2, reduce="mean")
    np.testing.assert_allclose(mean, expected / 2, rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_a_gradient_that_is_not_finite_passes_bit_for_bit(bad):
    g, rows = problem(4, "all opposed")
    g[3] = bad
    for reduce in ("sum", "mean"):
        assert bits(route(tree_of(g), tree_of(rows), ALL, 0, reduce)) == bits(
            tree_of(g)
        )


def test_a_zero_gradient_leaves_the_memories_to_be_learnt():
    g, rows = problem(4)
    expected = outcomes(rows[:1])[0]
    out = routed(0 * g, rows, np.arange(K) == 0)
    np.testing.assert_allclose(out, expected, rtol=1e-6)


def test_what_conflicts_with_a_gradient_too_small_to_square_stays():
    g, rows = problem(4, "all opposed")
    g = -1e-30 * rows[0]
    np.testing.assert_array_equal(routed(g, rows, np.arange(K) == 0), rows[0])


def test_the_raw_gradient_stays_the_current_tasks():
    g, rows = problem(2, "all opposed")
    tx = optax_cl.chain(pcgrad(), optax_cl.scale_by_decoupled_adam(second_moment="raw"))

    @jax.jit
    def step(g, rows):
        return tx.update(g, tx.init(g), memory_updates=rows, memory_mask=ALL)[1]

    state = step(tree_of(g), tree_of(rows))
    np.testing.assert_allclose(flat(state[1].nu), 1e-3 * g**2, rtol=1e-5)


def test_half_precision_sums_in_float32():
    g, rows = problem(3, "all opposed")

    def half(tree):
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)

    g, rows = half(tree_of(g)), half(tree_of(rows))
    out = route(g, rows)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(out))
    wide = route(tree_of(flat(g)), tree_of(flat(rows, 1)))
    assert bits(half(wide)) == bits(out)


def test_steps_are_counted_and_repeat():
    g, rows = problem(1, "all opposed")
    g, rows = tree_of(g), tree_of(rows)

    @functools.partial(jax.jit, static_argnums=0)
    def step(tx, g, rows, state):
        return tx.update(g, state, memory_updates=rows, memory_mask=ALL)

    state, outs = TX.init(g), []
    for _ in range(3):
        out, state = step(TX, g, rows, state)
        outs.append(out)
    assert state.count == 3
    assert bits(outs[2]) == bits(route(g, rows, ALL, 2))
    other, _ = step(pcgrad(seed=1), g, rows, TX.init(g))
    assert bits(other) != bits(outs[0])


def test_a_seed_is_any_integer_and_may_be_a_hyperparameter():
    for seed in (-1, 2**63 - 1, np.int64(3), np.array(3), jnp.uint8(3)):
        pcgrad(seed=seed)
    tx = optax.inject_hyperparams(pcgrad)()
    g, rows = map(tree_of, problem(1, "all opposed"))

    @jax.jit
    def step(g, rows):
        return tx.update(g, tx.init(g), memory_updates=rows, memory_mask=ALL)[0]

    assert bits(step(g, rows)) == bits(route(g, rows))


def test_mistakes_are_named():
    g, rows = map(tree_of, problem(0))
    state = TX.init(g)
    with pytest.raises(ValueError, match="`pcgrad` needs `memory_updates`"):
        TX.update(g, state)
    with pytest.raises(ValueError, match=r"`memory_updates`.*leading axis of 4"):
        TX.update(g, state, memory_updates=rows, memory_mask=ALL[:4])
    with pytest.raises(ValueError, match="`reduce`"):
        pcgrad(reduce="max")
    for seed in (True, 0.5, None, jnp.float32(1), jnp.array(True), np.array([1, 2])):
        with pytest.raises(TypeError, match="`seed` must be an integer"):
            pcgrad(seed=seed)
    for seed in (2**63, -(2**70)):
        with pytest.raises(ValueError, match="`seed` must be from"):
            pcgrad(seed=seed)
