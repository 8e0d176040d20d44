"""Binding the raw gradient: what counts as raw, and every way to get it wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_cl
from tests.arrays import normal
from tests.routing.helpers import run


def adam(**kwargs):
    return optax_cl.scale_by_decoupled_adam(**kwargs)


def nu(state):
    return optax.tree.get(state, "nu")


def test_chain_equals_a_plain_chain_given_raw_updates():
    g = normal(0, 5)
    ours = optax_cl.chain(optax.scale(0.5), adam())
    plain = optax.chain(optax.scale(0.5), adam())
    updates, state = ours.update(g, ours.init(g))
    expected, plain_state = plain.update(g, plain.init(g), raw_updates=g)
    np.testing.assert_array_equal(updates, expected)
    assert jax.tree.structure(state) == jax.tree.structure(plain_state)
    np.testing.assert_allclose(nu(state), 1e-3 * g**2, rtol=1e-6)


def test_what_stands_before_the_capture_belongs_to_the_raw_gradient():
    g = normal(0, 5)
    tx = optax.chain(optax.scale(3.0), optax_cl.chain(optax.scale(0.5), adam()))
    _, state = tx.update(g, tx.init(g))
    np.testing.assert_allclose(nu(state), 1e-3 * (3 * g) ** 2, rtol=1e-6)


@pytest.mark.parametrize("jit", [False, True])
def test_missing_raw_updates_names_both_fixes(jit):
    g = normal(0, 5)
    tx = optax.chain(optax.scale(0.5), adam())
    update = jax.jit(tx.update) if jit else tx.update
    with pytest.raises(ValueError, match=r"optax_cl\.chain") as error:
        update(g, tx.init(g))
    assert "raw_updates=" in str(error.value)


def test_all_routed_reads_no_raw_gradient():
    g = normal(0, 5)
    tx = adam(second_moment="routed")
    expected, _ = optax.scale_by_adam().update(g, optax.scale_by_adam().init(g))
    np.testing.assert_array_equal(tx.update(g, tx.init(g))[0], expected)


def test_capture_that_nobody_reads_is_legal_and_free():
    g = normal(0, 5)
    tx = optax_cl.chain(optax.scale(0.5), optax.scale_by_adam())
    plain = optax.chain(optax.scale(0.5), optax.scale_by_adam())
    updates, state = tx.update(g, tx.init(g))
    np.testing.assert_array_equal(updates, plain.update(g, plain.init(g))[0])
    assert jax.tree.structure(state) == jax.tree.structure(plain.init(g))


# A capture inside a capture


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(
    "inner",
    [
        lambda: optax_cl.chain(adam()),
        lambda: optax_cl.protect(1, adam()),
        lambda: optax_cl.decoupled_adamw(0.1),
    ],
)
def test_capture_behind_a_modifier_raises(inner, jit):
    g = normal(0, 5, 2)
    tx = optax_cl.chain(optax.scale(0.5), inner())
    update = jax.jit(tx.update) if jit else tx.update
    with pytest.raises(ValueError, match="rebind=True"):
        update(g, tx.init(g), g)


def test_capture_of_the_same_leaves_is_the_same_capture():
    g = normal(0, 5)
    tx = optax_cl.chain(optax.identity(), optax_cl.chain(optax.scale(0.5), adam()))
    once = optax_cl.chain(optax.scale(0.5), adam())
    updates, _ = jax.jit(tx.update)(g, tx.init(g))
    np.testing.assert_array_equal(updates, jax.jit(once.update)(g, once.init(g))[0])


def test_rebind_takes_the_clipped_gradient_for_the_raw_one():
    g = 10 * normal(0, 5)
    inner = optax.chain(optax.scale(0.5), adam())
    tx = optax_cl.chain(
        optax.clip(1.0), optax_cl.capture_raw(inner, rebind=True), note()
    )
    _, state = jax.jit(tx.update)(g, tx.init(g))
    np.testing.assert_allclose(nu(state), 1e-3 * jnp.clip(g, -1, 1) ** 2, rtol=1e-5)
    # Behind the inner capture the outer one holds again.
    np.testing.assert_array_equal(state[-1], g)


def note():
    """A link that keeps the raw gradient it was given."""
    return optax.GradientTransformationExtraArgs(
        jnp.zeros_like, lambda u, s, p=None, *, raw_updates, **_: (u, raw_updates)
    )


def test_nested_capture_would_have_cost_the_protection():
    # Why it raises: the inner capture sees .5 g as raw, so Adam cancels the .5.
    grads = jnp.ones((20, 1))
    inner = optax_cl.capture_raw(adam(), rebind=True)
    silent = run(optax_cl.chain(optax.scale(0.5), inner), grads)[0].sum()
    right = run(optax_cl.chain(optax.scale(0.5), adam()), grads)[0].sum()
    np.testing.assert_allclose([silent, right], [20.0, 10.0], rtol=1e-4)


# Accumulation


def test_raw_gradient_under_multi_steps_is_the_accumulated_one():
    grads = normal(0, 4, 3)
    mean = grads.mean(0)
    tx = optax_cl.multi_steps(optax_cl.chain(optax.scale(0.5), adam()), 4)
    updates, state = run(tx, grads)
    np.testing.assert_allclose(nu(state), 1e-3 * mean**2, rtol=1e-4)
    np.testing.assert_array_equal(updates[:3], 0.0)
    once = optax_cl.chain(optax.scale(0.5), adam())
    np.testing.assert_allclose(
        updates[3], once.update(mean, once.init(mean))[0], rtol=1e-4
    )


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(
    "inside", [lambda: optax_cl.chain(adam()), lambda: optax.chain(adam()), adam]
)
def test_capture_around_multi_steps_raises(inside, jit):
    # With only the outer capture, raw would be the last micro-batch's gradient and nu
    # several times too large; with both, the inner one would take a changed gradient.
    g = normal(0, 3)
    tx = optax_cl.chain(optax.scale(0.5), optax_cl.multi_steps(inside(), 4))
    update = jax.jit(tx.update) if jit else tx.update
    with pytest.raises(ValueError, match="inside"):
        update(g, tx.init(g), g)


def test_multi_steps_passes_extra_arguments_on():
    seen = optax.GradientTransformationExtraArgs(
        jnp.zeros_like, lambda u, s, p=None, *, mark, **_: (u + mark, s)
    )
    tx = optax_cl.multi_steps(seen, 1)
    g = jnp.zeros(2)
    np.testing.assert_array_equal(tx.update(g, tx.init(g), g, mark=2.0)[0], 2.0)


def test_multi_steps_and_links_refuse_what_is_no_transformation():
    with pytest.raises(TypeError, match="`inner`"):
        optax_cl.multi_steps(optax.scale_by_adam, 2)
    with pytest.raises(TypeError, match=r"`links\[1\]`"):
        optax_cl.chain(optax.identity(), optax_cl.scale_by_decoupled_adam)
    with pytest.raises(TypeError, match="`inner`"):
        optax_cl.capture_raw(optax.scale_by_adam)


# Masks


@pytest.fixture(scope="module")
def tree():
    params = {"a": normal(0, 3), "b": {"c": normal(1, 2), "d": normal(2, 2)}}
    grads = jax.tree.map(lambda x: x + 1.0, params)
    return params, grads


MASKS = [
    {"a": True, "b": {"c": False, "d": True}},
    {"a": True, "b": False},  # a prefix
]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("place", ["outside", "inside", "inside, compatible"])
def test_masked_leaves_pass_and_the_others_are_routed(tree, mask, place):
    params, grads = tree
    half = optax.scale(0.5)
    if place == "outside":
        tx = optax.masked(optax_cl.chain(half, adam()), mask)
    else:
        masked = optax.masked(
            optax.chain(half, adam()), mask, mask_compatible_extra_args="," in place
        )
        tx = optax_cl.chain(masked)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["a"], 0.5 * jnp.sign(grads["a"]), rtol=1e-5)
    np.testing.assert_array_equal(updates["b"]["c"], grads["b"]["c"])


@pytest.mark.parametrize("place", ["outside", "inside"])
def test_partition_routes_its_groups(tree, place):
    params, grads = tree
    labels = {"a": "slow", "b": "fast"}
    slow, fast = optax.chain(optax.scale(0.5), adam()), optax.scale(2.0)
    if place == "outside":
        tx = optax.partition({"slow": optax_cl.capture_raw(slow), "fast": fast}, labels)
    else:
        tx = optax_cl.capture_raw(optax.partition({"slow": slow, "fast": fast}, labels))
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["a"], 0.5 * jnp.sign(grads["a"]), rtol=1e-5)
    np.testing.assert_array_equal(updates["b"]["d"], 2 * grads["b"]["d"])


def test_apply_if_finite_and_inject_hyperparams_keep_the_routing():
    g = normal(0, 5)

    @optax.inject_hyperparams
    def make(rate):
        return optax_cl.chain(optax.scale(0.5), adam(), optax.scale(rate))

    tx = optax.apply_if_finite(make(rate=2.0), 3)
    update = jax.jit(tx.update)
    updates, state = update(g, tx.init(g), g)
    np.testing.assert_allclose(updates, jnp.sign(g), rtol=1e-5)
    updates, state = update(g.at[0].set(jnp.nan), state, g)
    np.testing.assert_array_equal(updates, 0.0)
    np.testing.assert_allclose(nu(state), 1e-3 * g**2, rtol=1e-6)


# Trees that do not fit


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"w": jnp.zeros(3)}, "tree structure"),
        ({"w": jnp.zeros(3), "b": jnp.zeros(3)}, r"at `b` got \(3,\), expected \(2,\)"),
        (jnp.zeros(3), "tree structure"),
    ],
)
def test_raw_updates_that_do_not_fit_are_refused(raw, message):
    updates = {"w": jnp.zeros(3), "b": jnp.zeros(2)}
    tx = adam()
    with pytest.raises(ValueError, match=f"`raw_updates`.*{message}"):
        tx.update(updates, tx.init(updates), raw_updates=raw)
