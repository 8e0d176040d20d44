"""The moments: equal to Optax without a modifier, and what each routing moves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_cl
from tests.arrays import normal, orthonormal
from tests.routing.helpers import install, run

STRENGTHS = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])


def steps_in_one_jit(tx, reference, grads, params):
    """Updates of both, step by step in one jit."""

    @jax.jit
    def both(state, reference_state, g):
        updates, state = tx.update(g, state, params)
        expected, reference_state = reference.update(g, reference_state, params)
        return updates, expected, state, reference_state

    state, reference_state = tx.init(params), reference.init(params)
    for i in range(jax.tree.leaves(grads)[0].shape[0]):
        g = jax.tree.map(lambda x, i=i: x[i], grads)
        updates, expected, state, reference_state = both(state, reference_state, g)
        yield updates, expected
    yield state, reference_state


def assert_bits(tree, expected):
    leaves, other = jax.tree.leaves(tree), jax.tree.leaves(expected)
    assert len(leaves) == len(other)
    for a, b in zip(leaves, other, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


PAIRS = {
    "adam": (optax_cl.scale_by_decoupled_adam, optax.scale_by_adam),
    "nadam": (
        functools.partial(optax_cl.scale_by_decoupled_adam, nesterov=True),
        functools.partial(optax.scale_by_adam, nesterov=True),
    ),
    "amsgrad": (optax_cl.scale_by_decoupled_amsgrad, optax.scale_by_amsgrad),
}


@pytest.mark.parametrize("second_moment", ["max", "raw", "routed"])
@pytest.mark.parametrize("kind", PAIRS)
def test_bitwise_optax_without_a_modifier(kind, second_moment):
    ours, theirs = PAIRS[kind]
    params = {
        "a": jnp.zeros((3, 4)),
        "b": jnp.zeros(5, jnp.bfloat16),
        "none": None,
    }
    grads = {
        "a": normal(0, 6, 3, 4),
        "b": normal(1, 6, 5).astype(jnp.bfloat16),
        "none": None,
    }
    tx = optax_cl.chain(ours(0.8, 0.97, 1e-6, 1e-10, second_moment=second_moment))
    for pair in steps_in_one_jit(tx, theirs(0.8, 0.97, 1e-6, 1e-10), grads, params):
        assert_bits(*pair)


@pytest.mark.parametrize("kind", PAIRS)
def test_bitwise_optax_with_mu_dtype(kind):
    ours, theirs = PAIRS[kind]
    grads = normal(0, 6, 7)
    pairs = steps_in_one_jit(
        optax_cl.chain(ours(mu_dtype="bfloat16")),
        theirs(mu_dtype="bfloat16"),
        grads,
        grads[0],
    )
    for pair in pairs:
        assert_bits(*pair)
    assert pair[0][0].mu.dtype == jnp.bfloat16


@pytest.mark.parametrize("kind", ["adam", "nadam"])
def test_bitwise_optax_for_complex_parameters(kind):
    ours, theirs = PAIRS[kind]
    grads = normal(0, 5, 6) + 1j * normal(1, 5, 6)
    for pair in steps_in_one_jit(
        optax_cl.chain(ours()), theirs(), grads, jnp.zeros_like(grads[0])
    ):
        assert_bits(*pair)


def test_adamw_alias_is_optax_adamw():
    params = {"w": normal(3, 4, 2), "b": normal(4, 2)}
    grads = {"w": normal(0, 5, 4, 2), "b": normal(1, 5, 2)}
    mask = {"w": True, "b": False}
    schedule = optax.linear_schedule(0.1, 0.01, 4)
    ours = optax_cl.decoupled_adamw(
        schedule, b1=0.8, b2=0.97, eps=1e-6, weight_decay=0.1, mask=mask
    )
    theirs = optax.adamw(
        schedule, b1=0.8, b2=0.97, eps=1e-6, weight_decay=0.1, mask=mask
    )
    for updates, expected in list(steps_in_one_jit(ours, theirs, grads, params))[:-1]:
        assert_bits(updates, expected)


# Displacement, relative to plain Adam: routing.md's identities on eight axes at once.


@pytest.fixture(scope="module")
def displacement():
    """Sum of all updates on eight coordinates, each with a strength of its own."""
    grads = normal(0, 400, 8) + 0.2
    keep = jnp.asarray(1 - STRENGTHS, jnp.float32)
    modifier = optax.stateless(lambda g, _: g * keep)

    def moved(*links):
        return np.asarray(
            jax.jit(lambda g: run(optax_cl.chain(*links), g)[0].sum(0))(grads),
            np.float64,
        )

    adam = optax_cl.scale_by_decoupled_adam
    return {
        "vanilla": moved(adam()),
        "shared": moved(modifier, adam(second_moment="routed")),
        "optax": moved(modifier, optax.scale_by_adam()),
        "max": moved(modifier, adam()),
        "raw": moved(modifier, adam(second_moment="raw")),
        "denominator": moved(
            modifier, adam(first_moment="raw", second_moment="routed")
        ),
        "post": moved(adam(), modifier),
    }


@pytest.mark.parametrize(
    ("routing", "ratio"),
    [
        ("shared", lambda a: np.ones_like(a)),
        ("optax", lambda a: np.ones_like(a)),
        ("max", lambda a: 1 - a),
        ("raw", lambda a: 1 - a),
        ("denominator", lambda a: 1 / (1 - a)),
        ("post", lambda a: 1 - a),
    ],
)
def test_displacement_along_an_axis(displacement, routing, ratio):
    measured = displacement[routing] / displacement["vanilla"]
    np.testing.assert_allclose(measured, ratio(STRENGTHS), rtol=1e-5)


def test_amsgrad_and_nadam_route_alike():
    grads = normal(0, 50, 8) + 0.2
    keep = jnp.asarray(1 - STRENGTHS, jnp.float32)
    modifier = optax.stateless(lambda g, _: g * keep)
    for kind in ("nadam", "amsgrad"):
        link, plain = PAIRS[kind]
        moved = run(optax_cl.chain(modifier, link()), grads)[0].sum(0)
        shared = run(optax.chain(modifier, plain()), grads)[0].sum(0)
        vanilla = run(plain(), grads)[0].sum(0)
        np.testing.assert_allclose(moved / vanilla, 1 - STRENGTHS, rtol=1e-5)
        np.testing.assert_allclose(shared / vanilla, 1.0, rtol=1e-5)


def test_nesterov_look_ahead_reads_the_routed_gradient():
    # With the raw gradient in the look-ahead term, the first step would not be 0.1.
    tx = optax_cl.chain(
        optax.scale(0.1), optax_cl.scale_by_decoupled_adam(nesterov=True)
    )
    plain = optax.scale_by_adam(nesterov=True)
    g = jnp.array([1.0, -3.0])
    np.testing.assert_allclose(
        tx.update(g, tx.init(g))[0], 0.1 * plain.update(g, plain.init(g))[0], rtol=1e-5
    )


# Optimizers that have nothing to route


def test_momentum_sgd_has_nothing_to_repair():
    grads = normal(0, 50, 8)
    keep = jnp.asarray(1 - STRENGTHS, jnp.float32)
    modifier = optax.stateless(lambda g, _: g * keep)
    plain = run(optax.trace(0.9), grads)[0].sum(0)
    before = run(optax.chain(modifier, optax.trace(0.9)), grads)[0].sum(0)
    after = run(optax.chain(optax.trace(0.9), modifier), grads)[0].sum(0)
    np.testing.assert_allclose(before / plain, 1 - STRENGTHS, rtol=1e-4)
    np.testing.assert_allclose(after / plain, 1 - STRENGTHS, rtol=1e-6)


def test_lion_cancels_a_modifier_and_only_post_attenuates():
    grads = normal(0, 50, 8)
    keep = jnp.asarray(1 - STRENGTHS, jnp.float32)
    modifier = optax.stateless(lambda g, _: g * keep)
    plain = run(optax.scale_by_lion(), grads)[0]
    before = run(optax_cl.chain(modifier, optax.scale_by_lion()), grads)[0]
    after = run(optax_cl.chain(optax.scale_by_lion(), modifier), grads)[0]
    np.testing.assert_array_equal(before, plain)
    np.testing.assert_allclose(after, np.asarray(plain) * np.asarray(keep), rtol=1e-6)


# Safety of the second moment


def protected_adam(rank, second_moment, strength, kind="adam"):
    return optax_cl.protect(
        rank,
        optax_cl.attenuate(strength),
        PAIRS[kind][0](second_moment=second_moment),
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", PAIRS)
def test_dead_coordinate_is_bounded_by_max_and_unbounded_by_raw(kind, seed):
    grads = normal(seed, 100, 16, 1).at[:, 0].set(0.0)

    def largest(second_moment):
        tx = protected_adam(4, second_moment, 0.5, kind)
        state = install(tx.init(grads[0]), basis=orthonormal(seed, 16, 4))
        return float(jnp.max(jnp.abs(run(tx, grads, state=state)[0])))

    # The look-ahead of NAdam lengthens plain steps, too.
    plain = float(jnp.max(jnp.abs(run(PAIRS[kind][1](), grads)[0])))
    assert plain < (2.0 if kind == "nadam" else 1.5)
    assert largest("raw") > 1e3
    assert largest("max") < 1.1 * plain


def test_nearly_dead_coordinate_shows_the_same():
    grads = normal(0, 100, 16, 1).at[:, 0].multiply(1e-3)
    steps = {}
    for second in ("max", "raw"):
        tx = protected_adam(4, second, 0.5)
        state = install(tx.init(grads[0]), basis=orthonormal(0, 16, 4))
        steps[second] = float(jnp.max(jnp.abs(run(tx, grads, state=state)[0])))
    assert steps["raw"] > 10 > 1.5 > steps["max"]


@pytest.mark.parametrize(
    ("second_moment", "step"), [("routed", 1.0), ("raw", 11.0), ("max", 1.0)]
)
def test_price_of_max_for_an_additive_penalty(second_moment, step):
    # Raw gradient 1e-2, a penalty ten times as large: "raw" lets all of it through.
    penalty = optax.stateless(lambda g, _: g + 0.1)
    tx = optax_cl.chain(
        penalty, optax_cl.scale_by_decoupled_adam(second_moment=second_moment)
    )
    updates, _ = run(tx, jnp.full((50, 1), 1e-2))
    np.testing.assert_allclose(updates, step, rtol=2e-5)


def test_max_equals_raw_where_a_modifier_only_attenuates():
    grads = normal(0, 30, 8)
    keep = jnp.asarray(1 - STRENGTHS, jnp.float32)
    modifier = optax.stateless(lambda g, _: g * keep)
    results = [
        run(
            optax_cl.chain(modifier, optax_cl.scale_by_decoupled_adam(second_moment=m)),
            grads,
        )[0]
        for m in ("max", "raw")
    ]
    # A different program, so a different fusion; the numbers are the same.
    np.testing.assert_allclose(*results, rtol=1e-6)


# Nothing to protect


@pytest.mark.parametrize("post", [False, True])
@pytest.mark.parametrize("case", ["strength 0", "empty basis"])
def test_nothing_to_protect_is_plain_adam(case, post):
    grads = normal(0, 30, 6, 3)
    strength = 0.0 if case == "strength 0" else 0.7
    links = [optax_cl.attenuate(strength), optax_cl.scale_by_decoupled_adam()]
    tx = optax_cl.protect(2, *(links[::-1] if post else links))
    state = tx.init(grads[0])
    if case == "strength 0":
        state = install(state, basis=orthonormal(0, 6, 2))
    updates, _ = run(tx, grads, state=state)
    expected, _ = run(optax.scale_by_adam(), grads)
    np.testing.assert_allclose(updates, expected, rtol=1e-6, atol=1e-7)


# State and arguments


def test_state_has_the_leaves_of_optax_and_keeps_shapes_and_dtypes():
    params = {"w": jnp.zeros((2, 3), jnp.bfloat16), "b": jnp.zeros(3)}
    tx = optax_cl.scale_by_decoupled_adam(mu_dtype=jnp.float32)
    state = tx.init(params)
    theirs = optax.scale_by_adam(mu_dtype=jnp.float32).init(params)
    assert_bits(jax.tree.leaves(state), jax.tree.leaves(theirs))
    _, after = tx.update(params, state, raw_updates=params)
    assert_bits(jax.tree.map(jnp.zeros_like, after), state)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("b1", 1.0),
        ("b1", -0.1),
        ("b2", 1.0),
        ("b2", float("nan")),
        ("eps", -1e-8),
        ("eps", float("inf")),
        ("eps_root", -1.0),
        ("first_moment", "max"),
        ("second_moment", "both"),
    ],
)
@pytest.mark.parametrize(
    "make",
    [optax_cl.scale_by_decoupled_adam, optax_cl.scale_by_decoupled_amsgrad],
)
def test_bad_argument_is_named(make, name, value):
    with pytest.raises(ValueError, match=f"`{name}`"):
        make(**{name: value})


@pytest.mark.parametrize("value", ["0.9", None, True, [0.9]])
def test_argument_of_a_wrong_type_is_named(value):
    with pytest.raises(TypeError, match="`b1`"):
        optax_cl.scale_by_decoupled_adam(b1=value)


@pytest.mark.parametrize("value", [jnp.int32, "foo", 0.9, jnp.ones(())])
def test_a_dtype_in_which_a_mean_has_no_fractions_is_refused(value):
    for make in (optax_cl.decoupled_adamw, optax_cl.scale_by_decoupled_amsgrad):
        with pytest.raises(TypeError, match="`mu_dtype` must be a floating-point"):
            make(0.1, mu_dtype=value)
    optax_cl.scale_by_decoupled_adam(mu_dtype="bfloat16").init(jnp.ones(3))


def test_a_decay_that_bfloat16_rounds_to_one_is_refused():
    params = jnp.ones(3, jnp.bfloat16)
    make = optax.inject_hyperparams(optax_cl.decoupled_adamw)
    with pytest.raises(ValueError, match=r"`b2`.*hyperparam_dtype"):
        make(0.1).init(params)
    wide = optax.inject_hyperparams(
        optax_cl.decoupled_adamw, hyperparam_dtype=jnp.float32
    )
    tx = wide(0.1)
    updates, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_allclose(updates.astype(jnp.float32), -0.1, rtol=1e-2)


def test_hyper_parameters_can_be_traced():
    grads = normal(0, 5, 4)

    def final(b2):
        return run(optax_cl.chain(optax_cl.scale_by_decoupled_adam(b2=b2)), grads)[0][
            -1
        ]

    batched = jax.vmap(final)(jnp.array([0.9, 0.99]))
    np.testing.assert_allclose(batched[0], final(0.9), rtol=1e-6)
    np.testing.assert_allclose(batched[1], final(0.99), rtol=1e-6)
