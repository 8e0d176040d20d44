"""The implicit step against its closed form, and where the explicit one diverges."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_cl.penalties import ewc, ewc_loss, ewc_proximal

RNG = np.random.default_rng(0)


def draw(low=-1.0, high=1.0):
    return jnp.asarray(RNG.uniform(low, high, 6), jnp.float32)


TASKS = [(draw(0.0, 3.0), draw()) for _ in range(3)]
HERE, UPDATES = draw(), draw()
VARIANTS = {
    "merged": {},
    "separate": {"anchors": "separate", "capacity": 3},
    "overflown": {"anchors": "separate", "capacity": 2, "overflow": "merge"},
}


def memory_of(tx, finish_task, history=TASKS):
    state = tx.init(history[0][1])
    for importance, solution in history:
        state = finish_task(state, solution, importance)
    return state


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_step_is_the_closed_form(variant, finish_task):
    eta, strength = 0.3, 2.0
    tx = ewc_proximal(eta, strength, **VARIANTS[variant])
    state = memory_of(tx, finish_task)
    s0 = sum(np.float64(f) for f, _ in TASKS)
    s1 = sum(np.float64(f) * np.float64(a) for f, a in TASKS)
    start = np.float64(HERE)
    expected = (start + UPDATES + eta * strength * s1) / (1 + eta * strength * s0)
    got, _ = tx.update(UPDATES, state, HERE)
    np.testing.assert_allclose(got, expected - start, rtol=1e-4, atol=1e-6)


def test_the_step_minimises_the_proximal_objective(finish_task):
    eta = 0.3
    tx = ewc_proximal(eta, 2.0, accumulate="decay", decay=0.5, anchors="latest")
    state = memory_of(tx, finish_task)

    def objective(params):
        distance = jnp.sum((params - HERE - UPDATES) ** 2)
        return distance / (2 * eta) + ewc_loss(state, params)

    updates, _ = tx.update(UPDATES, state, HERE)
    gradient = jax.grad(objective)(HERE + updates)
    np.testing.assert_allclose(gradient, np.zeros(6), atol=1e-5)


def test_small_steps_are_those_of_the_explicit_penalty(finish_task):
    errors = []
    for eta in (1e-1, 1e-2, 1e-3):
        implicit = optax.chain(optax.sgd(eta), ewc_proximal(eta, 2.0))
        explicit = optax.chain(ewc(2.0), optax.sgd(eta))
        steps = [
            tx.update(UPDATES, memory_of(tx, finish_task), HERE)[0] / eta
            for tx in (implicit, explicit)
        ]
        errors.append(np.abs(steps[0] - steps[1]).max())
    # The difference is of the order of the learning rate.
    assert errors[1] < errors[0] / 4
    assert errors[2] == pytest.approx(errors[1] / 10, rel=0.2)


def test_it_converges_where_the_explicit_step_diverges(finish_task):
    # Learning rate x strength x importance is 4: each explicit step times minus 3.
    sizes = {}
    for name, tx in {
        "explicit": optax.chain(ewc(1.0), optax.sgd(1.0)),
        "implicit": optax.chain(optax.sgd(1.0), ewc_proximal(1.0, 1.0)),
    }.items():
        params = jnp.zeros(1)
        state = finish_task(tx.init(params), params, jnp.array([4.0]))
        params += 1.0
        for _ in range(10):
            updates, state = tx.update(jnp.zeros(1), state, params)
            params = optax.apply_updates(params, updates)
        sizes[name] = abs(float(params[0]))
    assert sizes["explicit"] == pytest.approx(3**10, rel=1e-4)
    assert sizes["implicit"] == pytest.approx(5**-10, rel=1e-2)


@pytest.mark.parametrize("strength", [1e3, 1e10, 1e20])
def test_a_huge_strength_ends_at_the_anchor_and_stays_finite(strength, finish_task):
    tx = optax.chain(optax.sgd(0.1), ewc_proximal(0.1, strength))
    anchor = TASKS[0][1]
    state = memory_of(tx, finish_task, [(draw(1.0, 3.0), anchor)])
    updates, _ = tx.update(UPDATES, state, HERE)
    np.testing.assert_allclose(HERE + updates, anchor, atol=0.03)


@pytest.mark.parametrize("rate", [1.0, 0.0])
def test_a_strength_beyond_float32_ends_at_the_anchor_where_anything_matters(
    rate, finish_task
):
    # 1e38 times an importance of 1e9 has no float32.
    tx = optax.chain(optax.sgd(rate), ewc_proximal(rate, 1e38))
    params = jnp.ones(2)
    state = finish_task(tx.init(params), params, jnp.array([1e9, 0.0]))
    updates, _ = tx.update(jnp.full(2, 0.5), state, params + 1.0)
    expected = [-1.0, -0.5] if rate else [0.0, 0.0]
    np.testing.assert_allclose(updates, expected, rtol=1e-6)


def test_both_steps_end_at_the_minimum_of_the_penalised_loss(finish_task):
    h, target = draw(0.5, 2.0), draw()
    ends = []
    for tx in (
        optax.chain(ewc(1.0), optax.sgd(0.05)),
        optax.chain(optax.sgd(0.05), ewc_proximal(0.05, 1.0)),
    ):

        def step(carry, _, tx=tx):
            params, state = carry
            updates, state = tx.update(h * (params - target), state, params)
            return (optax.apply_updates(params, updates), state), None

        start = (HERE, memory_of(tx, finish_task))
        ends.append(jax.lax.scan(step, start, length=400)[0][0])
    np.testing.assert_allclose(*ends, rtol=1e-4, atol=1e-5)


def test_updates_pass_bit_for_bit_before_the_first_task_and_at_zero(finish_task):
    tx = ewc_proximal(0.1, 1e9)
    chex.assert_trees_all_equal(tx.update(UPDATES, tx.init(HERE), HERE)[0], UPDATES)
    for eta, strength in ((0.1, 0.0), (0.0, 1.0)):
        tx = ewc_proximal(eta, strength)
        state = memory_of(tx, finish_task)
        chex.assert_trees_all_equal(tx.update(UPDATES, state, HERE)[0], UPDATES)


def test_the_learning_rate_may_be_a_schedule(finish_task):
    schedule = optax.linear_schedule(0.0, 0.2, 2)
    tx = ewc_proximal(schedule, 2.0)
    state = memory_of(tx, finish_task)
    for eta in (0.0, 0.1, 0.2):
        constant = ewc_proximal(eta, 2.0)
        expected, _ = constant.update(UPDATES, memory_of(constant, finish_task), HERE)
        updates, state = tx.update(UPDATES, state, HERE)
        np.testing.assert_allclose(updates, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": -0.1}, "`learning_rate`"),
        ({"strength": float("inf")}, "`strength`"),
        ({"anchors": "none"}, "`anchors`"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ewc_proximal(**{"learning_rate": 0.1, "strength": 1.0, **arguments})


def test_parameters_are_required():
    tx = ewc_proximal(0.1, 1.0)
    with pytest.raises(ValueError, match="`ewc_proximal` reads the parameters"):
        tx.update(HERE, tx.init(HERE))
