"""Where EWC stands: towards the anchor, behind the unscaling, behind the rate."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_cl
from optax_cl.penalties import ewc

PLACES = {
    "before the moments": (lambda e: [e, optax.adam(0.1)], -1),
    "after the moments": (lambda e: [optax.scale_by_adam(), e, optax.scale(-0.1)], -1),
    "post": (lambda e: [optax_cl.decoupled_adamw(0.1, post=[e])], -1),
    # Stated, not wanted: a transformation can't see which way updates point.
    "behind the rate": (lambda e: [optax.adam(0.1), e], 1),
}


@pytest.mark.parametrize("place", PLACES)
def test_the_pull_is_towards_the_anchor_everywhere_but_behind_the_rate(
    finish_task, place
):
    links, sign = PLACES[place]
    tx = optax.chain(*links(ewc(0.5)))
    anchor, ones = jnp.zeros(3), jnp.ones(3)
    state = finish_task(tx.init(anchor), anchor, ones)
    here = jnp.array([1.0, -2.0, 3.0])
    updates, _ = tx.update(jnp.zeros(3), state, here)
    np.testing.assert_array_equal(jnp.sign(updates), sign * jnp.sign(here))


def test_behind_the_unscaling_a_scaled_loss_changes_nothing(finish_task):
    anchor, grads = jnp.zeros(3), jnp.array([0.1, -0.2, 0.4])
    here = jnp.array([1.0, -2.0, 3.0])
    scale = 1024.0
    unscale, sgd = optax.scale(1 / scale), optax.sgd(0.1)

    def steps(*links, scaled):
        tx = optax.chain(*links)
        state = finish_task(tx.init(anchor), anchor, jnp.array([1.0, 2.0, 0.5]))
        params = here
        for _ in range(3):
            g = grads * (scale if scaled else 1.0)
            updates, state = tx.update(g, state, params)
            params = optax.apply_updates(params, updates)
        return params

    plain = steps(ewc(2.0), sgd, scaled=False)
    behind = steps(unscale, ewc(2.0), sgd, scaled=True)
    np.testing.assert_array_equal(behind, plain)
    # In front of it, the pull is divided by the scale of the loss.
    in_front = steps(ewc(2.0), unscale, sgd, scaled=True)
    weak = steps(ewc(2.0 / scale), sgd, scaled=False)
    np.testing.assert_allclose(in_front, weak, rtol=1e-6)
    assert np.max(np.abs(in_front - plain)) > 0.5
