"""SI over boundaries, inside wrappers, with numbers and arguments that are bad."""

import functools
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import optax_cl
from optax_cl.penalties import ewc, mas, si, si_loss
from tests.penalties.quadratics import (
    NOISE,
    NOTHING,
    START,
    as_arrays,
    end_task,
    freeze,
    gradient,
    largest_difference,
    moved_by,
    train,
    weighted,
)

# --- Boundaries ----------------------------------------------------------------------


def test_a_change_from_outside_is_no_part_of_the_path():
    # Quadratics about a point that jumps with the parameters: the same importances.
    def run(jump, told=True, when=3):
        tx = si(1.0, damping=0.05)
        at, params = 0.0, as_arrays(START)
        state = tx.init(params)
        for step in range(6):
            if step == when:
                at, params = at + jump, moved_by(params, jump)
                if told:
                    state = optax_cl.begin_task(state, params)
            grads = gradient(moved_by(params, -at), 0, step)
            updates, state = tx.update(grads, state, params)
            params = jax.tree.map(lambda p, u: p - 0.1 * u, params, updates)
        return end_task(state, params).memory.importance

    for when in (0, 3):
        chex.assert_trees_all_close(
            run(5.0, when=when), run(0.0, when=when), rtol=1e-3, atol=1e-4
        )
    assert largest_difference(run(5.0, told=False), run(0.0)) > 0.5


def test_parameters_loaded_after_init_begin_the_path():
    tx, params = weighted(), as_arrays(START)
    loaded = moved_by(params, 2.0)
    expected = tx.init(loaded)
    found = optax_cl.begin_task(tx.init(params), loaded)
    chex.assert_trees_all_close(found, expected, rtol=1e-6)


def test_a_past_solution_stays_the_anchor_whatever_begins():
    state, params, _ = train(weighted(), tasks=1)
    state = state._replace(
        memory=state.memory._replace(
            importance=state.memory.importance | {"b": jnp.zeros(4)}
        )
    )
    state = optax_cl.begin_task(state, moved_by(params, 1.0))
    chex.assert_trees_all_equal(state.memory.anchor["a"], params["a"])
    chex.assert_trees_all_close(state.memory.anchor["b"], params["b"] + 1.0)


def test_beginning_at_the_end_changes_nothing():
    state, params, _ = train(weighted(), tasks=2)
    again = optax_cl.begin_task(state, params)
    chex.assert_trees_all_equal(again, state)
    chex.assert_trees_all_equal(
        optax_cl.end_task(again, params, NOTHING).path, again.path
    )


def test_no_data_are_read():
    tx = weighted()
    state = tx.init(as_arrays(START))

    def refuse():
        raise AssertionError("read")
        yield

    stats = optax_cl.collect(
        state, as_arrays(START), refuse(), task=optax_cl.Task(), key=jax.random.key(0)
    )
    assert stats.results == {}


def test_an_average_handed_in_as_the_end_is_what_the_end_was():
    # Stated, not wanted: the last step ends where `end_task` is told.
    tx, params = si(1.0, damping=1.0), jnp.zeros(1)
    _, state = tx.update(jnp.array([-2.0]), tx.init(params), params)
    state = optax_cl.end_task(state, jnp.array([0.5]), NOTHING)
    assert float(state.memory.importance[0]) == pytest.approx(2 * 0.5 / 1.25)


def test_an_injected_damping_takes_effect_at_the_next_boundary():
    tx = optax.inject_hyperparams(si)(strength=1.0, damping=0.25)
    params = jnp.zeros(1)
    _, state = tx.update(jnp.array([-2.0]), tx.init(params), params)
    state.hyperparams["damping"] = jnp.float32(0.75)
    _, state = tx.update(jnp.array([0.0]), state, params + 0.5)
    state = optax_cl.end_task(state, params + 0.5, NOTHING)
    importance = state.inner_state.memory.importance
    assert float(importance[0]) == pytest.approx(1.0 / (0.25 + 0.75))


# --- Wrappers ------------------------------------------------------------------------


def test_masked_leaves_take_no_part_and_the_others_are_as_alone():
    expected, *_ = train(weighted())
    masked = optax.masked(weighted(), {"a": True, "b": False})
    # What the mask hides passes as it came, and so goes uphill.
    state, params, _ = train(optax.chain(masked, freeze("b")))
    chex.assert_trees_all_close(
        state.memory.importance["a"], expected.memory.importance["a"], rtol=1e-5
    )
    for tree in (state.memory.importance, state.path, state.gradient, state.before):
        assert isinstance(tree["b"], optax.MaskedNode)
    np.testing.assert_array_equal(params["b"], np.float32(START["b"]))


def test_a_leaf_that_is_hidden_for_a_while_keeps_its_account():
    tx, hidden = si(1.0, damping=1.0), optax.MaskedNode()
    for last in (jnp.array([-2.0]), hidden):
        params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
        state = tx.init(params)
        for b in (jnp.array([-2.0]), hidden, hidden, last):
            grads = {"a": jnp.array([-2.0]), "b": b}
            _, state = tx.update(grads, state, params)
            params = {
                k: p if grads[k] is hidden else p + 0.5 for k, p in params.items()
            }
        importance = end_task(state, params).memory.importance
        credits = {"a": 4.0, "b": 1.0 if last is hidden else 2.0}
        for k, credit in credits.items():
            expected = credit / (float(params[k][0]) ** 2 + 1.0)
            assert float(importance[k][0]) == pytest.approx(expected), k


def test_none_leaves_stay_and_integer_leaves_are_left_alone():
    tx = si(1.0)
    params = {"a": jnp.ones(2), "none": None, "steps": jnp.array(3), "c": 0.5}
    grads = {"a": jnp.ones(2), "none": None, "steps": jnp.array(7), "c": jnp.ones([])}
    state = tx.init(params)
    for by in (0.0, -0.1):
        here = params | {"a": params["a"] + by, "c": params["c"] + by}
        updates, state = tx.update(grads, state, here)
    state = end_task(state, here)
    updates, _ = tx.update(grads, state, params)
    assert updates["none"] is None and updates["steps"] == 7
    importance = state.memory.importance
    assert importance["none"] is None and optax.tree.size(importance) == 3
    np.testing.assert_allclose(importance["a"], 0.1 / (0.01 + 1e-3), rtol=1e-4)
    np.testing.assert_allclose(importance["c"], 0.1 / (0.01 + 1e-3), rtol=1e-4)


def test_seeds_under_vmap_are_runs_of_their_own():
    tx = optax_cl.chain(si(0.3), optax.sgd(0.05))
    grads = [as_arrays(n) for n in NOISE[0][:4]]

    def run(params):
        state = tx.init(params)
        for i, g in enumerate(grads):
            g = jax.tree.map(lambda g, p: g + p, g, params)
            updates, state = tx.update(g, state, params)
            params = optax.apply_updates(params, updates)
            if i == 1:
                state = end_task(state, params)
        return params, end_task(state, params)

    seeds = [as_arrays(START), moved_by(as_arrays(START), 0.5)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *seeds)
    both = jax.jit(jax.vmap(run))(stacked)
    alone = jax.tree.map(lambda *x: jnp.stack(x), *map(jax.jit(run), seeds))
    chex.assert_trees_all_close(both, alone, rtol=1e-4, atol=1e-6)
    (row,) = optax_cl.describe(both[1])
    assert (row.method, row.tasks, row.capacity) == ("Si", 2, None)


def test_stacked_states_end_a_task_without_vmap_as_with_it():
    # Three seeds with a damping each; the leaf's last axis is as long.
    dampings, params = jnp.array([0.1, 1.0, 10.0]), jnp.ones((3, 2, 3))

    def first_step(damping, params):
        tx = si(1.0, damping=damping)
        return tx.update(params, tx.init(params), params)[1]

    states, ends = jax.vmap(first_step)(dampings, params), params - 0.5
    together = optax_cl.end_task(states, ends, NOTHING)
    apart = jax.vmap(lambda s, p: optax_cl.end_task(s, p, NOTHING))(states, ends)
    chex.assert_trees_all_close(together, apart, rtol=1e-6)
    np.testing.assert_allclose(
        together.memory.importance[:, 0, 0], 0.5 / (0.25 + dampings), rtol=1e-6
    )


def test_memory_is_five_trees_and_never_grows():
    tx, params = si(1.0), as_arrays(START)
    state = tx.init(params)
    sizes = {optax_cl.describe(state)[0].bytes}
    for _ in range(3):
        state = end_task(tx.update(params, state, params)[1], params)
        sizes.add(optax_cl.describe(state)[0].bytes)
    numbers = optax.tree.size(params)
    assert len(sizes) == 1
    assert sizes.pop() == pytest.approx(5 * 4 * numbers, abs=32)


def test_the_state_shares_no_buffer_with_what_may_be_donated():
    tx, params = si(1.0), as_arrays(START)
    state = tx.init(params)
    consume = jax.jit(
        lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0
    )
    for call in range(4):
        if call == 1:
            _, state = tx.update(as_arrays(START), state, params)
        elif call == 2:
            state = optax_cl.end_task(state, params, NOTHING)
        elif call == 3:
            state = optax_cl.begin_task(state, params)
        params = consume(params)
        chex.assert_tree_all_finite(state)
    consume(state)
    chex.assert_tree_all_finite(params)


# --- Numbers that are not finite -----------------------------------------------------


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, 1e38])
def test_a_bad_gradient_or_parameter_leaves_nothing_behind(value):
    tx, params = si(1.0), as_arrays(START)
    grads = gradient(params, 0, 0)
    bad = {"a": jnp.full((3, 2), value), "b": grads["b"]}
    state = tx.init(params)
    _, state = tx.update(bad, state, params)
    chex.assert_tree_all_finite(state)
    _, state = tx.update(grads, state, moved_by(params, 10.0) | {"a": bad["a"]})
    chex.assert_tree_all_finite(state)
    for _ in range(2):
        _, state = tx.update(grads, state, params)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ended = end_task(state, {"a": bad["a"], "b": params["b"]})
    chex.assert_tree_all_finite(ended)
    # With good parameters it works, and what was seen of "b" counts.
    ended = end_task(end_task(state, params), params)
    updates, _ = tx.update(grads, ended, moved_by(params, 0.3))
    chex.assert_tree_all_finite((ended, updates))
    assert np.any(updates["b"] != grads["b"])


def test_credit_before_a_bad_step_is_kept():
    tx, params = si(1.0, damping=1.0), jnp.zeros(2)
    state = tx.init(params)
    for grads in ([-2.0, -2.0], [jnp.nan, -2.0], [-2.0, -2.0]):
        _, state = tx.update(jnp.array(grads), state, params)
        params = params + 0.5
    state = end_task(state, params)
    expected = np.array([2.0, 3.0]) / (1.5**2 + 1.0)
    np.testing.assert_allclose(state.memory.importance, expected, rtol=1e-5)


def test_steps_to_and_from_a_bad_parameter_earn_nothing():
    tx = si(1.0, damping=1.0)
    state = tx.init(jnp.zeros(1))
    for grads, at in ((-2.0, 0.0), (-2.0, 0.5), (-7.0, jnp.nan), (-2.0, 5.0)):
        _, state = tx.update(jnp.array([grads]), state, jnp.array([at]))
    state = end_task(state, jnp.array([5.5]))
    expected = (2 * 0.5 + 2 * 0.5) / (5.5**2 + 1)  # first and last step
    assert float(state.memory.importance[0]) == pytest.approx(expected)


def test_a_restart_behind_a_bad_parameter_goes_on_from_the_last_good_one():
    tx, state = si(1.0, damping=1.0), si(1.0, damping=1.0).init(jnp.zeros(1))
    for at in (0.0, 0.5, jnp.nan):
        _, state = tx.update(jnp.array([-2.0]), state, jnp.array([at]))
    state = optax_cl.begin_task(state, jnp.array([5.5]))
    state = end_task(state, jnp.array([5.5]))
    # A credit of 1 on the way of .5 that there was.
    assert float(state.memory.importance[0]) == pytest.approx(1.0 / 1.25)


def test_parameters_that_are_not_finite_at_the_start_do_not_spoil_the_others():
    tx, params = si(1.0), jnp.array([1.0, jnp.nan])
    state = tx.init(params)
    chex.assert_tree_all_finite(state)
    updates, state = tx.update(jnp.ones(2), state, jnp.array([1.0, 2.0]))
    np.testing.assert_array_equal(updates, 1.0)


# --- Arguments -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"strength": -1.0}, ValueError, "`strength`"),
        ({"strength": "much"}, TypeError, "`strength` must be a number or an Optax"),
        ({"strength": 1.0, "damping": 0.0}, ValueError, r"`damping`.*\(0, inf"),
        ({"strength": 1.0, "damping": float("nan")}, ValueError, "`damping`"),
        ({"strength": 1.0, "clamp": "relu"}, ValueError, "`clamp`.*'increment'"),
        ({"strength": 1.0, "clamp": None}, ValueError, "`clamp`"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        si(**arguments)


def test_parameters_are_required_and_must_fit():
    tx, params = si(1.0), as_arrays(START)
    state = tx.init(params)
    with pytest.raises(ValueError, match="`si` reads the parameters"):
        tx.update(params, state)
    wide = params | {"b": jnp.ones(5)}
    for call in (
        lambda: optax_cl.end_task(state, wide, NOTHING),
        lambda: optax_cl.begin_task(state, wide),
        lambda: tx.update(params, state, wide),
        lambda: tx.update(params, state, params, raw_updates=wide),
    ):
        with pytest.raises(ValueError, match=r"`b` got \(5,\), expected \(4,\)"):
            call()


def test_complex_parameters_are_refused_by_their_path():
    with pytest.raises(TypeError, match="at `phase`"):
        si(1.0).init({"phase": jnp.ones(2, jnp.complex64)})


def test_a_state_without_si_has_no_value():
    state = ewc(1.0).init(jnp.zeros(2))
    with pytest.raises(ValueError, match=r"no SiState\. Is `si` in the chain"):
        si_loss(state, jnp.zeros(2))


def test_a_checkpoint_of_another_clamp_is_refused():
    params = as_arrays(START)
    saved = optax_cl.schema(si(1.0).init(params))
    optax_cl.check_schema(si(2.0, damping=0.1).init(params), saved)
    with pytest.raises(ValueError, match=r"at `rules`.*increment"):
        optax_cl.check_schema(si(1.0, clamp="cumulative").init(params), saved)


def test_two_in_one_chain_keep_their_own_account():
    links = si(0.1), mas(0.1), si(0.2, damping=1.0)
    tx = optax_cl.chain(*links, optax.sgd(0.05))
    params = as_arrays(START)
    state = tx.init(params)
    update = functools.partial(jax.jit(tx.update), params=params)
    _, state = update(gradient(params, 0, 0), state)
    rows = optax_cl.describe(state)
    assert [r.method for r in rows] == ["Si", "Mas", "Si"]
    moved = moved_by(params, 0.1)
    first, second = (
        optax_cl.end_task(s, moved, NOTHING).memory.importance["a"]
        for s in (state[0], state[2])
    )
    keep = np.array(first) > 0
    np.testing.assert_allclose(
        (first / second)[keep], (0.01 + 1.0) / (0.01 + 1e-3), rtol=1e-3
    )


def test_a_run_with_both_goes_on_bit_for_bit_from_a_checkpoint(tmp_path):
    tx = optax_cl.chain(
        si(0.3, clamp="cumulative"), mas(0.1), optax_cl.scale_by_decoupled_adam()
    )
    task = optax_cl.Task(outputs=lambda p, x: x @ p["a"] + p["b"][None, :2])
    inputs = [jnp.eye(3)]
    update = jax.jit(tx.update)

    def steps(params, state, task, numbers):
        for step in numbers:
            grads = gradient(params, task, step)
            updates, state = update(grads, state, params)
            params = jax.tree.map(lambda p, u: p - 0.1 * u, params, updates)
        return params, state

    def boundary(params, state):
        stats = optax_cl.collect(
            state, params, inputs, task=task, key=jax.random.key(0)
        )
        return optax_cl.end_task(state, params, stats)

    params = as_arrays(START, jnp.bfloat16)
    params, state = steps(params, tx.init(params), 0, range(4))
    params, state = steps(params, boundary(params, state), 1, range(2))
    assert float(optax.tree.norm(state[0].path)) > 0  # in the middle of a task
    saved = {"params": params, "state": state}
    target = jax.eval_shape(lambda p: {"params": p, "state": tx.init(p)}, params)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), target
    )
    with ocp.CheckpointManager(tmp_path / "saved") as manager:
        manager.save(0, args=ocp.args.StandardSave(saved))
        manager.wait_until_finished()
        back = manager.restore(0, args=ocp.args.StandardRestore(target))
    chex.assert_trees_all_equal(back, saved)
    assert jax.tree.structure(back) == jax.tree.structure(saved)

    def finish(params, state):
        params, state = steps(params, state, 1, range(2, 6))
        return boundary(params, state)

    chex.assert_trees_all_equal(finish(**back), finish(params, state))
