"""The one-call optimizer puts every link in its place."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_cl
from tests.arrays import normal


def test_order_is_modifiers_moments_decay_post_rate():
    g, params = normal(0, 5), normal(1, 5)
    modifiers = [optax.scale(0.5), optax.add_noise(0.0, 0.0, 0)]
    post = [optax.clip(0.3)]
    tx = optax_cl.decoupled_adamw(0.1, modifiers=modifiers, post=post, weight_decay=0.2)
    by_hand = optax_cl.chain(
        *modifiers,
        optax_cl.scale_by_decoupled_adam(),
        optax.add_decayed_weights(0.2),
        *post,
        optax.scale_by_learning_rate(0.1),
    )
    updates, state = tx.update(g, tx.init(params), params)
    expected, other = by_hand.update(g, by_hand.init(params), params)
    np.testing.assert_array_equal(updates, expected)
    assert jax.tree.structure(state) == jax.tree.structure(other)
    np.testing.assert_allclose(
        updates,
        -0.1 * np.clip(0.5 * np.sign(g) + 0.2 * np.asarray(params), -0.3, 0.3),
        atol=1e-6,
    )


def test_learning_rate_can_be_a_schedule_or_injected():
    g = jnp.ones(2)
    tx = optax_cl.decoupled_adamw(lambda step: 0.1 * (step + 1))
    state = tx.init(g)
    first, state = tx.update(g, state, g)
    second, _ = tx.update(g, state, g)
    np.testing.assert_allclose(second / first, 2.0, rtol=1e-5)
    tx = optax.inject_hyperparams(optax_cl.decoupled_adamw)(learning_rate=0.1)
    state = optax.tree.set(tx.init(g), learning_rate=0.3)
    np.testing.assert_allclose(tx.update(g, state, g)[0], -0.3, rtol=1e-5)


@pytest.mark.parametrize(
    ("kwargs", "error", "name"),
    [
        ({"modifiers": optax.identity()}, TypeError, "modifiers"),
        ({"post": [optax.identity(), optax.clip]}, TypeError, r"post\[1\]"),
        ({"learning_rate": -0.1}, ValueError, "learning_rate"),
        ({"learning_rate": "fast"}, TypeError, "learning_rate"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay"),
        ({"b2": 1.0}, ValueError, "b2"),
        ({"second_moment": "min"}, ValueError, "second_moment"),
    ],
)
def test_bad_argument_is_named(kwargs, error, name):
    with pytest.raises(error, match=f"`{name}`"):
        optax_cl.decoupled_adamw(**({"learning_rate": 0.1} | kwargs))


@pytest.mark.parametrize("schedule", [False, True])
@pytest.mark.parametrize("wrap", [lambda tx: tx, lambda tx: optax.chain(tx)])
def test_replay_mixing_in_place_of_a_post_link_is_refused(wrap, schedule):
    rho = optax.constant_schedule(0.5) if schedule else 0.5
    post = [optax.identity(), wrap(optax_cl.mix_replay(rho))]
    with pytest.raises(ValueError, match=r"`post\[1\]` mixes gradients.*`modifiers`"):
        optax_cl.decoupled_adamw(0.1, post=post).init(jnp.ones(2))
    modifiers = [optax_cl.mix_replay(rho)]
    optax_cl.decoupled_adamw(0.1, modifiers=modifiers, post=post[:1]).init(jnp.ones(2))
