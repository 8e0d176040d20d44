"""Gain inflation: the laws of its size, where they fail, and after a switch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_cl
from tests.arrays import normal, orthonormal
from tests.routing.helpers import install, run

STRENGTHS = np.float32([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])


def metered(strength, *, b2, eps=1e-8, eps_root=0.0, second_moment="routed"):
    adam = optax_cl.scale_by_decoupled_adam(
        b2=b2, eps=eps, eps_root=eps_root, second_moment=second_moment
    )
    return optax_cl.protect(
        8,
        optax_cl.attenuate(strength),
        optax_cl.measure_gain(adam, eps=eps, eps_root=eps_root),
    )


def signs(steps):
    return np.float32(np.sign(np.random.default_rng(0).normal(size=(steps, 8, 1))))


def gain(state):
    return optax.tree.get(state, "gain_inflation")


# One direction along an axis, constant size of gradient: sqrt(nu) = 1


@jax.jit
def axis_aligned_gain(strength, eps, eps_root=0.0):
    grads = signs(60)
    tx = metered(strength, b2=0.9, eps=eps, eps_root=eps_root)
    basis = np.float32(np.diag([1.0] + 7 * [0.0]))
    state = install(tx.init(grads[0]), basis=basis)
    return gain(run(tx, grads, state=state)[1])


@functools.cache
def axis_aligned_table():
    over_strengths = jax.vmap(axis_aligned_gain, in_axes=(0, None, None))
    cases = np.float32([[0.0, 0.0], [1e-2, 0], [0.1, 0], [1.0, 0], [0.0, 0.1]])
    table = jax.jit(jax.vmap(over_strengths, in_axes=(None, 0, 0)))
    return np.asarray(table(STRENGTHS, cases[:, 0], cases[:, 1]), np.float64)


def test_inflation_along_an_axis_is_the_inverse_of_what_is_kept():
    kept = 1 - np.asarray(STRENGTHS, np.float64)
    np.testing.assert_allclose(axis_aligned_table()[0] * kept, 1.0, atol=1e-6)


@pytest.mark.parametrize(("row", "eps"), [(1, 1e-2), (2, 0.1), (3, 1.0)])
def test_eps_damps_the_inflation_by_its_formula(row, eps):
    kept = 1 - np.asarray(STRENGTHS, np.float64)
    np.testing.assert_allclose(
        axis_aligned_table()[row], (1 + eps) / (kept + eps), rtol=2e-6
    )


def test_eps_root_damps_the_inflation_by_its_own_formula():
    kept = 1 - np.asarray(STRENGTHS, np.float64)
    np.testing.assert_allclose(
        axis_aligned_table()[4], np.sqrt(1.1 / (kept**2 + 0.1)), rtol=2e-6
    )


def test_eps_bound_of_eight_percent():
    # R is within 8 % of 1/(1-a) iff eps/sqrt(v) <= .08 (1-a) / (a - .08).
    for a, bound in ((0.5, 0.0952), (0.8, 0.0222)):
        below, above = (
            float(axis_aligned_gain(a, bound * f)) * (1 - a) for f in (0.99, 1.02)
        )
        assert below > 0.92 > above


# A rotated basis


@functools.cache
def rotated(overlaps=(0.3, 0.6, 0.9), d=64, r=8, steps=600):
    """Measured overlaps, and inflations [overlap, strength], at b2 = .99."""
    u = np.asarray(orthonormal(1, d, d), np.float64)
    draws = np.random.default_rng(0).normal(size=(len(overlaps), steps, d))
    streams, measured = [], []
    for s, z in zip(overlaps, draws, strict=True):
        scale = np.r_[
            np.full(r, (s / r) ** 0.5), np.full(d - r, ((1 - s) / (d - r)) ** 0.5)
        ]
        g = (z * scale) @ u.T
        streams.append(g)
        measured.append(((g @ u[:, :r]) ** 2).sum() / (g**2).sum())
    basis = np.float32(u[:, :r])

    def one(grads, strength, second_moment):
        tx = metered(strength, b2=0.99, second_moment=second_moment)
        state = install(tx.init(grads[0]), basis=basis)
        return gain(run(tx, grads, state=state)[1])

    streams = np.float32(np.stack(streams)[..., None])

    def table(second_moment):
        f = functools.partial(one, second_moment=second_moment)
        f = jax.vmap(jax.vmap(f, in_axes=(None, 0)), in_axes=(0, None))
        return np.asarray(jax.jit(f)(streams, STRENGTHS), np.float64)

    return np.array(measured), table("routed"), table("raw"), table("max")


def test_inflation_in_a_rotated_basis_follows_the_law_within_8_percent():
    s, shared, _, _ = rotated()
    a = np.asarray(STRENGTHS, np.float64)
    law = (1 - a * (2 - a) * s[:, None]) ** -0.5
    assert np.max(np.abs(shared / law - 1)) < 0.08


def test_the_naive_law_fails_in_a_rotated_basis():
    _, shared, _, _ = rotated()
    naive = 1 / (1 - np.asarray(STRENGTHS, np.float64))
    worst = np.max(np.abs(shared / naive - 1), axis=1)
    assert np.all(worst > 0.4)


def test_raw_second_moment_has_no_inflation_and_max_never_inflates():
    _, _, raw, most = rotated()
    np.testing.assert_allclose(raw, 1.0, rtol=1e-6)
    # max(raw^2, routed^2) only adds to the denominator.
    assert np.all(most <= 1 + 1e-6)


# After a switch from vanilla to shared routing


def after_switch(q, reset, strength=0.5, b2=0.9, steps=40):
    """Inflation at each step after a switch; old raw nu is q times the new one."""
    sign = signs(200 + steps)
    old, new = sign[:200] * jnp.sqrt(q), sign[200:][:steps]
    tx = metered(strength, b2=b2, eps=0.0)
    _, state = run(tx, old)
    if reset:
        state = optax_cl.reset_state(state)
    state = install(state, basis=np.eye(8, dtype=np.float32))

    def step(state, g):
        _, state = tx.update(g, state, g)
        return state, gain(state)

    return jax.lax.scan(step, state, new)[1]


@functools.cache
def transients():
    f = jax.jit(jax.vmap(functools.partial(after_switch, reset=False)))
    return np.asarray(f(np.float32([0.25, 1.0, 4.0])), np.float64)


def test_transient_after_a_switch_with_carried_moments():
    t = np.arange(1, 41)
    left = 0.9**t
    for q, measured in zip((0.25, 1.0, 4.0), transients(), strict=True):
        shadow = left * q + 1 - left
        shared = left * q + (1 - left) * 0.25
        np.testing.assert_allclose(measured, np.sqrt(shadow / shared), rtol=1e-5)


def test_ninety_percent_of_the_inflation_takes_3_3_time_constants():
    reached = np.argmax(transients()[1] - 1 >= 0.9) + 1
    assert 29 <= reached <= 33


@pytest.mark.parametrize(
    ("strength", "constants"), [(0.2, 2.6), (0.5, 3.3), (0.8, 4.9)]
)
def test_ninety_percent_takes_longer_the_stronger_the_attenuation(strength, constants):
    b2, steps = 0.98, 300
    measured = jax.jit(
        functools.partial(
            after_switch, reset=False, strength=strength, b2=b2, steps=steps
        )
    )(1.0)
    whole = 1 / (1 - strength) - 1
    reached = (np.argmax(np.asarray(measured) - 1 >= 0.9 * whole) + 1) * (1 - b2)
    assert abs(reached - constants) < 0.1


def test_reset_moments_inflate_at_once():
    measured = jax.jit(functools.partial(after_switch, reset=True))(1.0)
    np.testing.assert_allclose(measured, 2.0, rtol=1e-5)


# The meter


def test_gain_meter_changes_nothing_and_keeps_shapes():
    grads = np.asarray(normal(0, 5, 8, 2))
    adam = optax_cl.scale_by_decoupled_adam
    plain = optax_cl.protect(8, optax_cl.attenuate(0.5), adam(b2=0.9))
    state = install(plain.init(grads[0]), basis=orthonormal(0, 8, 8))
    expected, _ = run(plain, grads, state=state)
    tx = metered(0.5, b2=0.9, second_moment="max")
    start = install(tx.init(grads[0]), basis=orthonormal(0, 8, 8))
    updates, state = run(tx, grads, state=start)
    np.testing.assert_allclose(updates, expected, rtol=1e-5, atol=1e-7)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, start)


@pytest.mark.parametrize("b2", [0.0, 0.9, 0.99])
def test_shadow_decays_as_the_moment_inside(b2):
    # The scale of the gradient grows: another decay would read another scale.
    grads = np.asarray(normal(0, 40, 8, 2)) * np.float32(
        np.logspace(0, 2, 40)[:, None, None]
    )

    def inflation(strength, eps, **settings):
        adam = optax_cl.scale_by_decoupled_adam(b2=b2, eps=eps, **settings)
        meter = optax_cl.measure_gain(adam, eps=eps)
        tx = optax_cl.protect(8, optax_cl.attenuate(strength), meter)
        state = install(tx.init(grads[0]), basis=np.eye(8, dtype=np.float32))
        return gain(run(tx, grads, state=state)[1])

    assert inflation(0.5, 1e-8, second_moment="raw") == 1.0
    shared = inflation(0.5, 1e-8, second_moment="routed")
    np.testing.assert_allclose(shared, 2.0, rtol=1e-5)
    # With an eps of its size, the corrected moment counts too.
    weights = (1 - b2) * b2 ** np.arange(39.0, -1, -1) / (1 - b2**40)
    root = np.sqrt(np.einsum("t,tij->ij", weights, np.asarray(grads, np.float64) ** 2))
    expected = np.mean((root + 30) / (root / 2 + 30))
    shared = inflation(0.5, 30.0, second_moment="routed")
    np.testing.assert_allclose(shared, expected, rtol=1e-4)


def test_decay_is_read_off_masked_and_low_precision_moments():
    grads = np.asarray(normal(0, 40, 8, 2))
    inner = optax_cl.scale_by_decoupled_adam(b2=0.9, second_moment="raw")
    for moments in (optax.masked(inner, True), optax.chain(inner, optax.clip(1.0))):
        meter = optax_cl.measure_gain(moments)
        tx = optax_cl.protect(8, optax_cl.attenuate(0.5), meter)
        state = install(tx.init(grads[0]), basis=np.eye(8, dtype=np.float32))
        assert gain(run(tx, grads, state=state)[1]) == 1.0
    grads = grads.astype(jnp.bfloat16)
    adam = optax_cl.scale_by_decoupled_adam(second_moment="routed")
    tx = optax_cl.protect(8, optax_cl.attenuate(0.5), optax_cl.measure_gain(adam))
    state = install(tx.init(grads[0]), basis=np.eye(8, dtype=np.float32))
    _, after = run(tx, grads, state=state)
    np.testing.assert_allclose(gain(after), 2.0, rtol=0.05)
    assert jax.tree.map(jnp.result_type, after) == jax.tree.map(jnp.result_type, state)


def test_gain_is_one_before_the_first_boundary():
    grads = np.asarray(normal(0, 3, 8, 2))
    assert gain(run(metered(0.5, b2=0.9), grads)[1]) == 1.0


def test_gain_meter_names_what_is_missing():
    adam = optax_cl.scale_by_decoupled_adam()
    with pytest.raises(ValueError, match="`nu`"):
        optax_cl.measure_gain(optax.sgd(0.1)).init(jnp.zeros(2))
    tx = optax_cl.chain(optax_cl.measure_gain(adam))
    g = jnp.zeros((2, 2))
    with pytest.raises(TypeError, match=r"`measure_gain`.*protect"):
        tx.update(g, tx.init(g))
