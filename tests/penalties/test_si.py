"""SI against float64 NumPy: credit along the path, importance, clamps, pull."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_cl
from optax_cl.penalties import si, si_loss
from tests.penalties.quadratics import (
    NOISE,
    NOTHING,
    START,
    TASKS,
    as_arrays,
    end_task,
    find,
    freeze,
    gradient,
    largest_difference,
    moved_by,
    train,
    weighted,
)


def oracle(history, damping=1e-3, clamp="increment"):
    """Importances in float64, from gradients and parameters as they were."""
    omega = {}
    for k, x in START.items():
        dtype = history[0][0][1][k].dtype
        total, start = np.zeros(x.shape), np.float64(jnp.array(x, dtype))
        for steps in history:
            credit = np.zeros(x.shape)
            for grads, old, new in steps:
                change = np.float64(new[k]) - np.float64(old[k])
                credit -= np.where(change == 0, 0, np.float64(grads[k])) * change
            end = np.float64(steps[-1][2][k])
            share = credit / ((end - start) ** 2 + damping)
            if clamp == "increment":
                total = total + np.maximum(share, 0)
            elif clamp == "cumulative":
                total = np.maximum(total + share, 0)
            else:
                total = total + share
            start = end
        omega[k] = total
    return omega


def assert_importance(state, expected, rtol=1e-4):
    for k, x in expected.items():
        scale = np.abs(x).max()
        np.testing.assert_allclose(
            state.memory.importance[k], x, rtol=rtol, atol=rtol * scale, err_msg=k
        )


# --- The path ------------------------------------------------------------------------


@pytest.mark.parametrize("clamp", ["increment", "cumulative", "none"])
def test_three_tasks_are_the_hand_written_loop(clamp):
    strength, damping, rate = 0.3, 0.02, 0.05
    theta, omega, anchor = START, *({k: 0 * v for k, v in START.items()},) * 2
    for task in range(3):
        credit, start = {k: 0 * v for k, v in START.items()}, theta
        for step in range(len(NOISE[task])):
            (h, m), n = TASKS[task], NOISE[task][step]
            new = {}
            for k, x in theta.items():
                g = h[k] * (x - m[k]) + n[k]
                pull = 2 * strength * omega[k] * (x - anchor[k])
                new[k] = x - rate * (g + pull)
                credit[k] = credit[k] - g * (new[k] - x)
            theta = new
        for k, x in theta.items():
            share = credit[k] / ((x - start[k]) ** 2 + damping)
            if clamp == "increment":
                share = np.maximum(share, 0)
            omega[k] = omega[k] + share
            if clamp == "cumulative":
                omega[k] = np.maximum(omega[k], 0)
        anchor = theta
    with jax.enable_x64(True):
        tx = weighted(strength, damping=damping, clamp=clamp)
        state, params, _ = train(tx, dtype=jnp.float64)
        chex.assert_trees_all_close(params, theta, rtol=1e-9)
        chex.assert_trees_all_close(state.memory.importance, omega, rtol=1e-9)
        chex.assert_trees_all_close(state.memory.anchor, theta, rtol=1e-9)
        assert state.memory.importance["a"].dtype == jnp.float64


def adam(*links):
    return optax_cl.chain(
        *links,
        optax_cl.scale_by_decoupled_adam(),
        optax.add_decayed_weights(0.2),
        optax.scale_by_learning_rate(0.05),
    )


BEHIND = {
    "sgd": lambda: weighted(),
    "momentum": lambda: optax_cl.chain(si(0.3), optax.sgd(0.02, 0.9, nesterov=True)),
    "adam and decay": lambda: adam(si(0.3)),
    "another clip of the step": lambda: optax.chain(weighted(), optax.clip(0.01)),
    "a mask outside": lambda: optax.chain(weighted(), freeze("b")),
    "a clip before": lambda: adam(optax.clip(0.3), si(0.3)),
    "after the moments": lambda: optax_cl.decoupled_adamw(0.05, post=[si(0.3)]),
    "a modifier": lambda: optax_cl.decoupled_adamw(0.05, modifiers=[si(0.3)]),
    "without a capture": lambda: optax.chain(si(0.3), optax.adam(0.05)),
    "partition": lambda: optax.partition(
        {"x": weighted(), "y": adam(si(0.3))}, {"a": "x", "b": "x"}
    ),
}


@pytest.mark.parametrize("name", BEHIND)
def test_the_change_that_counts_is_the_one_that_was_made(name):
    state, _, history = train(BEHIND[name]())
    assert_importance(state, oracle(history))
    assert state.memory.tasks == 3


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_is_done_to_the_parameters_after_the_step_counts(dtype):
    # A box, as a retraction would be: no transformation sees it.
    def box(params):
        return jax.tree.map(lambda p: jnp.clip(p, -0.4, 0.4).astype(dtype), params)

    state, _, history = train(weighted(), dtype=dtype, change=box)
    assert_importance(state, oracle(history))
    emitted = [
        [(g, p, jax.tree.map(lambda p, g: p - 0.05 * g, p, g)) for g, p, _ in steps]
        for steps in history
    ]
    assert largest_difference(oracle(emitted), oracle(history)) > 0.2


def test_steps_that_bfloat16_rounds_away_earn_nothing():
    tx = optax_cl.chain(si(1.0), optax.sgd(1e-4))
    params = {"a": jnp.full((3, 2), 2.0, jnp.bfloat16)}
    grads, state = {"a": jnp.ones((3, 2), jnp.bfloat16)}, tx.init(params)
    for _ in range(20):
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert np.all(updates["a"] != 0) and np.all(params["a"] == 2.0)
    state = end_task(state, params)[0]
    np.testing.assert_array_equal(state.memory.importance["a"], 0)
    kinds = {state.path["a"].dtype, state.gradient["a"].dtype}
    kinds |= {state.memory.importance["a"].dtype, state.memory.anchor["a"].dtype}
    assert kinds == {jnp.dtype(jnp.float32)}
    assert state.before["a"].dtype == jnp.bfloat16


def test_changes_of_bfloat16_parameters_are_differences_in_float32():
    # In bfloat16 the difference is 1.
    tx, end = si(1.0, damping=1.0), jnp.full([1], 2.0**-9, jnp.bfloat16)
    start = jnp.ones(1, jnp.bfloat16)
    _, state = tx.update(start, tx.init(start), start)
    state = end_task(state, end)
    change = 1 - 2.0**-9
    expected = change / (change**2 + 1)
    assert float(state.memory.importance[0]) == pytest.approx(expected, rel=1e-5)


def test_a_step_that_was_skipped_earns_nothing():
    tx = optax.apply_if_finite(weighted(), 3)
    state, _, history = train(tx, spoil=(0, 2, 5))
    assert_importance(state, oracle(history))


def test_inside_multi_steps_gradient_and_change_are_of_one_update():
    tx = optax_cl.multi_steps(weighted(), 2)
    state, _, history = train(tx)
    joined = []
    for steps in history:
        joined.append([])
        for (g, old, _), (h, _, new) in zip(steps[::2], steps[1::2], strict=True):
            mean = jax.tree.map(lambda x, y: (x + y) / 2, g, h)
            joined[-1].append((mean, old, new))
    assert_importance(state, oracle(joined))


def test_the_raw_gradient_counts_not_that_of_the_penalised_loss():
    strength = 2.0
    state, _, history = train(weighted(strength), tasks=2)
    expected = oracle(history)
    assert_importance(state, expected)
    first = oracle(history[:1])
    anchor = history[0][-1][2]
    penalised = [
        (
            {k: g[k] + 2 * strength * first[k] * (old[k] - anchor[k]) for k in g},
            old,
            new,
        )
        for g, old, new in history[1]
    ]
    assert largest_difference(oracle([history[0], penalised]), expected) > 0.1


def test_in_a_capture_the_place_does_not_matter_and_other_penalties_do_not_count():
    def importance_of(*links):
        tx = optax_cl.chain(*links, optax.sgd(0.05))
        return train(tx, tasks=2)[0].memory.importance

    # Pulls commute; the raw gradient is the same in both places.
    pull = optax.add_decayed_weights(0.5)
    chex.assert_trees_all_close(
        importance_of(si(0.3), pull), importance_of(pull, si(0.3)), rtol=1e-4
    )


# --- What the credit means -----------------------------------------------------------


def parabola(rate, *, h=2.0, start=3.0, damping=1e-3, flow=8.0, **kwargs):
    """Full-batch descent on h theta^2 / 2; the state at the end, and where."""
    tx = optax_cl.chain(si(1.0, damping=damping, **kwargs), optax.sgd(rate))

    @jax.jit
    def run(params, state):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(h * params, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), length=round(flow / rate))[0]

    params = jnp.array([start])
    params, state = run(params, tx.init(params))
    return end_task(state, params)[0], params


@pytest.mark.parametrize(
    ("rate", "credit"), [(0.1, 10.0), (0.01, 9.0909), (0.001, 9.0090)]
)
def test_credits_of_full_batch_descent_tend_to_the_decrease_of_the_loss(rate, credit):
    # 9 is the decrease; a step of size eta overcounts by 1 / (1 - eta h / 2).
    state, params = parabola(rate, damping=0.5)
    total = state.memory.importance * ((params - 3.0) ** 2 + 0.5)
    assert float(total[0]) == pytest.approx(credit, rel=1e-4)


@pytest.mark.parametrize(("h", "start"), [(2.0, 3.0), (0.5, -2.0)])
def test_a_converged_quadratic_has_half_its_curvature(h, start):
    damped, _ = parabola(0.001, h=h, start=start, damping=0.1, flow=20.0)
    expected = h * start**2 / 2 / (start**2 + 0.1)
    assert float(damped.memory.importance[0]) == pytest.approx(expected, rel=2e-3)
    small, params = parabola(0.001, h=h, start=start, damping=1e-6, flow=20.0)
    assert float(small.memory.importance[0]) == pytest.approx(h / 2, rel=2e-3)
    # Strength 1 then is the old loss.
    there = params + 0.7
    assert float(si_loss(small, there)) == pytest.approx(h * 0.7**2 / 2, rel=2e-3)


def test_descent_without_a_penalty_earns_the_rate_times_the_squared_gradient():
    tx, params = weighted(), as_arrays(START)
    state = tx.init(params)
    grads = gradient(params, 0, 0)
    for _ in range(2):
        updates, state = tx.update(grads, state, params)
        old, params = params, optax.apply_updates(params, updates)
        del old
    for k, g in grads.items():
        path = np.array(find(state).path[k])
        np.testing.assert_allclose(path, 0.05 * np.float64(g) ** 2, rtol=1e-3)
        assert np.all(path >= 0)  # the minus sign is in it


def test_an_empty_task_leaves_the_importance_and_moves_the_anchor():
    state, params, _ = train(weighted(), tasks=1)
    elsewhere = jax.tree.map(lambda p: p + 0.5, params)
    for there in (params, elsewhere):
        new = optax_cl.end_task(state, there, NOTHING)
        chex.assert_trees_all_equal(new.memory.importance, state.memory.importance)
        chex.assert_trees_all_equal(new.memory.anchor, there)


def test_a_parameter_that_did_not_move_has_no_importance():
    state, _, _ = train(optax.chain(weighted(), freeze("b")), tasks=2)
    np.testing.assert_array_equal(state.memory.importance["b"], 0)
    assert np.all(state.memory.importance["a"].max() > 0)


# --- Clamps --------------------------------------------------------------------------


def credited(clamp, credits, distance=0.5, damping=0.25):
    """Importance after tasks in which one step earns what is asked for."""
    tx = si(1.0, damping=damping, clamp=clamp)
    params = jnp.zeros(1)
    state, found = tx.init(params), []
    for credit in credits:
        grads = jnp.array([-credit / distance])
        _, state = tx.update(grads, state, params)
        params = params + distance
        state = end_task(state, params)
        found.append(float(state.memory.importance[0]))
    return found


def test_clamps_differ_in_what_a_negative_credit_takes_away():
    credits = [1.0, -0.4, -2.0, 0.5]  # over .5 each
    expected = {
        "increment": [2.0, 2.0, 2.0, 3.0],
        "cumulative": [2.0, 1.2, 0.0, 1.0],
        "none": [2.0, 1.2, -2.8, -1.8],
    }
    for clamp, values in expected.items():
        assert credited(clamp, credits) == pytest.approx(values, rel=1e-5), clamp


@pytest.mark.parametrize("clamp", ["increment", "cumulative"])
def test_clamped_importances_are_never_negative(clamp):
    def drift(params):  # uphill for some
        return moved_by(params, 0.2)

    state, _, history = train(weighted(clamp=clamp), change=drift)
    assert_importance(state, oracle(history, clamp=clamp))
    assert all(np.all(x >= 0) for x in state.memory.importance.values())
    signed = oracle(history, clamp="none")
    assert min(x.min() for x in signed.values()) < 0  # there was something to clamp


def test_damping_is_added_to_the_squared_distance():
    assert credited("none", [1.0], distance=0.5, damping=0.75) == [1.0]
    assert credited("none", [1.0], distance=2.0, damping=1.0)[0] == pytest.approx(0.2)


# --- The penalty ---------------------------------------------------------------------


def test_the_penalty_has_no_factor_one_half():
    state, params, history = train(weighted(0.3), tasks=2)
    here = jax.tree.map(lambda p: p + 0.3, params)
    expected = sum(
        0.3 * np.sum(x * (np.float64(here[k]) - np.float64(params[k])) ** 2)
        for k, x in oracle(history).items()
    )
    assert float(si_loss(state, here)) == pytest.approx(expected, rel=1e-4)


def test_what_is_added_is_the_gradient_of_the_value():
    tx = si(0.3)
    state, params, _ = train(weighted(0.3), tasks=2)
    here = jax.tree.map(lambda p: p - 0.2, params)
    added, _ = tx.update(optax.tree.zeros_like(here), state, here)
    expected = jax.grad(si_loss, argnums=1)(state, here)
    chex.assert_trees_all_close(added, expected, rtol=1e-5, atol=1e-6)
    at_anchor, _ = tx.update(optax.tree.zeros_like(here), state, params)
    chex.assert_trees_all_equal(at_anchor, optax.tree.zeros_like(here))


def test_strength_zero_is_the_optimizer_alone():
    alone = optax.chain(optax_cl.scale_by_decoupled_adam(), optax.scale(-0.05))
    plain, other = optax_cl.chain(alone), optax_cl.chain(si(0.0), alone)
    params = as_arrays(START)
    states = [plain.init(params), other.init(params)]
    for task in range(2):
        for step in range(3):
            grads = gradient(params, task, step)
            expected, states[0] = plain.update(grads, states[0], params)
            updates, states[1] = other.update(grads, states[1], params)
            chex.assert_trees_all_equal(updates, expected)
            params = optax.apply_updates(params, updates)
        states[1] = end_task(states[1], params)
    assert find(states[1]).memory.importance["b"].max() > 0


def test_updates_pass_unchanged_before_the_first_boundary():
    tx, params = si(100.0), as_arrays(START)
    grads, state = gradient(params, 0, 0), tx.init(params)
    for by in (0.0, 0.4):
        here = jax.tree.map(lambda p, by=by: p + by, params)
        updates, state = tx.update(grads, state, here)
        chex.assert_trees_all_equal(updates, grads)
