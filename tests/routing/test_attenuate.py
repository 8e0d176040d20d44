"""What is kept still inside a subspace, and where it leaks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_cl
from tests.arrays import normal, orthonormal
from tests.routing.helpers import (
    IN,
    OUT,
    install,
    projector,
    run,
)

# Placement: how much of the displacement stays inside, with a rotated basis


@functools.cache
def displaced(routing):
    """Displacement at strength 1; .7 of the energy inside, unequal coordinates."""
    u = np.asarray(orthonormal(0, 16, 16))
    energies = np.r_[np.full(4, 0.7 / 4), np.full(12, 0.3 / 12)]
    draws = np.random.default_rng(0).normal(size=(300, 16)) * np.sqrt(energies)
    grads = (draws @ u.T) * np.logspace(-0.3, 0.3, 16)
    grads = np.float32(grads[..., None])
    params = normal(1, 16, 1)
    away = optax_cl.attenuate(1.0)
    adam = optax_cl.scale_by_decoupled_adam
    decay = optax.add_decayed_weights(0.1)
    links = {
        "vanilla": [adam()],
        "shared": [away, adam(second_moment="routed")],
        "raw": [away, adam(second_moment="raw")],
        "max": [away, adam()],
        "post": [adam(), away],
        "project": [adam(), optax_cl.project()],
        "decay, project": [adam(), decay, optax_cl.project()],
        "project, decay": [adam(), optax_cl.project(), decay],
        "project, rate": [adam(), optax_cl.project(), optax.scale(-0.1)],
        "rate, project": [adam(), optax.scale(-0.1), optax_cl.project()],
    }[routing]
    tx = optax_cl.protect(4, *links, optax_cl.measure("leak"))
    basis = jnp.asarray(u[:, :4])
    state = install(tx.init(params), basis=basis)
    updates, state = jax.jit(functools.partial(run, tx))(grads, params, state)
    updates = np.asarray(updates)
    moved = np.float64(updates.sum(0))
    inside = np.asarray(basis, np.float64).T @ moved
    last = np.asarray(updates[-1], np.float64)
    share = ((np.asarray(basis).T @ last) ** 2).sum() / (last**2).sum()
    np.testing.assert_allclose(optax.tree.get(state, "leak"), share, atol=1e-6)
    return (inside**2).sum() / (moved**2).sum()


@pytest.mark.parametrize(
    "routing", ["post", "project", "decay, project", "project, rate", "rate, project"]
)
def test_nothing_leaks_behind_the_moments(routing):
    assert displaced(routing) < 1e-12


@pytest.mark.parametrize("routing", ["shared", "raw", "max", "project, decay"])
def test_everything_else_leaks(routing):
    assert displaced(routing) > 1e-3


def test_decoupled_routing_still_protects():
    assert displaced("vanilla") > 0.3
    assert max(displaced("max"), displaced("raw")) < 0.1


@pytest.mark.parametrize("strength", [0.3, 0.8])
def test_post_shrinks_the_protected_part_exactly(strength):
    grads = np.asarray(normal(0, 5, 16, 2))
    basis = orthonormal(0, 16, 4)
    tx = optax_cl.protect(
        4, optax_cl.scale_by_decoupled_adam(), optax_cl.attenuate(strength)
    )
    updates, _ = run(tx, grads, state=install(tx.init(grads[0]), basis=basis))
    plain, _ = run(optax.scale_by_adam(), grads)
    updates, plain = np.asarray(updates), np.asarray(plain)
    inside, outside = projector(basis), np.eye(16) - projector(basis)
    np.testing.assert_allclose(
        inside @ updates, (1 - strength) * (inside @ plain), atol=1e-5
    )
    np.testing.assert_allclose(outside @ updates, outside @ plain, atol=1e-5)


def test_weighted_strength_follows_the_singular_values():
    tx = optax_cl.protect(3, optax_cl.attenuate(0.5, weighted=True))
    g, basis = np.ones((4, 2), np.float32), np.eye(4, 3, dtype=np.float32)
    state = install(tx.init(g), basis=basis, energy=np.float32([4.0, 1.0, 0.0]))
    updates, _ = jax.jit(tx.update)(g, state, g)
    np.testing.assert_allclose(
        np.asarray(updates)[:, 0], [0.5, 0.75, 1.0, 1.0], rtol=1e-6
    )


def test_bfloat16_updates_keep_their_dtype_and_the_basis_stays_float32():
    tx = optax_cl.protect(2, optax_cl.attenuate(optax_cl.balance()), optax_cl.project())
    g = normal(0, 4, 3, dtype=jnp.bfloat16)
    state = tx.init(g)
    updates, after = jax.jit(tx.update)(g, state, g)
    assert updates.dtype == jnp.bfloat16 and state.basis.dtype == jnp.float32
    assert jax.tree.map(jnp.result_type, after) == jax.tree.map(jnp.result_type, state)


# Strength


def test_strength_can_be_vmapped_and_injected():
    g = np.asarray(normal(0, IN, OUT))
    basis = np.asarray(orthonormal(0, IN, 2))

    def one(strength):
        tx = optax_cl.protect(2, optax_cl.attenuate(strength))
        return tx.update(g, install(tx.init(g), basis=basis), g)[0]

    batched = np.asarray(jax.jit(jax.vmap(one))(np.float32([0.0, 1.0])))
    np.testing.assert_allclose(batched[0], g, rtol=1e-6)
    np.testing.assert_allclose(basis.T @ batched[1], 0.0, atol=1e-6)

    injected = optax.inject_hyperparams(optax_cl.attenuate)(strength=1.0)
    tx = optax_cl.protect(2, injected)
    state = install(tx.init(g), basis=basis)
    update = jax.jit(tx.update)
    inside = basis.T @ np.asarray(update(g, state, g)[0])
    np.testing.assert_allclose(inside, 0.0, atol=1e-6)
    state = optax.tree.set(state, strength=jnp.float32(0.0))
    np.testing.assert_allclose(update(g, state, g)[0], g, rtol=1e-6)


def test_zero_gradients_give_zero_updates_and_no_nan():
    tx = optax_cl.protect(
        2,
        optax_cl.attenuate(optax_cl.balance()),
        optax_cl.measure("overlap"),
        optax_cl.measure("strength"),
        optax_cl.scale_by_decoupled_adam(),
        optax_cl.project(),
        optax_cl.measure("leak"),
    )
    params = normal(0, IN, OUT)
    state = install(tx.init(params), basis=orthonormal(0, IN, 2))
    updates, state = run(tx, np.zeros((3, IN, OUT), np.float32), params, state)
    np.testing.assert_array_equal(updates, 0.0)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state))
