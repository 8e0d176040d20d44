"""EWC against float64 NumPy: values, gradients, anchors, accumulation, placement."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_cl
from optax_cl.penalties import ewc, ewc_loss

RNG = np.random.default_rng(0)
SHAPES = {"a": (3, 2), "b": (4,)}


def draw(low=-1.0, high=1.0):
    return {k: np.float32(RNG.uniform(low, high, s)) for k, s in SHAPES.items()}


def zeros_like(tree):
    return jax.tree.map(np.zeros_like, tree)


# Compiled once for each variant.
value, slope = jax.jit(ewc_loss), jax.jit(jax.grad(ewc_loss, argnums=1))


TASKS = [(draw(0.0, 3.0), draw()) for _ in range(4)]  # importance, solution
HERE = draw()


def memory_of(tx, finish_task, history=TASKS, **kwargs):
    state = tx.init(history[0][1])
    for importance, solution in history:
        state = finish_task(state, solution, importance, **kwargs)
    return state


def pull(tx, state, params=HERE):
    return tx.update(optax.tree.zeros_like(params), state, params)[0]


def weighted_pull(weights, history=TASKS, params=HERE):
    """Oracle: ``sum_j w_j F_j (theta - theta_j)`` in float64."""
    return {
        k: sum(
            w * np.float64(f[k]) * (np.float64(params[k]) - np.float64(a[k]))
            for w, (f, a) in zip(weights, history, strict=True)
        )
        for k in params
    }


def assert_close(got, expected, rtol=1e-5, atol=1e-6):
    expected = jax.tree.map(np.float32, expected)
    chex.assert_trees_all_close(got, expected, rtol=rtol, atol=atol)


VARIANTS = {
    "merged": {},
    "separate": {"anchors": "separate", "capacity": 4},
    "overflown": {"anchors": "separate", "capacity": 2, "overflow": "merge"},
    "latest": {"anchors": "latest"},
    "decay": {"accumulate": "decay", "decay": 0.5},
    "separate decay": {
        "accumulate": "decay",
        "decay": 0.5,
        "anchors": "separate",
        "capacity": 4,
    },
    "online": {"accumulate": "decay", "decay": 0.5, "anchors": "latest"},
    "ema": {"accumulate": "ema", "decay": 0.5},
    "ema first": {"accumulate": "ema", "decay": 0.5, "ema_init": "first"},
    "ema debias": {"accumulate": "ema", "decay": 0.5, "ema_init": "debias"},
}
WEIGHTS = {
    "merged": [1, 1, 1, 1],
    "separate": [1, 1, 1, 1],
    "overflown": [1, 1, 1, 1],
    "decay": [1 / 16, 1 / 8, 1 / 4, 1 / 2],
    "separate decay": [1 / 16, 1 / 8, 1 / 4, 1 / 2],
    "ema": [1 / 16, 1 / 8, 1 / 4, 1 / 2],
    "ema first": [1 / 8, 1 / 8, 1 / 4, 1 / 2],
    "ema debias": [1 / 15, 2 / 15, 4 / 15, 8 / 15],
}


# --- Values and gradients ------------------------------------------------------------


@pytest.mark.parametrize("variant", WEIGHTS)
def test_adds_the_weighted_pulls_of_all_tasks(variant, finish_task):
    tx = ewc(3.0, **VARIANTS[variant])
    state = memory_of(tx, finish_task)
    expected = weighted_pull([3 * w for w in WEIGHTS[variant]])
    assert_close(pull(tx, state), expected)


@pytest.mark.parametrize("variant", WEIGHTS)
def test_the_value_is_half_the_sum_of_weighted_squares(variant, finish_task):
    state = memory_of(ewc(3.0, **VARIANTS[variant]), finish_task)
    expected = sum(
        1.5 * w * np.sum(np.float64(f[k]) * (np.float64(HERE[k] - a[k])) ** 2)
        for w, (f, a) in zip(WEIGHTS[variant], TASKS, strict=True)
        for k in f
    )
    assert float(value(state, HERE)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_added_is_the_gradient_of_the_value(variant, finish_task):
    tx = ewc(3.0, **VARIANTS[variant])
    state = memory_of(tx, finish_task)
    assert_close(pull(tx, state), slope(state, HERE))
    assert value(state, HERE) >= 0


def test_strength_carries_the_factor_one_half(finish_task):
    tx = ewc(5.0)
    params = np.zeros(2, np.float32)
    state = finish_task(tx.init(params), params, np.float32([4.0, 0.0]))
    moved = np.float32([0.1, 7.0])
    assert float(ewc_loss(state, moved)) == pytest.approx(0.5 * 5 * 4 * 0.01)
    np.testing.assert_allclose(pull(tx, state, moved), [5 * 4 * 0.1, 0.0], rtol=1e-6)


@pytest.mark.parametrize("variant", ["merged", "separate", "latest"])
def test_the_pull_is_exactly_zero_at_a_single_anchor(variant, finish_task):
    tx = ewc(1e6, **VARIANTS[variant])
    importance, solution = draw(0.0, 1e3), draw(1e3, 1e4)
    state = memory_of(tx, finish_task, [(importance, solution)])
    at_anchor = jax.jit(lambda s, p: pull(tx, s, p))(state, solution)
    chex.assert_trees_all_equal(at_anchor, zeros_like(solution))
    # Sums of F and F theta would leave rounding here, times the strength.
    s0 = np.float32(1 / 3) * importance["a"]
    s1 = np.float32(1 / 3) * (importance["a"] * solution["a"])
    assert np.abs(s0 * solution["a"] - s1).max() > 0


def test_fifty_close_anchors_merge_without_cancellation(finish_task):
    tx = ewc(1.0)
    history = [
        (np.float32(RNG.uniform(0, 1, 100)), np.float32(a))
        for a in 100 + 0.1 * RNG.normal(size=(50, 100))
    ]
    state = memory_of(tx, finish_task, history)
    params = history[-1][1]
    expected = sum(np.float64(f) * (np.float64(params) - np.float64(a))
                   for f, a in history)  # fmt: skip
    got = pull(tx, state, params)
    # One unit in the last place of an anchor near 100, times the total importance.
    np.testing.assert_allclose(got, expected, atol=25 * 7.7e-6 * 4)


def test_without_importance_the_anchor_is_the_latest_solution(finish_task):
    tx = ewc(1.0)
    params = np.float32([1.0, 2.0])
    state = finish_task(tx.init(params), params, np.float32([0.0, 1.0]))
    state = finish_task(state, params + 1, np.float32([0.0, 1.0]))
    np.testing.assert_allclose(state.memory.anchor, [2.0, 2.5])
    state = finish_task(state, params + 2, np.float32([1.0, 0.0]))
    np.testing.assert_allclose(state.memory.anchor, [3.0, 2.5])


def test_latest_differs_from_the_sum_by_the_distance_of_the_mean(finish_task):
    merged, latest = ewc(2.0), ewc(2.0, anchors="latest")
    both = [memory_of(tx, finish_task) for tx in (merged, latest)]
    got = jax.tree.map(np.subtract, pull(latest, both[1]), pull(merged, both[0]))
    last = TASKS[-1][1]
    # S1 - S0 theta_K, whatever the point at which the two are compared.
    expected = weighted_pull([-2] * 4, params=last)
    assert_close(got, expected)
    assert max(np.abs(x).max() for x in expected.values()) > 0.1


def test_two_quadratic_tasks_end_at_their_joint_minimum(finish_task):
    h1, h2 = np.float32([[4.0, 0.5, 1.0], [1.0, 2.0, 0.0]])
    a, b = np.float32([[1.0, -1.0, 2.0], [-2.0, 3.0, 5.0]])
    tx = optax.chain(ewc(1.0), optax.sgd(0.2))
    state = finish_task(tx.init(a), a, h1)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(h2 * (params - b), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (a, state), length=200)
    np.testing.assert_allclose(params, (h1 * a + h2 * b) / (h1 + h2), rtol=1e-5)


# --- Accumulation --------------------------------------------------------------------


def test_online_ewc_decays_at_accumulation_and_in_the_penalty(finish_task):
    gamma = 0.5
    tx = ewc(1.0, accumulate="decay", decay=gamma, anchors="latest")
    state = tx.init(HERE)
    total = zeros_like(HERE)
    for importance, solution in TASKS:
        state = finish_task(state, solution, importance)
        total = jax.tree.map(lambda s, f: gamma * s + f, total, importance)
        expected = jax.tree.map(
            lambda s, x, a: gamma * s * (x - a), total, HERE, solution
        )
        assert_close(pull(tx, state), expected)


@pytest.mark.parametrize("anchors", ["merged", "latest"])
def test_decay_of_one_is_the_sum(anchors, finish_task):
    plain = ewc(2.0, anchors=anchors)
    decay = ewc(2.0, anchors=anchors, accumulate="decay", decay=1.0)
    chex.assert_trees_all_equal(
        pull(plain, memory_of(plain, finish_task)),
        pull(decay, memory_of(decay, finish_task)),
    )


def test_an_average_from_zero_is_online_ewc_at_another_strength(finish_task):
    gamma, strength = 0.8, 2.0
    online = ewc(strength, accumulate="decay", decay=gamma, anchors="latest")
    ema = ewc(
        gamma * strength / (1 - gamma), accumulate="ema", decay=gamma, anchors="latest"
    )
    a, b = online.init(HERE), ema.init(HERE)
    for importance, solution in TASKS:
        a, b = (finish_task(s, solution, importance) for s in (a, b))
        assert_close(pull(online, a), pull(ema, b))


def test_weighting_by_count_is_the_precision_of_all_data(finish_task):
    tx = ewc(1 / 20, weight_by_count=True)
    state = tx.init(HERE)
    counts = [10, 30, 20, 5]
    for (importance, solution), n in zip(TASKS, counts, strict=True):
        state = finish_task(state, solution, importance, num_items=n)
    assert_close(pull(tx, state), weighted_pull([n / 20 for n in counts]))


def test_a_debiased_average_that_never_learned_is_zero_not_nan(finish_task):
    tx = ewc(
        1.0, accumulate="ema", decay=jnp.float32(1.0), ema_init="debias"
    )  # an array is not judged
    state = memory_of(tx, finish_task)
    chex.assert_trees_all_equal(pull(tx, state), zeros_like(HERE))


def test_an_importance_that_is_not_finite_counts_as_none(finish_task):
    tx = ewc(1.0)
    bad, zero = np.float32([[np.nan, np.inf, 1.0], [0.0, 0.0, 0.0]])
    state = finish_task(tx.init(zero), zero, bad)
    np.testing.assert_array_equal(pull(tx, state, zero + 1), [0, 0, 1])


# --- Strength ------------------------------------------------------------------------


def test_updates_pass_unchanged_before_the_first_task_and_at_strength_zero(finish_task):
    grads = draw()
    tx = ewc(1e9)
    chex.assert_trees_all_equal(tx.update(grads, tx.init(HERE), HERE)[0], grads)
    off = ewc(0.0)
    state = memory_of(off, finish_task)
    chex.assert_trees_all_equal(off.update(grads, state, HERE)[0], grads)


def test_strength_zero_leaves_the_trajectory_of_the_optimizer(finish_task):
    def train(strength):
        links = () if strength is None else (ewc(strength),)
        tx = optax_cl.chain(*links, optax_cl.scale_by_decoupled_adam(), optax.sgd(0.1))
        params, state = HERE, tx.init(HERE)
        if links:
            state = memory_of(tx, finish_task)

        def step(carry, i):
            params, state = carry
            grads = jax.tree.map(lambda p: jnp.sin(5 * p + i), params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        carry = jax.lax.scan(step, (params, state), np.arange(20, dtype=np.float32))
        return carry[0][0]

    chex.assert_trees_all_close(train(0.0), train(None), rtol=1e-6)
    assert not np.allclose(train(1.0)["a"], train(None)["a"])


def test_a_schedule_is_read_at_each_step_by_update_and_value(finish_task):
    tx = ewc(optax.linear_schedule(0.0, 3.0, 3))
    state = memory_of(tx, finish_task)
    for strength in (0.0, 1.0, 2.0, 3.0, 3.0):
        assert_close(pull(tx, state), weighted_pull([strength] * 4))
        assert_close(slope(state, HERE), weighted_pull([strength] * 4))
        _, state = tx.update(zeros_like(HERE), state, HERE)


def test_strength_may_be_traced(finish_task):
    state = memory_of(ewc(1.0), finish_task)
    got = jax.jit(jax.vmap(lambda s: pull(ewc(s), state)))(np.float32([0.0, 2.0]))
    off, on = (jax.tree.map(lambda x, i=i: np.asarray(x)[i], got) for i in (0, 1))
    assert_close(on, weighted_pull([2] * 4))
    assert not off["a"].any()


# --- Placement -----------------------------------------------------------------------

ZERO, ONE = np.float32([[0.0], [1.0]])


@pytest.mark.parametrize(
    ("place", "expected"),
    [("routed", 1.0), ("max", 1.0), ("raw", 11.0), ("optax", 1.0), ("after", 1.1)],
)
def test_the_step_of_a_pull_ten_times_the_gradient_in_each_place(
    place, expected, finish_task
):
    penalty = ewc(0.1)
    adam = {
        "optax": optax.scale_by_adam(),
        "after": optax_cl.scale_by_decoupled_adam(),
    }.get(place) or optax_cl.scale_by_decoupled_adam(second_moment=place)
    links = (adam, penalty) if place == "after" else (penalty, adam)
    tx = optax_cl.chain(*links, optax.scale_by_learning_rate(1e-3))
    state = finish_task(tx.init(ZERO), ZERO, ONE)
    updates, _ = tx.update(ONE / 100, state, ONE)
    assert -updates.item() / 1e-3 == pytest.approx(expected, rel=1e-4)


def test_in_front_of_the_capture_the_raw_gradient_includes_the_pull(finish_task):
    tx = optax.chain(
        ewc(0.1), optax_cl.chain(optax_cl.scale_by_decoupled_adam(second_moment="raw"))
    )
    state = finish_task(tx.init(ZERO), ZERO, ONE)
    updates, _ = tx.update(ONE / 100, state, ONE)
    assert updates.item() == pytest.approx(1.0, rel=1e-4)


# --- Dtypes and bad input ------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_parameters_keep_float32_memory_and_differences(variant, finish_task):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), HERE)
    tx = ewc(3.0, **VARIANTS[variant])
    state = memory_of(tx, finish_task)
    reference = pull(tx, state, jax.tree.map(np.float32, half))
    grads = zeros_like(half)
    got, new_state = tx.update(grads, state, half)
    assert got["a"].dtype == jnp.bfloat16
    chex.assert_trees_all_equal(
        got, jax.tree.map(lambda x: np.asarray(x).astype(jnp.bfloat16), reference)
    )
    fresh = tx.init(half)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        fresh, finish_task(fresh, half, TASKS[0][0]), new_state
    )


def test_parameters_are_required():
    tx = ewc(1.0)
    with pytest.raises(ValueError, match="`ewc` reads the parameters"):
        tx.update(HERE, tx.init(HERE))


def test_parameters_of_another_shape_are_refused():
    tx = ewc(1.0)
    wrong = {**HERE, "b": np.zeros(5, np.float32)}
    with pytest.raises(ValueError, match=r"`params`.*`b`.*\(5,\).*\(4,\)"):
        tx.update(HERE, tx.init(HERE), wrong)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"strength": -1.0}, ValueError, "`strength` must be a finite number"),
        ({"strength": float("nan")}, ValueError, "`strength`"),
        ({"strength": "1"}, TypeError, "`strength` must be a number or"),
        ({"anchors": "all"}, ValueError, "`anchors` must be one of 'merged'"),
        ({"anchors": None}, ValueError, "`anchors` must be one of 'merged'"),
        ({"accumulate": "mean"}, ValueError, "`accumulate`"),
        ({"accumulate": "decay"}, ValueError, "needs `decay`"),
        ({"accumulate": "ema"}, ValueError, "needs `decay`"),
        ({"decay": 0.9}, ValueError, "no meaning with `accumulate='sum'`"),
        ({"accumulate": "decay", "decay": 1.1}, ValueError, "`decay`"),
        ({"accumulate": "ema", "decay": 1.0}, ValueError, "`decay`"),
        ({"accumulate": "ema", "decay": 0.9, "ema_init": "one"}, ValueError, "ema_i"),
        ({"anchors": "separate"}, ValueError, "needs `capacity`"),
        ({"anchors": "separate", "capacity": 0}, ValueError, "at least 1"),
        ({"anchors": "separate", "capacity": 2.0}, TypeError, "Python integer"),
        ({"capacity": 3}, ValueError, "`capacity` has no meaning"),
        ({"overflow": "drop"}, ValueError, "`overflow`"),
        ({"estimator": "true"}, ValueError, "`estimator`"),
        ({"weight_by_count": 1}, TypeError, "`weight_by_count` must be a bool"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        ewc(**{"strength": 1.0, **arguments})


def test_the_legacy_estimator_warns_where_it_is_asked_for():
    with pytest.warns(UserWarning, match="batch size") as record:
        ewc(1.0, estimator="batched")
    assert record[0].filename == __file__


def test_a_state_without_ewc_has_no_value():
    with pytest.raises(ValueError, match="holds no EwcState"):
        ewc_loss(optax.sgd(0.1).init(HERE), HERE)


def test_ending_a_task_twice_with_the_same_statistics_counts_it_twice(finish_task):
    tx, (importance, solution) = ewc(1.0), TASKS[0]
    once = finish_task(tx.init(solution), solution, importance)
    twice = finish_task(once, solution, importance)
    assert twice.memory.tasks == 2
    assert_close(pull(tx, twice), weighted_pull([2.0], TASKS[:1]))
