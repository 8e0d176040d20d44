"""Meters: the numbers they read, and that they change nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_cl
from tests.arrays import normal, orthonormal
from tests.routing.helpers import install

BASIS = orthonormal(0, 6, 2)
G = normal(1, 6, 3)


def read(name, *links, g=G, **extra):
    tx = optax_cl.protect(2, *links)
    state = install(tx.init(g), basis=BASIS)
    _, state = tx.update(g, state, g, **extra)
    return float(optax.tree.get(state, name))


def share(g):
    g, u = np.asarray(g, np.float64), np.asarray(BASIS, np.float64)
    return ((u.T @ g) ** 2).sum() / (g**2).sum()


def test_overlap_is_that_of_the_raw_gradient_wherever_it_stands():
    meter = optax_cl.measure("overlap")
    for links in ([meter, optax_cl.attenuate(1.0)], [optax_cl.attenuate(1.0), meter]):
        np.testing.assert_allclose(read("overlap", *links), share(G), rtol=1e-5)


def test_strength_is_the_share_taken_away():
    links = [optax_cl.attenuate(0.3), optax_cl.measure("strength")]
    np.testing.assert_allclose(read("strength", *links), 0.3, rtol=1e-5)


def test_leak_is_the_share_left_inside():
    meter = optax_cl.measure("leak")
    np.testing.assert_allclose(read("leak", meter), share(G), rtol=1e-5)
    assert read("leak", optax_cl.project(), meter) < 1e-12
    s = 0.25 * share(G) / (1 - 0.75 * share(G))
    half = optax_cl.attenuate(0.5)
    np.testing.assert_allclose(read("leak", half, meter), s, rtol=1e-5)


def test_cosine_to_a_reference():
    meter = optax_cl.measure("cosine")
    other = normal(2, 6, 3)
    a, b = np.asarray(G, np.float64).ravel(), np.asarray(other, np.float64).ravel()
    expected = a @ b / np.sqrt((a @ a) * (b @ b))
    np.testing.assert_allclose(
        read("cosine", meter, reference_updates=other), expected, rtol=1e-5
    )
    assert read("cosine", meter, reference_updates=0 * G) == 0.0
    with pytest.raises(ValueError, match="`reference_updates`"):
        read("cosine", meter)


def test_two_meters_of_one_quantity_have_two_names():
    before, after = (
        optax_cl.measure("leak", "before"),
        optax_cl.measure("leak", "after"),
    )
    links = [before, optax_cl.project(), after]
    assert read("before", *links) > 0.1 > read("after", *links)


def test_meters_let_updates_through_and_keep_their_state():
    links = [optax_cl.measure(q) for q in ("overlap", "strength", "leak")]
    tx = optax_cl.protect(2, *links)
    state = install(tx.init(G), basis=BASIS)
    updates, after = jax.jit(tx.update)(G, state, G)
    np.testing.assert_array_equal(updates, G)
    assert jax.tree.map(jnp.result_type, after) == jax.tree.map(jnp.result_type, state)


def test_unknown_quantity_is_named():
    with pytest.raises(ValueError, match="`quantity`"):
        optax_cl.measure("mood")
