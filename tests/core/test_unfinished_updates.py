"""A task that ends between two micro-steps leaves nothing to the next one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_cl

KEY = jax.random.key(0)
TASK = optax_cl.classification(lambda p, b: b["x"] @ p["w"], lambda b: b["y"])
BATCHES = [{"x": jnp.eye(4), "y": jnp.array([0, 1, 2, 0])}]
WRAPPERS = {
    "multi_steps": lambda tx: optax_cl.multi_steps(tx, 2),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
}


def descend(make, policy="keep", begin=False):
    """Three tasks of five micro-steps each, two to an update; all parameters after."""
    params = {"w": jnp.zeros((4, 3))}
    tx = make(optax_cl.chain(optax_cl.ewc(0.0), optax.sgd(0.1)))
    state = tx.init(params)
    step, seen = jax.jit(tx.update), []
    for index in range(3):
        grads = {"w": jnp.full((4, 3), 10.0**index)}
        for _ in range(5):
            updates, state = step(grads, state, params)
            params = optax.apply_updates(params, updates)
        seen.append(float(params["w"][0, 0]))
        if begin:
            state = optax_cl.begin_task(state, params)
            continue
        statistics = optax_cl.collect(state, params, BATCHES, task=TASK, key=KEY)
        state = optax_cl.end_task(state, params, statistics, moments=policy)
    assert step._cache_size() == 1
    return seen


@pytest.mark.parametrize("wrapper", ["multi_steps", "MultiSteps"])
@pytest.mark.parametrize("call", ["keep", "reset", "begin_task"])
def test_no_gradient_of_the_old_task_enters_the_new_tasks_updates(wrapper, call):
    policy = {"begin": True} if call == "begin_task" else {"policy": call}
    seen = descend(WRAPPERS[wrapper], **policy)
    # Two whole updates of each task's own gradient; the fifth micro-step is dropped.
    np.testing.assert_allclose(np.diff([0.0, *seen]), [-0.2, -2.0, -20.0], rtol=1e-5)


def test_reset_state_drops_an_unfinished_update_but_not_under_a_mask():
    params = {"w": jnp.ones((4, 3)), "b": jnp.zeros(3)}
    tx = optax_cl.multi_steps(optax.adam(0.1), 3)
    grads = jax.tree.map(jnp.ones_like, params)
    _, state = tx.update(grads, tx.init(params), params)
    reset = optax_cl.reset_state(state)
    assert state.mini_step == 1 and reset.mini_step == 0
    assert not any(np.any(x) for x in jax.tree.leaves(reset.acc_grads))
    assert jax.tree.map(jnp.result_type, reset) == jax.tree.map(jnp.result_type, state)
    masked = optax_cl.reset_state(state, {"w": True, "b": False})
    assert masked.mini_step == 1 and np.all(masked.acc_grads["w"] == 1.0)
