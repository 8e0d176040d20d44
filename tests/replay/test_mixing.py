"""Replay mixing: the blend, the empty memory, schedules, wrappers, bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import optax_cl
from optax_cl.replay import (
    mix_replay,
    reservoir_add,
    reservoir_init,
    reservoir_sample,
)


def trees(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return [
        {"w": jnp.asarray(rng.normal(size=(3, 2)), dtype), "b": jnp.asarray(1.0, dtype)}
        for _ in range(2)
    ]


def mix(rho, g, replay, **extra):
    tx = mix_replay(rho)
    return tx.update(g, tx.init(g), replay_updates=replay, **extra)[0]


def assert_same_bits(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@given(st.integers(0, 2**31 - 1), st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_it_is_the_blend_in_float64(seed, rho, weight):
    g, replay = trees(seed)
    mixed = jax.jit(mix)(jnp.float32(rho), g, replay, replay_weight=jnp.float32(weight))
    share = rho * weight
    for m, a, b in zip(*map(jax.tree.leaves, (mixed, g, replay)), strict=True):
        expected = (1 - share) * np.float64(a) + share * np.float64(b)
        np.testing.assert_allclose(m, expected, atol=1e-6)


@pytest.mark.parametrize("weight", [0, 0.0, False, np.bool_(False), jnp.bool_(False)])
def test_an_empty_memory_passes_the_gradient_bit_for_bit_even_beside_nan(weight):
    g = {"w": jnp.array([1.5, -0.0, 3.0])}
    nothing = {"w": jnp.full([3], jnp.nan)}
    assert_same_bits(mix(0.5, g, nothing, replay_weight=weight), g)
    mixed = jax.jit(functools.partial(mix, 0.5))(g, nothing, replay_weight=weight)
    assert_same_bits(mixed, g)


def test_the_ends_of_the_range_are_the_two_gradients():
    g, replay = trees(0)
    assert_same_bits(mix(0.0, g, replay), g)
    assert_same_bits(mix(1.0, g, replay), replay)
    assert_same_bits(mix(1.0, g, replay, replay_weight=True), replay)


def test_bfloat16_is_mixed_in_float32_and_keeps_its_dtype():
    g, replay = trees(1, jnp.bfloat16)
    mixed = mix(0.3, g, jax.tree.map(lambda x: x.astype(jnp.float32), replay))
    for m, a, b in zip(*map(jax.tree.leaves, (mixed, g, replay)), strict=True):
        assert m.dtype == jnp.bfloat16
        expected = 0.7 * np.float64(a) + 0.3 * np.float64(b)
        np.testing.assert_allclose(np.float64(m), expected, rtol=2**-8, atol=1e-6)


def test_a_schedule_counts_steps_and_a_number_keeps_no_state():
    g, replay = jnp.zeros([1]), jnp.ones([1])
    tx = mix_replay(optax.linear_schedule(0.0, 1.0, 4))
    state = tx.init(g)
    assert state.count.dtype == jnp.int32
    seen = []
    for _ in range(5):
        updates, state = jax.jit(tx.update)(g, state, replay_updates=replay)
        seen.append(float(updates[0]))
    np.testing.assert_allclose(seen, [0.0, 0.25, 0.5, 0.75, 1.0])
    assert jax.tree.leaves(mix_replay(0.5).init(g)) == []


def test_inside_the_chain_the_raw_gradient_is_that_of_the_current_batch():
    g, replay = jnp.array([1.0, -2.0]), jnp.array([3.0, 0.5])
    seen = {}

    def spy(updates, state, params=None, *, raw_updates, **extra_args):
        seen.update(raw=raw_updates, routed=updates)
        return updates, state

    spying = optax.GradientTransformationExtraArgs(optax.identity().init, spy)
    tx = optax_cl.chain(mix_replay(0.5), spying)
    tx.update(g, tx.init(g), replay_updates=replay)
    np.testing.assert_array_equal(seen["raw"], g)
    np.testing.assert_allclose(seen["routed"], (g + replay) / 2)


def test_masked_and_partition_mix_what_they_see():
    g = {"a": jnp.zeros([2]), "b": jnp.zeros([2])}
    replay = {"a": jnp.ones([2]), "b": jnp.ones([2])}
    masked = optax.masked(mix_replay(0.5), {"a": True, "b": False})
    updates, _ = jax.jit(masked.update)(g, masked.init(g), replay_updates=replay)
    np.testing.assert_array_equal(updates["a"], [0.5, 0.5])
    np.testing.assert_array_equal(updates["b"], [0.0, 0.0])
    parts = optax.partition(
        {"x": mix_replay(0.25), "y": mix_replay(0.5)}, {"a": "x", "b": "y"}
    )
    updates, _ = parts.update(g, parts.init(g), replay_updates=replay)
    np.testing.assert_array_equal(updates["a"], [0.25, 0.25])
    np.testing.assert_array_equal(updates["b"], [0.5, 0.5])


def test_multisteps_uses_the_replay_gradient_of_the_last_micro_step():
    tx = optax.MultiSteps(mix_replay(0.5), 2)
    state = tx.init(jnp.zeros([1]))
    for g, replay in ((1.0, 100.0), (3.0, 4.0)):
        updates, state = tx.update(
            jnp.array([g]), state, replay_updates=jnp.array([replay])
        )
    np.testing.assert_allclose(updates, [0.5 * 2.0 + 0.5 * 4.0])


def test_inject_hyperparams_passes_numbers_and_schedules():
    g, replay = jnp.zeros([1]), jnp.ones([1])
    for rho, expected in ((0.25, [0.25, 0.25]), (lambda n: 0.5 * n, [0.0, 0.5])):
        tx = optax.inject_hyperparams(mix_replay)(rho)
        state = tx.init(g)
        for value in expected:
            updates, state = jax.jit(tx.update)(g, state, replay_updates=replay)
            np.testing.assert_allclose(updates, [value])


def test_vmap_over_rho():
    g, replay = jnp.zeros([1]), jnp.ones([1])
    rhos = jnp.array([0.0, 0.5, 1.0])
    mixed = jax.vmap(lambda rho: mix(rho, g, replay))(rhos)
    np.testing.assert_allclose(mixed[:, 0], rhos)


def test_none_leaves_and_empty_trees_pass():
    g = {"a": jnp.zeros([1]), "hole": None}
    updates = mix(0.5, g, {"a": jnp.ones([1]), "hole": None})
    assert updates["hole"] is None
    assert mix(0.5, {}, {}) == {}


def test_a_loop_with_a_buffer_compiles_once_from_the_first_step_on():
    # Learns y = 2 x, then y = -2 x; the replayed half pulls towards zero.
    traces = []
    tx = optax_cl.chain(mix_replay(0.5), optax.scale_by_learning_rate(0.1))

    def loss(w, x, y, weights):
        return jnp.sum(weights * (w * x - y) ** 2) / jnp.maximum(jnp.sum(weights), 1)

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(w, state, buffer, x, y, key):
        traces.append(None)
        draw_key, add_key = jax.random.split(key)
        (xr, yr), weights = reservoir_sample(buffer, draw_key, 8)
        g = jax.grad(loss)(w, x, y, jnp.ones_like(x))
        replay = jax.grad(loss)(w, xr, yr, weights)
        updates, state = tx.update(
            g, state, replay_updates=replay, replay_weight=weights[0]
        )
        return w + updates, state, reservoir_add(buffer, (x, y), add_key)

    w, state = jnp.zeros([]), tx.init(jnp.zeros([]))
    buffer = reservoir_init(32, (jnp.zeros([]), jnp.zeros([])))
    after = []
    for task, slope in enumerate((2.0, -2.0)):
        for i in range(40):
            key = jax.random.key(100 * task + i)
            x = jax.random.normal(key, [8])
            w, state, buffer = step(w, state, buffer, x, slope * x, key)
        after.append(float(w))
    assert len(traces) == 1
    assert after[0] == pytest.approx(2.0, abs=0.05)
    assert -1.7 < after[1] < 0.5  # fine-tuning alone ends at -2


def test_a_missing_replay_gradient_names_the_fix():
    g = jnp.ones([2])
    tx = mix_replay(0.5)
    with pytest.raises(ValueError, match=r"replay_updates=\.\.\..*`replay_weight=0`"):
        tx.update(g, tx.init(g))


def test_bad_input_is_named():
    g = {"w": jnp.ones([2])}
    for rho in (-0.1, 1.1, np.nan):
        with pytest.raises(ValueError, match=r"`rho` must be a finite number in"):
            mix_replay(rho)
    with pytest.raises(TypeError, match="`rho` must be a number or an Optax schedule"):
        mix_replay("half")
    with pytest.raises(ValueError, match=r"`replay_updates`.*at `w` got \(3,\)"):
        mix(0.5, g, {"w": jnp.ones([3])})
    with pytest.raises(ValueError, match="`replay_updates` must have the tree"):
        mix(0.5, g, {"v": jnp.ones([2])})
    with pytest.raises(ValueError, match="`replay_weight` must be a finite number"):
        mix(0.5, g, g, replay_weight=2)
    with pytest.raises(ValueError, match="`replay_weight` must be a scalar"):
        mix(0.5, g, g, replay_weight=jnp.ones([2]))
    with pytest.raises(TypeError, match="`updates` must hold real floating-point"):
        mix(0.5, {"w": jnp.ones([2], jnp.int32)}, g)


def test_behind_a_learning_rate_it_climbs_the_loss_on_the_memory():
    # Stated, not wanted: a transformation can't see which way updates point.
    memory, sgd = jnp.array([1.0, 2.0]), optax.sgd(0.1)
    zero = jnp.zeros(2)

    def step(*links):
        tx = optax.chain(*links)
        return tx.update(zero, tx.init(zero), zero, replay_updates=memory)[0]

    np.testing.assert_allclose(step(mix_replay(0.25), sgd), -0.025 * memory, rtol=1e-6)
    np.testing.assert_allclose(step(sgd, mix_replay(0.25)), 0.25 * memory, rtol=1e-6)
