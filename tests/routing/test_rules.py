"""Strengths and coefficient rules: their gates, bounds and equilibria."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import optax_cl
from optax_cl.routing import Context
from tests.arrays import normal, orthonormal
from tests.routing.helpers import install, run

SEEDS = st.integers(0, 2**31 - 1)
SHAPE = (3, 4)


def context(raw=None, **fields):
    empty = dict.fromkeys(("displacement", "curvature", "mean", "overlap"))
    return Context(raw=raw, **(empty | fields))


def drawn(seed):
    """Coefficients, displacement, curvature and mean of one leaf."""
    c, d, curvature, mean = np.asarray(normal(seed, 4, *SHAPE))
    return c, d, np.abs(curvature), mean


@jax.jit
def balanced(c, d, curvature, mean, kappa=1.0):
    fields = {"displacement": d, "curvature": curvature, "mean": mean}
    return optax_cl.balance(kappa).apply(c, context(c, **fields), ())[0]


@jax.jit
def sprung(c, d, curvature, kappa=1.0):
    fields = {"displacement": d, "curvature": curvature}
    return optax_cl.spring(kappa).apply(c, context(c, **fields), ())[0]


@jax.jit
def fully_ratcheted(c, d, raw):
    rule = optax_cl.ratchet(1.0)
    return rule.apply(c, context(raw, displacement=d), ())[0]


# balance


@given(SEEDS)
def test_balance_takes_nothing_at_the_anchor(seed):
    c, d, curvature, mean = drawn(seed)
    np.testing.assert_array_equal(balanced(c, 0 * d, curvature, mean), c)


@given(SEEDS)
def test_balance_takes_nothing_when_the_mean_pulls_back(seed):
    c, d, curvature, mean = drawn(seed)
    mean = np.abs(mean) * np.sign(d)
    np.testing.assert_array_equal(balanced(c, d, curvature, mean), c)


@given(SEEDS, st.floats(0, 2.0**100, width=32))
def test_balance_only_attenuates(seed, kappa):
    c, d, curvature, mean = drawn(seed)
    a = 1 - np.asarray(balanced(c, d, curvature, mean, kappa)) / np.asarray(c)
    assert np.all(a >= 0) and np.all(a <= 1)


@given(SEEDS)
def test_balance_against_its_formula(seed):
    arrays = drawn(seed)
    c, d, curvature, mean = (np.asarray(x, np.float64) for x in arrays)
    a = np.clip(2 * curvature * np.abs(d) / np.abs(mean), 0, 1) * (mean * d < 0)
    np.testing.assert_allclose(
        balanced(*arrays, 2.0), (1 - a) * c, rtol=1e-5, atol=1e-6
    )


@given(SEEDS)
def test_a_heavy_balance_is_a_full_ratchet_on_the_mean(seed):
    c, d, curvature, mean = drawn(seed)
    for kappa in (1e20, jnp.inf):
        np.testing.assert_array_equal(
            balanced(c, d, curvature, mean, kappa), fully_ratcheted(c, d, mean)
        )


@given(SEEDS)
def test_spring_equals_balance_inside_the_clip(seed):
    c, d, curvature, _ = drawn(seed)
    pushes_away = c * d < 0
    inside = pushes_away & (curvature * np.abs(d) < np.abs(c))
    hypothesis.assume(np.any(inside))
    a, b = sprung(c, d, curvature), balanced(c, d, curvature, c)
    np.testing.assert_allclose(
        np.asarray(a)[inside], np.asarray(b)[inside], rtol=1e-4, atol=1e-6
    )


def test_spring_adds_the_pull_and_can_reverse():
    c, d, curvature = np.float32([[1.0], [-3.0], [2.0]])
    np.testing.assert_array_equal(sprung(c, d, curvature), [-5.0])
    np.testing.assert_array_equal(balanced(c, d, curvature, c), [0.0])


def test_zero_mean_gives_no_nan():
    zero = np.zeros(3, np.float32)
    result = balanced(zero, np.float32([-1.0, 0.0, 1.0]), zero + 1, zero)
    np.testing.assert_array_equal(result, 0.0)


# Where a step stops: one weight, two parabolas


def resting_place(rule, start=0.2):
    """Where SGD comes to rest: old minimum .2 (curvature 3), new 1 (curvature 1)."""
    tx = optax_cl.protect(
        1, optax_cl.attenuate(rule), optax.scale(-0.05), mean_decay=0.0
    )
    params = np.full((1, 1), start, np.float32)
    state = tx.init(params)
    one = np.ones((1, 1), np.float32)
    fields = {"basis": one, "anchor": np.float32(0.2) * one}
    if state.curvature is not None:
        fields["curvature"] = 3 * one
    fields = {k: v for k, v in fields.items() if getattr(state, k) is not None}
    state = install(state, **fields)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(params - 1.0, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, state), length=3000)
    return params.item()


JOINT = (3.0 * 0.2 + 1.0 * 1.0) / (3.0 + 1.0)


@pytest.mark.parametrize(
    ("rule", "place"),
    [
        (optax_cl.constant(0.0), 1.0),
        (optax_cl.constant(0.5), 1.0),
        (optax_cl.constant(0.9), 1.0),
        (optax_cl.ratchet(0.75), 1.0),
        (optax_cl.constant(1.0), 0.2),
        (optax_cl.balance(1.0), JOINT),
        (optax_cl.spring(1.0), JOINT),
    ],
)
def test_equilibrium(rule, place):
    np.testing.assert_allclose(resting_place(rule), place, atol=1e-4)


# Gates read the raw gradient


@pytest.mark.parametrize("rate", [None, -0.1, 0.1])
@pytest.mark.parametrize("name", ["ratchet", "balance"])
def test_gates_mean_the_same_on_both_sides_of_the_learning_rate(name, rate):
    rule = {"ratchet": optax_cl.ratchet(1.0), "balance": optax_cl.balance(1e6)}[name]
    links = [optax_cl.attenuate(rule)]
    if rate is not None:
        links = [optax.scale(rate), *links]
    tx = optax_cl.protect(2, *links)
    params = np.zeros((4, 3), np.float32)
    state = tx.init(params)
    basis = np.asarray(orthonormal(0, 4, 2))
    fields = {"basis": basis, "anchor": normal(1, 2, 3)}
    if name == "balance":
        fields["curvature"] = np.ones((2, 3), np.float32)
    state = install(state, **fields)
    g = np.asarray(normal(2, 4, 3))
    updates, _ = jax.jit(tx.update)(g, state, params)
    c = basis.T @ g
    away = c * -np.asarray(fields["anchor"]) < 0
    assert away.any() and not away.all()
    scale = 1.0 if rate is None else rate
    np.testing.assert_allclose(
        basis.T @ np.asarray(updates), scale * np.where(away, 0.0, c), atol=2e-6
    )


def test_mean_is_the_corrected_average_of_raw_coefficients():
    seen = {}

    def apply(coeffs, ctx, state):
        seen["mean"] = ctx.mean
        return coeffs, state

    rule = optax_cl.Rule(apply, frozenset({"mean"}))
    # A factor before the rule changes the coefficients, not what the average reads.
    tx = optax_cl.protect(2, optax.scale(7.0), optax_cl.attenuate(rule), mean_decay=0.8)
    basis = np.asarray(orthonormal(0, 4, 2))
    grads = np.asarray(normal(0, 3, 4, 3))
    state = install(tx.init(grads[0]), basis=basis)
    for g in grads:
        _, state = tx.update(g, state, g)
    weights = 0.2 * 0.8 ** np.array([2, 1, 0])
    expected = np.einsum("t,tio->io", weights, grads) / weights.sum()
    np.testing.assert_allclose(seen["mean"], basis.T @ expected, rtol=1e-5, atol=1e-6)


# Overlap strengths


def overlap_rule(rule, grads, basis):
    """Strength in force at each step, as the meter reads it; and the last state."""
    tx = optax_cl.protect(2, optax_cl.attenuate(rule), optax_cl.measure("strength"))
    state = install(tx.init(grads[0]), basis=basis)

    def step(state, g):
        _, state = tx.update(g, state, g)
        return state, optax.tree.get(state, "strength")

    state, strengths = jax.lax.scan(step, state, grads)
    return np.asarray(strengths), state


@pytest.fixture(scope="module")
def overlapping():
    grads, basis = np.asarray(normal(0, 50, 6, 3)), orthonormal(0, 6, 2)
    g = np.asarray(grads, np.float64)
    inside = np.einsum("ir,tio->tro", np.asarray(basis, np.float64), g)
    return grads, basis, (inside**2).sum((1, 2)) / (g**2).sum((1, 2))


@pytest.mark.parametrize("debias", [False, True])
@pytest.mark.parametrize("decay", [0.98, 0.99])
@pytest.mark.parametrize("name", ["one_minus", "proportional"])
def test_overlap_strength_against_its_formula(overlapping, name, decay, debias):
    grads, basis, overlap = overlapping
    rule = getattr(optax_cl, name)(0.6, decay, debias=debias)
    measured, _ = overlap_rule(rule, grads, basis)
    mean = 0.0
    for t, (s, a) in enumerate(zip(overlap, measured, strict=True), 1):
        mean = decay * mean + (1 - decay) * s
        used = mean / (1 - decay**t) if debias else mean
        expected = 0.6 * (1 - used if name == "one_minus" else used)
        np.testing.assert_allclose(a, expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("debias", [False, True])
def test_boundary_resets_the_averaged_overlap(overlapping, debias):
    grads, basis, _ = overlapping
    _, state = overlap_rule(optax_cl.one_minus(debias=debias), grads, basis)
    assert optax.tree.get(state, "mean_overlap") > 0.05
    task = optax_cl.classification(
        lambda w, b: b @ w, lambda b: jnp.zeros(b.shape[0], jnp.int32)
    )
    w = grads[0]
    stats = optax_cl.collect(
        state, w, [np.ones((2, 6), np.float32)], task=task, key=jax.random.key(0)
    )
    state = optax_cl.end_task(state, w, stats)
    assert optax.tree.get(state, "mean_overlap") == 0.0


def test_one_strength_for_all_leaves_or_one_for_each():
    # Leaf a lies in its basis, leaf b outside of it.
    eye = np.eye(4, dtype=np.float32)
    g = {"a": eye[:, [0, 0]], "b": eye[:, [3, 3]]}
    basis = {"a": eye[:, :1], "b": eye[:, :1]}

    def kept(per_leaf):
        rule = optax_cl.one_minus(1.0, decay=0.0, per_leaf=per_leaf)
        tx = optax_cl.protect(1, optax_cl.attenuate(rule))
        state = tx.init(g)._replace(basis=basis)
        return np.asarray(jax.jit(tx.update)(g, state, g)[0]["a"])[0, 0]

    np.testing.assert_allclose(kept(False), 0.5)  # mean overlap one half
    np.testing.assert_allclose(kept(True), 1.0)  # its own is one: no protection


# Strengths as numbers, schedules and mistakes


def test_schedule_counts_the_steps():
    grads = np.ones((4, 3, 2), np.float32)
    tx = optax_cl.protect(1, optax_cl.attenuate(lambda step: step / 4))
    state = install(tx.init(grads[0]), basis=np.eye(3, 1, dtype=np.float32))
    updates, _ = run(tx, grads, state=state)
    np.testing.assert_allclose(np.asarray(updates)[:, 0, 0], [1.0, 0.75, 0.5, 0.25])


BOUNDED = {
    "schedule": lambda a: optax_cl.constant(lambda step: a),
    "constant": optax_cl.constant,
    "ratchet": optax_cl.ratchet,
    "one_minus": lambda a: optax_cl.one_minus(a, 0.0),
    "proportional": lambda a: optax_cl.proportional(a, 0.0),
}


@pytest.mark.parametrize("name", BOUNDED)
def test_a_strength_that_is_not_known_never_reverses_or_enlarges(name):
    g = np.ones((3, 2), np.float32)

    def inside(strength):
        tx = optax_cl.protect(1, optax_cl.attenuate(BOUNDED[name](strength)))
        state = install(tx.init(g), basis=np.eye(3, 1, dtype=np.float32))
        return tx.update(g, state, -g)[0][0, 0]

    strengths = np.float32([-0.5, 0.0, 0.5, 1.0, 1.5])
    taken = 1 - np.asarray(jax.jit(jax.vmap(inside))(strengths))
    # The overlap is one third.
    share = {"one_minus": 2 / 3, "proportional": 1 / 3}.get(name, 1.0)
    expected = share * np.array([0.0, 0.0, 0.5, 1.0, 1.0])
    np.testing.assert_allclose(taken, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "kwargs"),
    [
        (optax_cl.constant, {"strength": 1.1}),
        (optax_cl.constant, {"strength": -0.1}),
        (optax_cl.ratchet, {"strength": 2.0}),
        (optax_cl.balance, {"kappa": -1.0}),
        (optax_cl.balance, {"kappa": float("inf")}),
        (optax_cl.spring, {"kappa": float("nan")}),
        (optax_cl.one_minus, {"a_max": 1.5}),
        (optax_cl.one_minus, {"decay": 1.0}),
        (optax_cl.proportional, {"a_max": -1.0}),
    ],
)
def test_bad_number_is_named(make, kwargs):
    (name,) = kwargs
    with pytest.raises(ValueError, match=f"`{name}`"):
        make(**kwargs)


def test_what_is_no_strength_is_refused():
    with pytest.raises(TypeError, match="`strength`"):
        optax_cl.attenuate("half")
    with pytest.raises(ValueError, match="`strength`"):
        optax_cl.attenuate(1.5)
    rule = optax_cl.Rule(lambda c, x, s: (c, s), frozenset({"weather"}))
    with pytest.raises(ValueError, match="weather"):
        optax_cl.attenuate(rule)
