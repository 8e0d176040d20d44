"""Factored second moments: equal to Optax without a modifier, and routed with one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_cl
from tests.arrays import normal

SHAPES = {"big": (130, 140), "wide": (128, 3, 129), "small": (20, 30), "bias": (9,)}


@pytest.fixture(scope="module")
def grads():
    return {k: np.asarray(normal(i, 3, *s)) for i, (k, s) in enumerate(SHAPES.items())}


def at(tree, i):
    return jax.tree.map(lambda x: x[i], tree)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_equals_optax_without_a_modifier(grads, dtype):
    grads = jax.tree.map(lambda g: g.astype(dtype), grads)
    params = at(grads, 0)
    ours = optax_cl.chain(optax_cl.scale_by_decoupled_factored_rms())
    theirs = optax.scale_by_factored_rms()

    @jax.jit
    def both(state, other, g):
        updates, state = ours.update(g, state, params)
        expected, other = theirs.update(g, other, params)
        return updates, expected, state, other

    state, other = ours.init(params), theirs.init(params)
    for i in range(3):
        updates, expected, state, other = both(state, other, at(grads, i))
        for name in SHAPES:
            np.testing.assert_array_equal(
                np.asarray(updates[name]), np.asarray(expected[name]), err_msg=name
            )
    for mine, name in zip(("row", "col", "full"), ("v_row", "v_col", "v"), strict=True):
        assert jax.tree.map(jnp.shape, optax.tree.get(state, mine)) == jax.tree.map(
            jnp.shape, getattr(other, name)
        )


@pytest.mark.parametrize(
    ("second_moment", "kept"), [("max", 0.5), ("raw", 0.5), ("routed", 1.0)]
)
def test_a_factor_is_kept_or_cancelled(grads, second_moment, kept):
    rms = optax_cl.scale_by_decoupled_factored_rms(second_moment=second_moment)
    tx, params = optax_cl.chain(optax.scale(0.5), rms), at(grads, 0)
    plain = optax.scale_by_factored_rms()

    def step(tx):
        return tx.update(params, tx.init(params), params)[0]

    updates, expected = jax.jit(lambda: (step(tx), step(plain)))()
    for name in SHAPES:
        wanted = kept * np.asarray(expected[name])
        np.testing.assert_allclose(updates[name], wanted, rtol=1e-5)


def test_maximum_is_taken_before_the_means():
    g = np.asarray(normal(0, 130, 140))
    # Coordinates move between halves: the means of either alone are smaller.
    routed = np.float32([3.0, 0.0]).repeat(70) * g
    tx = optax_cl.scale_by_decoupled_factored_rms()
    update = jax.jit(lambda routed, g: tx.update(routed, tx.init(g), raw_updates=g))
    _, state = update(routed, g)
    squares = np.maximum(g**2, routed**2)
    np.testing.assert_allclose(state.row, squares.mean(1), rtol=1e-5)
    np.testing.assert_allclose(state.col, squares.mean(0), rtol=1e-5)


def test_adafactor_around_it_is_optax_bit_for_bit(grads):
    # Clipped by blocks, then the rate, the size of the block, decay and momentum.
    def adafactor(rms):
        return optax.chain(
            rms,
            optax.clip_by_block_rms(1.0),
            optax.scale_by_learning_rate(0.1),
            optax.scale_by_param_block_rms(),
            optax.ema(0.9, debias=False),
            optax.add_decayed_weights(-0.01),
        )

    ours = optax_cl.capture_raw(
        adafactor(optax_cl.scale_by_decoupled_factored_rms(decay_rate=0.8))
    )
    theirs = adafactor(optax.scale_by_factored_rms(decay_rate=0.8))

    @jax.jit
    def both(state, other, params, g):
        updates, state = ours.update(g, state, params)
        expected, other = theirs.update(g, other, params)
        return updates, expected, state, other

    params = at(grads, 2)
    state, other = ours.init(params), theirs.init(params)
    for i in range(3):
        g = jax.tree.map(lambda x, i=i: (3.0 ** (i - 1)) * x, at(grads, i))
        updates, expected, state, other = both(state, other, params, g)
        for name in SHAPES:
            np.testing.assert_array_equal(
                np.asarray(updates[name]), np.asarray(expected[name]), err_msg=name
            )
            # The clip and the momentum do something.
            assert np.max(np.abs(updates[name] - 0.1 * g[name])) > 1e-3
        params = optax.apply_updates(params, updates)


def test_none_leaves_stay_none():
    params = {"w": jnp.ones((2, 2)), "f": None}
    tx = optax_cl.chain(optax_cl.scale_by_decoupled_factored_rms())
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["f"] is None


@pytest.mark.parametrize(
    ("kwargs", "error"),
    [
        ({"decay_rate": 0.0}, ValueError),
        ({"epsilon": -1.0}, ValueError),
        ({"min_dim_size_to_factor": 0}, ValueError),
        ({"min_dim_size_to_factor": 1.5}, TypeError),
        ({"second_moment": "mean"}, ValueError),
    ],
)
def test_bad_argument_is_named(kwargs, error):
    (name,) = kwargs
    with pytest.raises(error, match=f"`{name}`"):
        optax_cl.scale_by_decoupled_factored_rms(**kwargs)


def test_missing_raw_updates_names_both_fixes():
    tx = optax_cl.scale_by_decoupled_factored_rms()
    with pytest.raises(ValueError, match=r"optax_cl\.chain"):
        tx.update(jnp.ones(3), tx.init(jnp.ones(3)))
