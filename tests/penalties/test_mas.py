"""MAS against float64 NumPy: importance without labels, accumulation, pull."""

import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_cl
from optax_cl._core import per_example
from optax_cl.penalties import ewc, mas, mas_loss

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
X = np.float32(RNG.normal(size=(13, 4)))
PARAMS = {
    "u": np.float32(RNG.normal(size=(4, 5))),
    "c": np.float32(RNG.normal(size=5)),
    "w": np.float32(RNG.normal(size=(5, 3))),
}


def network(params, x):
    return jnp.tanh(x @ params["u"] + params["c"][None]) @ params["w"]


TASK = optax_cl.Task(outputs=network)
LINEAR = optax_cl.Task(outputs=lambda w, x: x @ w)
W = np.float32(RNG.normal(size=(4, 3)))


def batches_of(x, size):
    return [x[i : i + size] for i in range(0, len(x), size)]


def boundary(state, params=PARAMS, batches=None, task=TASK, **kwargs):
    batches = batches_of(X, 5) if batches is None else batches
    stats = optax_cl.collect(state, params, batches, task=task, key=KEY, **kwargs)
    return optax_cl.begin_task(optax_cl.end_task(state, params, stats), params)


def importance(params=PARAMS, batches=None, task=TASK, **kwargs):
    state = boundary(mas(1.0).init(params), params, batches, task, **kwargs)
    return state.memory.importance


def gradients(params=PARAMS, x=X):
    """Of the squared norm of each example's outputs, [N, ...], by hand in float64."""
    p = {k: np.float64(v) for k, v in params.items()}
    x = np.float64(x)
    hidden = np.tanh(x @ p["u"] + p["c"])
    out = 2 * hidden @ p["w"]
    back = (out @ p["w"].T) * (1 - hidden**2)
    return {
        "u": x[:, :, None] * back[:, None, :],
        "c": back,
        "w": hidden[:, :, None] * out[:, None, :],
    }


def oracle(params=PARAMS, x=X):
    return {k: np.abs(g).mean(0) for k, g in gradients(params, x).items()}


def assert_close(got, expected, rtol=1e-5, atol=1e-6):
    expected = jax.tree.map(np.float32, expected)
    chex.assert_trees_all_close(got, expected, rtol=rtol, atol=atol)


# --- The importance ------------------------------------------------------------------


def test_a_linear_layer_has_the_closed_form():
    f = np.float64(X) @ np.float64(W)
    expected = np.abs(2 * X[:, :, None] * f[:, None, :]).mean(0)  # [in, out]
    got = np.asarray(importance(W, task=LINEAR))
    assert_close(got, expected)
    # Neither of the norm without the square, nor of the transpose.
    unsquared = np.abs(
        X[:, :, None] * (f / np.linalg.norm(f, axis=1, keepdims=True))[:, None, :]
    )
    assert np.max(np.abs(unsquared.mean(0) - got)) > 0.1


def test_a_network_is_what_back_propagation_by_hand_gives():
    assert_close(importance(), oracle())
    assert all(np.all(np.asarray(f) >= 0) for f in importance().values())


@pytest.mark.parametrize("size", [1, 7, 13])
def test_batches_of_any_size_and_order_give_the_same(size):
    expected = oracle()
    assert_close(importance(batches=batches_of(X, size)), expected)
    assert_close(importance(batches=batches_of(X[::-1], size)), expected)


def test_the_absolute_value_is_of_examples_not_of_batches():
    # |sum| <= sum|.|, with equality for batches of one example only.
    got, single = jax.tree.map(np.float64, importance()), gradients()
    for size, equal in ((1, True), (5, False), (13, False)):
        for k, g in single.items():
            parts = [np.abs(g[i : i + size].sum(0)) for i in range(0, len(X), size)]
            batchwise = sum(parts) / len(X)
            assert np.all(batchwise <= got[k] * (1 + 1e-5))
            close = np.allclose(batchwise, got[k], rtol=1e-4)
            assert close == equal, (size, k)
    # Two examples that cancel each other: nothing is left of their sum.
    two = [np.array([[1.0, 0, 0, 0], [-1.0, 0, 0, 0]], np.float32)]
    biased = optax_cl.Task(outputs=lambda b, x: b[None] + 0 * x[:, :1] + x[:, :1])
    b = np.zeros(1, np.float32)
    grad_of_sum = jax.grad(lambda b: jnp.sum(biased.outputs(b, two[0]) ** 2))
    assert jax.jit(grad_of_sum)(b).item() == 0
    assert importance(b, two, biased).item() == 2


def test_outputs_a_times_as_large_have_importances_a_squared_times_as_large():
    scaled = optax_cl.Task(outputs=lambda p, x: 3 * network(p, x))
    assert_close(importance(task=scaled), {k: 9 * v for k, v in oracle().items()})


def test_labels_are_neither_needed_nor_looked_at():
    task = optax_cl.classification(lambda p, b: network(p, b[0]), lambda b: b[1])
    labels = RNG.integers(0, 3, len(X))
    found = [importance(batches=[(X, y)], task=task) for y in (labels, 0 * labels)]
    chex.assert_trees_all_equal(*found)
    assert_close(found[0], oracle())
    # Nothing of the task is called but its outputs.

    def refuse(*args):
        raise AssertionError("called")

    with_traps = TASK._replace(loss=refuse, log_prob=refuse, sample_label=refuse)
    assert_close(importance(task=with_traps), oracle())


def test_all_axes_of_an_example_belong_to_its_outputs():
    # Two items an example: [B, 2, C]; and one number an example: [B].
    pairs = np.float32(RNG.normal(size=(6, 2, 4)))
    f = np.float64(pairs) @ np.float64(W)
    per_item = 2 * pairs[..., :, None] * f[..., None, :]
    assert_close(
        importance(W, [pairs], LINEAR), np.abs(per_item.sum(1)).mean(0), rtol=1e-4
    )
    first = optax_cl.Task(outputs=lambda w, x: (x @ w)[:, 0])
    got = np.asarray(importance(W, task=first))
    expected = np.abs(2 * X * (np.float64(X) @ np.float64(W))[:, :1]).mean(0)
    assert_close(got[:, 0], expected)
    np.testing.assert_array_equal(got[:, 1:], 0)


@pytest.mark.parametrize("examples", [1, 4])
def test_a_batch_is_worked_off_in_chunks_with_the_same_result(examples, monkeypatch):
    monkeypatch.setattr(per_example, "_CHUNK_NUMBERS", examples * 40)
    # Another function, since compilations are kept.
    task = optax_cl.Task(outputs=lambda p, x: network(p, x))
    assert_close(importance(batches=[X], task=task), oracle())


def test_stacked_batches_and_a_boundary_in_jit_give_the_same():
    state = mas(1.0).init(PARAMS)
    stacked = X[:12].reshape(3, 4, 4)

    @jax.jit
    def end(state, params, stacked):
        return boundary(state, params, stacked, stacked=True)

    found = end(state, PARAMS, stacked).memory.importance
    assert_close(found, oracle(x=X[:12]))


def test_frozen_arrays_are_given_beside_the_parameters():
    def outputs(both, x):
        return network({**both[0], **both[1]}, x)

    trained = {"w": PARAMS["w"]}
    rest = {k: PARAMS[k] for k in "uc"}
    got = importance(trained, task=optax_cl.Task(outputs=outputs), frozen=rest)
    assert_close(got, {"w": oracle()["w"]})


def test_two_in_a_chain_share_one_pass():
    tx = optax_cl.chain(mas(1.0), mas(2.0, anchors="merged"), optax.sgd(0.1))
    stats = optax_cl.collect(
        tx.init(PARAMS), PARAMS, batches_of(X, 5), task=TASK, key=KEY
    )
    assert sorted(stats.results) == ["output_sensitivity"]
    assert stats.num_examples == 13


# --- The penalty ---------------------------------------------------------------------

SOLUTIONS = [
    jax.tree.map(lambda p, s=s: p + np.float32(s), PARAMS) for s in (0.0, 0.2, -0.3)
]
HERE = jax.tree.map(lambda p: p + np.float32(0.5), PARAMS)


def three_tasks(tx):
    state = tx.init(PARAMS)
    for params in SOLUTIONS:
        state = boundary(state, params)
    return state


def pull(tx, state):
    return tx.update(optax.tree.zeros_like(HERE), state, HERE)[0]


def weighted_pull(weights, anchors, strength):
    """``2 c sum_j w_j F_j (theta - anchor_j)`` in float64."""
    importances = [oracle(p) for p in SOLUTIONS]
    return {
        k: sum(
            2 * strength * w * f[k] * (np.float64(HERE[k]) - np.float64(a[k]))
            for w, f, a in zip(weights, importances, anchors, strict=True)
        )
        for k in HERE
    }


def test_importances_add_up_at_the_newest_solution():
    tx = mas(0.3)
    state = three_tasks(tx)
    expected = weighted_pull([1, 1, 1], [SOLUTIONS[-1]] * 3, 0.3)
    assert_close(pull(tx, state), expected, rtol=1e-4)
    assert state.memory.tasks == 3
    chex.assert_trees_all_equal(state.memory.anchor, SOLUTIONS[-1])


@pytest.mark.parametrize(
    ("arguments", "weights"),
    [
        ({"anchors": "merged"}, [1, 1, 1]),
        ({"anchors": "separate", "capacity": 3}, [1, 1, 1]),
        ({"anchors": "separate", "capacity": 2, "overflow": "merge"}, [1, 1, 1]),
        ({"anchors": "merged", "accumulate": "ema", "decay": 0.5}, [1 / 8, 1 / 4, 0.5]),
    ],
)
def test_other_anchors_keep_each_importance_at_its_own_solution(arguments, weights):
    tx = mas(0.3, **arguments)
    expected = weighted_pull(weights, SOLUTIONS, 0.3)
    assert_close(pull(tx, three_tasks(tx)), expected, rtol=1e-4, atol=1e-5)


def test_the_penalty_has_no_factor_one_half():
    state = boundary(mas(0.3).init(PARAMS))
    expected = sum(0.3 * np.sum(f * 0.5**2) for f in oracle().values())
    assert float(mas_loss(state, HERE)) == pytest.approx(expected, rel=1e-5)
    # EWC has: of the same importance it is twice the strength.
    tx = ewc(0.6, anchors="latest")
    other = tx.init(PARAMS)
    other = other._replace(memory=state.memory)
    chex.assert_trees_all_close(pull(mas(0.3), state), pull(tx, other), rtol=1e-6)


@pytest.mark.parametrize("arguments", [{}, {"anchors": "merged"}])
def test_what_is_added_is_the_gradient_of_the_value(arguments):
    tx = mas(0.3, **arguments)
    state = three_tasks(tx)
    gradient = jax.jit(jax.grad(mas_loss, argnums=1))(state, HERE)
    chex.assert_trees_all_close(pull(tx, state), gradient, rtol=1e-4, atol=1e-5)


def test_the_pull_is_zero_at_the_anchor_and_before_the_first_task():
    tx = mas(100.0)
    fresh = tx.init(PARAMS)
    grads = jax.tree.map(np.cos, PARAMS)
    for state, here in ((fresh, HERE), (boundary(fresh), PARAMS)):
        updates, _ = tx.update(grads, state, here)
        chex.assert_trees_all_equal(updates, grads)


def test_strength_zero_is_the_optimizer_alone():
    alone = optax.chain(optax_cl.scale_by_decoupled_adam(), optax.scale(-0.05))
    plain, other = optax_cl.chain(alone), optax_cl.chain(mas(0.0), alone)
    states = plain.init(PARAMS), boundary(other.init(PARAMS))
    params = HERE
    for _ in range(3):
        grads = jax.tree.map(np.cos, params)
        expected, first = plain.update(grads, states[0], params)
        updates, second = other.update(grads, states[1], params)
        chex.assert_trees_all_equal(updates, expected)
        params = jax.tree.map(lambda p, u: p + np.asarray(u), params, updates)
        states = first, second


def test_a_schedule_is_read_at_each_step_by_update_and_value():
    tx = mas(lambda step: 0.1 * (step + 1))
    state = boundary(tx.init(PARAMS))
    for strength in (0.1, 0.2):
        expected, _ = mas(strength).update(HERE, state, HERE)
        value = float(mas_loss(state, HERE))
        assert value == pytest.approx(
            strength * sum(0.25 * f.sum() for f in oracle().values()), rel=1e-4
        )
        updates, state = tx.update(HERE, state, HERE)
        chex.assert_trees_all_close(updates, expected, rtol=1e-6)


# --- Dtypes and bad input ------------------------------------------------------------


def test_bfloat16_parameters_keep_float32_memory():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    state = boundary(mas(1.0).init(params), params)
    for f, a in zip(
        jax.tree.leaves(state.memory.importance),
        jax.tree.leaves(state.memory.anchor),
        strict=True,
    ):
        assert f.dtype == a.dtype == jnp.float32
    expected = oracle({k: np.float64(v) for k, v in params.items()})
    for k, x in expected.items():
        scale = x.max()
        np.testing.assert_allclose(state.memory.importance[k], x, atol=0.05 * scale)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
def test_large_outputs_in_half_precision_do_not_overflow(dtype):
    # Neither their square nor twice of them is a number of float16, nor is twice half
    # the gradient, where that is in the dtype of the parameters.
    task = optax_cl.Task(outputs=lambda w, x: (x.astype(dtype) @ w).astype(jnp.float16))
    got = importance(np.full((1, 1), 4e4, dtype), [np.ones((1, 1), np.float32)], task)
    np.testing.assert_allclose(got, 8e4, rtol=1e-2)


def test_inputs_that_are_not_finite_leave_no_trace():
    tx = mas(1.0)
    state = boundary(tx.init(W), W, task=LINEAR)
    bad = X.copy()
    bad[0, 1] = np.nan
    with pytest.warns(UserWarning, match=r"`collect`.*not finite"):
        state = boundary(state, W, [bad], LINEAR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        broken = W.copy()
        broken[0, 0] = np.nan
        state = boundary(state, broken, task=LINEAR)
    chex.assert_tree_all_finite(state)
    updates = np.asarray(tx.update(W, state, W + np.float32(0.1))[0])
    assert np.all(np.isfinite(updates)) and np.any(updates != W)


def test_outputs_that_have_no_gradient_are_refused():
    task = optax_cl.Task(outputs=lambda p, x: network(p, x).argmax(-1))
    with pytest.raises(TypeError, match=r"`task\.outputs` gives dtype int32.*argmax"):
        importance(task=task)


def test_a_task_without_outputs_is_refused():
    task = optax_cl.Task(loss=lambda p, x: network(p, x).sum(-1))
    with pytest.raises(ValueError, match=r"`task\.outputs` is None, but the sens"):
        importance(task=task)


def test_outputs_beside_others_are_refused():
    for several in (lambda z: (z, 0), lambda z: {"logits": z, "loss": z[:, 0]}):
        task = optax_cl.Task(outputs=lambda p, x, f=several: f(network(p, x)))
        with pytest.raises(
            TypeError,
            match=r"`task\.outputs` must give one array.*got (tuple|dict) with 2",
        ):
            importance(task=task)


def test_outputs_without_the_axis_of_examples_are_refused():
    task = optax_cl.Task(outputs=lambda p, x: network(p, x).mean(0))
    with pytest.raises(ValueError, match=r"`task\.outputs` must keep the axis"):
        importance(task=task)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"strength": -1.0}, ValueError, "`strength`"),
        ({"strength": None}, TypeError, "`strength` must be a number or an Optax"),
        ({"strength": 1.0, "anchors": None}, ValueError, "`anchors`.*'latest'"),
        ({"strength": 1.0, "accumulate": "mean"}, ValueError, "`accumulate`"),
        ({"strength": 1.0, "decay": 0.5}, ValueError, "`decay` has no meaning"),
        ({"strength": 1.0, "anchors": "separate"}, ValueError, "needs `capacity`"),
        ({"strength": 1.0, "capacity": 3}, ValueError, "`capacity` has no meaning"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        mas(**arguments)


def test_parameters_are_required():
    state = mas(1.0).init(PARAMS)
    with pytest.raises(ValueError, match="`mas` reads the parameters"):
        mas(1.0).update(PARAMS, state)


def test_complex_parameters_are_refused_by_their_path():
    with pytest.raises(TypeError, match="at `phase`"):
        mas(1.0).init({"phase": jnp.ones(2, jnp.complex64)})


def test_a_state_without_mas_has_no_value():
    with pytest.raises(ValueError, match=r"no MasState\. Is `mas` in the chain"):
        mas_loss(ewc(1.0).init(W), W)


def test_it_is_described_and_a_full_bank_refused():
    tx = mas(1.0, anchors="separate", capacity=1)
    state = boundary(tx.init(W), W, task=LINEAR)
    (row,) = optax_cl.describe(state)
    assert (row.method, row.tasks, row.left) == ("Mas", 1, 0)
    with pytest.raises(ValueError, match=r"all 1 places.*grow"):
        boundary(state, W, task=LINEAR)
    state = boundary(optax_cl.grow(state, 2), W, task=LINEAR)
    assert optax_cl.describe(state)[0].left == 0
