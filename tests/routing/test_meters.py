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


# Every size of a gradient

SIZES = [1e-30, 1e-20, 1e-11, 1.0, 1e9, 1e20, 1e25, 1e37]


@pytest.mark.parametrize("size", SIZES)
def test_the_size_of_a_gradient_does_not_matter(size):
    g = G * size
    overlap, leak = optax_cl.measure("overlap"), optax_cl.measure("leak")
    away, strength = optax_cl.attenuate(0.324), optax_cl.measure("strength")
    np.testing.assert_allclose(read("overlap", overlap, g=g), share(G), rtol=1e-5)
    np.testing.assert_allclose(read("leak", leak, g=g), share(G), rtol=1e-5)
    np.testing.assert_allclose(read("strength", away, strength, g=g), 0.324, rtol=1e-5)
    for other in (1e-30, 1.0, 1e30):
        cosine = read(
            "cosine", optax_cl.measure("cosine"), g=g, reference_updates=-G * other
        )
        np.testing.assert_allclose(cosine, -1.0, rtol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_one_minus_reads_the_overlap_of_every_size_of_gradient(size):
    rule = optax_cl.one_minus(0.5, decay=0.0)
    links = [optax_cl.attenuate(rule), optax_cl.measure("strength")]
    measured = read("strength", *links, g=G * size)
    np.testing.assert_allclose(measured, 0.5 * (1 - share(G)), rtol=1e-5)


@pytest.mark.parametrize("entry", [3.4e38, 1e-45, 0.0])
def test_meters_are_finite_at_the_ends_of_float32(entry):
    g = jnp.full((6, 3), entry)
    for name in ("overlap", "strength", "leak", "cosine"):
        value = read(name, optax_cl.measure(name), g=g, reference_updates=g)
        assert np.isfinite(value), name


def test_scaling_by_a_power_of_two_changes_no_bit_of_a_meter():
    with jax.disable_jit():
        g = G / 8
        c = BASIS.T @ g
        plain = jnp.sum(c * c) / jnp.sum(g * g)
        assert read("leak", optax_cl.measure("leak"), g=g) == float(plain)
        assert read("overlap", optax_cl.measure("overlap"), g=g) == float(plain)


def test_unknown_quantity_is_named():
    with pytest.raises(ValueError, match="`quantity`"):
        optax_cl.measure("mood")
