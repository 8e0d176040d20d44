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
        g = jax.tree.map(lambda x, i=i: np.asarray(x)[i], grads)
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
    drawn = np.random.default_rng(0).normal(size=(2, 5, 6))
    grads = np.complex64(drawn[0] + 1j * drawn[1])
    for pair in steps_in_one_jit(
        optax_cl.chain(ours()), theirs(), grads, np.zeros_like(grads[0])
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


KEEP = np.float32(1 - STRENGTHS)
modifier = optax.stateless(lambda g, _: g * KEEP)


@functools.partial(jax.jit, static_argnums=0)
def moved(links, grads):
    """The sum of all updates over a stream, for each of some chains."""
    return {name: run(optax_cl.chain(*tx), grads)[0].sum(0) for name, tx in links}


def drawn(steps, mean=0.2):
    return np.asarray(normal(0, steps, 8)) + np.float32(mean)


@pytest.fixture(scope="module")
def displacement():
    """Sum of all updates on eight coordinates, each with a strength of its own."""
    adam = optax_cl.scale_by_decoupled_adam
    found = moved(
        (
            ("vanilla", (adam(),)),
            ("shared", (modifier, adam(second_moment="routed"))),
            ("optax", (modifier, optax.scale_by_adam())),
            ("max", (modifier, adam())),
            ("raw", (modifier, adam(second_moment="raw"))),
            (
                "denominator",
                (modifier, adam(first_moment="raw", second_moment="routed")),
            ),
            ("post", (adam(), modifier)),
        ),
        drawn(400),
    )
    return jax.tree.map(np.float64, found)


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


@pytest.mark.parametrize("kind", ["nadam", "amsgrad"])
def test_amsgrad_and_nadam_route_alike(kind):
    link, plain = (make() for make in PAIRS[kind])
    links = (
        ("ours", (modifier, link)),
        ("shared", (modifier, plain)),
        ("vanilla", (plain,)),
    )
    found = jax.tree.map(np.asarray, moved(links, drawn(50)))
    np.testing.assert_allclose(found["ours"] / found["vanilla"], KEEP, rtol=1e-5)
    np.testing.assert_allclose(found["shared"] / found["vanilla"], 1.0, rtol=1e-5)


def test_nesterov_look_ahead_reads_the_routed_gradient():
    # With the raw gradient in the look-ahead term, the first step would not be 0.1.
    tx = optax_cl.chain(
        optax.scale(0.1), optax_cl.scale_by_decoupled_adam(nesterov=True)
    )
    plain = optax.scale_by_adam(nesterov=True)
    g = np.float32([1.0, -3.0])
    found, expected = jax.jit(
        lambda g: [link.update(g, link.init(g))[0] for link in (tx, plain)]
    )(g)
    np.testing.assert_allclose(found, 0.1 * np.asarray(expected), rtol=1e-5)


# Optimizers that have nothing to route


def test_momentum_sgd_has_nothing_to_repair():
    trace = optax.trace(0.9)
    links = (
        ("plain", (trace,)),
        ("before", (modifier, trace)),
        ("after", (trace, modifier)),
    )
    found = jax.tree.map(np.asarray, moved(links, drawn(50, mean=0.0)))
    np.testing.assert_allclose(found["before"] / found["plain"], KEEP, rtol=1e-4)
    np.testing.assert_allclose(found["after"] / found["plain"], KEEP, rtol=1e-6)


def test_lion_cancels_a_modifier_and_only_post_attenuates():
    grads, lion = drawn(50, mean=0.0), optax.scale_by_lion()
    plain, before, after = jax.jit(
        lambda g: [
            run(optax_cl.chain(*links), g)[0]
            for links in ((lion,), (modifier, lion), (lion, modifier))
        ]
    )(grads)
    np.testing.assert_array_equal(before, plain)
    np.testing.assert_allclose(after, np.asarray(plain) * KEEP, rtol=1e-6)


# Safety of the second moment


def protected_adam(rank, second_moment, strength, kind="adam"):
    return optax_cl.protect(
        rank,
        optax_cl.attenuate(strength),
        PAIRS[kind][0](second_moment=second_moment),
    )


@functools.cache
def longest_steps(kind):
    """Of Optax's own optimizer, and of protected ones by their second moment."""

    def longest(tx, grads, state=None):
        return jnp.abs(run(tx, grads, state=state)[0]).max()

    @jax.jit
    def all_three(grads, basis):
        found = {"plain": longest(PAIRS[kind][1](), grads)}
        for second_moment in ("raw", "max"):
            tx = protected_adam(4, second_moment, 0.5, kind)
            state = install(tx.init(grads[0]), basis=basis)
            found[second_moment] = longest(tx, grads, state)
        return found

    return all_three


def first_coordinate_times(factor, seed):
    grads = np.array(normal(seed, 100, 16, 1))
    grads[:, 0] *= factor
    return grads


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", PAIRS)
def test_dead_coordinate_is_bounded_by_max_and_unbounded_by_raw(kind, seed):
    grads = first_coordinate_times(0.0, seed)
    longest = longest_steps(kind)(grads, orthonormal(seed, 16, 4))
    # The look-ahead of NAdam lengthens plain steps, too.
    assert longest["plain"] < (2.0 if kind == "nadam" else 1.5)
    assert longest["raw"] > 1e3
    assert longest["max"] < 1.1 * longest["plain"]


def test_nearly_dead_coordinate_shows_the_same():
    grads = first_coordinate_times(1e-3, seed=0)
    longest = longest_steps("adam")(grads, orthonormal(0, 16, 4))
    assert longest["raw"] > 10 > 1.5 > longest["max"]


@pytest.mark.parametrize(
    ("second_moment", "step"), [("routed", 1.0), ("raw", 11.0), ("max", 1.0)]
)
def test_price_of_max_for_an_additive_penalty(second_moment, step):
    # Raw gradient 1e-2, a penalty ten times as large: "raw" lets all of it through.
    penalty = optax.stateless(lambda g, _: g + 0.1)
    tx = optax_cl.chain(
        penalty, optax_cl.scale_by_decoupled_adam(second_moment=second_moment)
    )
    updates, _ = run(tx, np.full((50, 1), 1e-2, np.float32))
    np.testing.assert_allclose(updates, step, rtol=2e-5)


def test_max_equals_raw_where_a_modifier_only_attenuates():
    grads = drawn(30, mean=0.0)
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
    params = {"w": np.zeros((2, 3), jnp.bfloat16), "b": np.zeros(3, np.float32)}
    tx = optax_cl.scale_by_decoupled_adam(mu_dtype=jnp.float32)
    state = tx.init(params)
    theirs = optax.scale_by_adam(mu_dtype=jnp.float32).init(params)
    assert_bits(jax.tree.leaves(state), jax.tree.leaves(theirs))
    _, after = jax.jit(tx.update)(params, state, raw_updates=params)
    assert_bits(jax.tree.map(np.zeros_like, after), state)


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
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    np.testing.assert_allclose(np.float32(updates), -0.1, rtol=1e-2)


def test_hyper_parameters_can_be_traced():
    grads = normal(0, 5, 4)

    def final(b2):
        return run(optax_cl.chain(optax_cl.scale_by_decoupled_adam(b2=b2)), grads)[0]

    batched = jax.jit(jax.vmap(final))(np.float32([0.9, 0.99]))
    for found, b2 in zip(np.asarray(batched), (0.9, 0.99), strict=True):
        np.testing.assert_allclose(found[-1], np.asarray(final(b2))[-1], rtol=1e-6)
