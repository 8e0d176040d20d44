"""A number that is not finite is told of, and leaves nothing behind for good."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_cl

KEY = jax.random.key(0)
TASK = optax_cl.regression(lambda p, b: b[0] @ p["w"], lambda b: b[1])
X = np.eye(3, 4, dtype=np.float32) + 0.1
BATCH = X, np.ones((3, 2), np.float32)
VALUES = [jnp.nan, jnp.inf, 1e30]  # the square of the last is not finite


def make_params():
    return {"w": jnp.asarray(np.linspace(-1.0, 1.0, 8).reshape(4, 2), jnp.float32)}


def broken(tree, value=np.nan):
    w = np.array(tree["w"])
    w[1, 1] = value
    return {"w": jnp.asarray(w)}


def quiet_boundary(state, params, batch=BATCH):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stats = optax_cl.collect(state, params, [batch], task=TASK, key=KEY)
        return optax_cl.end_task(state, params, stats)


def assert_finite(tree):
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        assert np.all(np.isfinite(leaf)), jax.tree_util.keystr(path)


def ewc(**kwargs):
    return optax_cl.ewc(1.0, estimator="empirical", **kwargs)


def protect(rule):
    return optax_cl.protect(2, optax_cl.attenuate(rule))


MEMORIES = {
    "ewc[merged]": ewc(),
    "ewc[latest]": ewc(anchors="latest"),
    "ewc[separate]": ewc(anchors="separate", capacity=3),
    "ewc_proximal": optax_cl.ewc_proximal(0.1, 1.0, estimator="empirical"),
    "mas": optax_cl.mas(1.0),
    "ratchet": protect(optax_cl.ratchet()),
    "balance": protect(optax_cl.balance()),
    "spring": protect(optax_cl.spring()),
}


# --- At a boundary -------------------------------------------------------------------


@pytest.mark.parametrize("when", ["collect", "end_task"])
@pytest.mark.parametrize("name", MEMORIES)
def test_parameters_that_are_not_finite_do_not_spoil_a_memory(name, when):
    tx, params = MEMORIES[name], make_params()
    state = quiet_boundary(tx.init(params), params)
    if when == "collect":
        state = quiet_boundary(state, broken(params))
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stats = optax_cl.collect(state, params, [BATCH], task=TASK, key=KEY)
            state = optax_cl.end_task(state, broken(params), stats)
    assert_finite(state)
    # Back at good parameters (a checkpoint, say) it works, and still protects.
    moved = jax.tree.map(lambda p: p + 0.3, params)
    grads = jax.tree.map(lambda p: -jnp.ones_like(p), params)
    updates, _ = tx.update(grads, state, moved)
    assert_finite(updates)
    assert np.any(updates["w"] != grads["w"])


@pytest.mark.parametrize("name", ["ewc[merged]", "balance"])
def test_data_that_are_not_finite_are_told_of(name):
    params = make_params()
    state = MEMORIES[name].init(params)
    batch = np.where(np.arange(12).reshape(3, 4) == 0, np.nan, X), BATCH[1]
    for batches, stacked in (
        ([batch], False),
        (jax.tree.map(lambda x: x[None], batch), True),
    ):
        with pytest.warns(UserWarning, match=r"`collect`.*not finite.*w") as told:
            optax_cl.collect(
                state, params, batches, task=TASK, key=KEY, stacked=stacked
            )
        assert told[0].filename == __file__


def test_parameters_that_are_not_finite_are_told_of_by_their_path():
    params = make_params() | {"b": jnp.zeros(2)}
    state = ewc().init(params)
    task = optax_cl.regression(lambda p, b: b[0] @ p["w"], lambda b: b[1])
    stats = optax_cl.collect(state, params, [BATCH], task=task, key=KEY)
    with pytest.warns(UserWarning, match=r"`params` are not finite at `b`") as told:
        optax_cl.end_task(state, params | {"b": jnp.array([0.0, jnp.nan])}, stats)
    assert told[0].filename == __file__


def test_finite_boundaries_are_silent_and_jitted_ones_work():
    params = make_params()
    state = ewc().init(params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stats = optax_cl.collect(state, params, [BATCH], task=TASK, key=KEY)
        optax_cl.end_task(state, params, stats)
        state = jax.jit(optax_cl.end_task)(state, broken(params), stats)
    assert_finite(state)


# --- In a step -----------------------------------------------------------------------


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("per_leaf", [False, True])
@pytest.mark.parametrize("rule", [optax_cl.one_minus, optax_cl.proportional])
def test_an_average_of_overlaps_survives_a_bad_gradient(rule, per_leaf, value):
    tx, params = protect(rule(0.5, per_leaf=per_leaf, debias=True)), make_params()
    state = quiet_boundary(tx.init(params), params)
    _, state = tx.update(broken(params, value), state, params)
    updates, state = tx.update(params, state, params)
    assert_finite((updates, state))


BALANCE = protect(optax_cl.balance(10.0))
balance_update = jax.jit(BALANCE.update)  # compiled once for all values


@pytest.mark.parametrize("value", VALUES)
def test_balance_protects_after_a_bad_gradient(value):
    # With a mean of NaN its gate would be shut, and nothing protected until the next
    # boundary.
    params = make_params()
    start = quiet_boundary(BALANCE.init(params), params)
    moved = jax.tree.map(lambda p: p + 0.3, params)
    grads = {"w": -jnp.ones((4, 2))}
    _, state = balance_update({"w": jnp.full((4, 2), -value)}, start, moved)
    for _ in range(200):
        updates, state = balance_update(grads, state, moved)
    expected, _ = balance_update(grads, start, moved)
    assert_finite((updates, state))
    if value != 1e30:  # which is finite, and so counts
        np.testing.assert_allclose(updates["w"], expected["w"], rtol=1e-5)
        assert np.any(expected["w"] != grads["w"])


@pytest.mark.parametrize(
    "tx",
    [
        optax_cl.scale_by_decoupled_adam(),
        optax_cl.scale_by_decoupled_adam(eps=0.0),
        optax_cl.scale_by_decoupled_adam(second_moment="raw", nesterov=True),
        optax_cl.scale_by_decoupled_amsgrad(),
        optax_cl.scale_by_decoupled_factored_rms(),
        optax_cl.scale_by_decoupled_factored_rms(min_dim_size_to_factor=2),
    ],
)
def test_a_denominator_that_underflows_gives_no_nan(tx):
    # In float16 eps is zero, and so is the square of 1e-4.
    values = np.array([[0.0, 1e-4], [0.0, 1e-2], [0.0, 0.0]])
    dtypes = {"float16": jnp.float16, "bfloat16": jnp.bfloat16, "float32": jnp.float32}
    grads = {name: jnp.asarray(values, dtype) for name, dtype in dtypes.items()}
    tx = optax_cl.chain(tx)
    state, update = tx.init(grads), jax.jit(tx.update)
    for _ in range(3):
        updates, state = update(grads, state, grads)
        assert_finite((updates, state))
        for name, found in jax.tree.map(np.asarray, updates).items():
            assert found.dtype == dtypes[name]
            np.testing.assert_array_equal(found[:, 0], 0)
            assert np.all(np.abs(found) < 3)


def test_skipping_in_multi_steps_keeps_the_accumulated_gradient_clean():
    tx = optax_cl.multi_steps(
        optax_cl.decoupled_adamw(0.1),
        2,
        should_skip_update_fn=optax.skip_not_finite,
    )
    params = make_params()
    state = tx.init(params)
    _, state = tx.update(params, state, params)
    _, state = tx.update(broken(params), state, params)  # is not counted
    updates, state = tx.update(params, state, params)
    assert_finite((updates, state))
    assert np.all(updates["w"] != 0)


def test_a_second_moment_that_is_not_a_number_is_not_hidden():
    params = {"w": jnp.ones(2, jnp.float16)}
    tx = optax_cl.scale_by_decoupled_adam(first_moment="routed", second_moment="routed")
    state = tx.init(params)
    state = state._replace(nu={"w": jnp.array([jnp.nan, 1.0], jnp.float16)})
    updates, _ = tx.update(params, state, params)
    np.testing.assert_array_equal(np.isnan(updates["w"]), [True, False])
