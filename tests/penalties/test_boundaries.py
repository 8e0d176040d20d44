"""All penalties through real boundaries, inside every wrapper of Optax."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_cl
from optax_cl._core import tasks
from optax_cl.penalties import (
    ewc,
    ewc_loss,
    ewc_proximal,
    mas,
    rescale_by_importance,
    si,
)

TASK = tasks.classification(
    lambda p, b: jnp.tanh(b["x"] @ p["u"] + p["c"][None]) @ p["w"], lambda b: b["y"]
)
RNG = np.random.default_rng(0)
PARAMS = {
    "u": np.float32(RNG.normal(size=(4, 5))),
    "c": np.zeros(5, np.float32),
    "w": np.float32(RNG.normal(size=(5, 3))),
}
KEY = jax.random.key(0)
METHODS = {
    "ewc": lambda: ewc(2.0),
    "ewc banks": lambda: ewc(
        2.0, anchors="separate", capacity=2, overflow="merge", estimator="empirical"
    ),
    "ewc_proximal": lambda: ewc_proximal(
        0.1, 2.0, anchors="latest", accumulate="decay", decay=0.9, estimator="sampled"
    ),
    "rescale_by_importance": lambda: rescale_by_importance(0.5),
    "mas": lambda: mas(2.0),
    "si": lambda: si(2.0),
}
every_method = pytest.mark.parametrize("name", METHODS)


def data(seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(10, 4)).astype(np.float32)
    return [
        {"x": x[i : i + 4], "y": rng.integers(0, 3, len(x[i : i + 4]))}
        for i in (0, 4, 8)
    ]


def boundary(state, params, seed=0, end_task=tasks.end_task):
    stats = tasks.collect(state, params, data(seed), task=TASK, key=KEY)
    return tasks.begin_task(end_task(state, params, stats), params)


def moved(params, by=0.1):
    return jax.tree.map(lambda p: np.asarray(p) + np.float32(by), params)


def grads_at(params):
    return jax.tree.map(np.cos, params)


def one_task_later(tx, params=PARAMS):
    state = boundary(tx.init(params), params)
    return tx.update(grads_at(params), state, moved(params))[0]


@functools.cache
def plain_one_task_later(name):
    return one_task_later(METHODS[name]())


@every_method
def test_a_train_step_compiles_once_over_three_tasks(name):
    tx = optax_cl.chain(METHODS[name](), optax_cl.scale_by_decoupled_adam())
    params, state = PARAMS, tx.init(PARAMS)
    fresh = jax.eval_shape(tx.init, PARAMS)
    step = jax.jit(tx.update)
    end_task = jax.jit(lambda *args: tasks.end_task(*args))
    for i in range(3):
        for _ in range(2):
            updates, state = step(grads_at(params), state, params)
            params = jax.tree.map(lambda p, u: p - np.asarray(u), params, updates)
        state = boundary(state, params, i, end_task)
        chex.assert_trees_all_equal_shapes_and_dtypes(fresh, state)
        assert jax.tree.structure(fresh) == jax.tree.structure(state)
    step(grads_at(params), state, params)
    assert step._cache_size() == end_task._cache_size() == 1
    assert state[0].memory.tasks == 3


@every_method
def test_donating_the_state_leaves_parameters_and_statistics_alone(name):
    tx = METHODS[name]()
    state, params = tx.init(PARAMS), jax.tree.map(jnp.asarray, PARAMS)
    for jitted in (True, False):
        stats = tasks.collect(state, params, data(0), task=TASK, key=KEY)
        end_task = tasks.end_task
        if jitted:
            end_task = jax.jit(lambda *a: tasks.end_task(*a), donate_argnums=0)
        state = end_task(state, params, stats)
        update = jax.jit(tx.update, donate_argnums=(1,))
        _, state = update(grads_at(params), state, params)
        _, state = update(grads_at(params), state, params)
    chex.assert_tree_all_finite((params, stats.results))


def test_arrays_given_as_settings_outlive_a_donated_state():
    strength, decay = jnp.float32(2.0), jnp.float32(0.5)
    tx = ewc(strength, accumulate="ema", decay=decay)
    jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)(
        tx.init(PARAMS)
    )
    assert strength == 2.0 and decay == 0.5


@every_method
def test_masking_hides_leaves_inside_and_outside_a_capture(name):
    mask = {"u": True, "c": False, "w": True}
    plain = plain_one_task_later(name)
    masked = optax.masked(METHODS[name](), mask)
    got = one_task_later(masked)
    chex.assert_trees_all_close(got["u"], plain["u"], rtol=1e-5)
    np.testing.assert_array_equal(got["c"], grads_at(PARAMS)["c"])
    assert isinstance(masked.init(PARAMS).inner_state.memory.importance["c"], tuple)
    captured = optax.masked(optax_cl.chain(METHODS[name]()), mask)
    chex.assert_trees_all_equal(one_task_later(captured), got)


@every_method
def test_each_label_of_a_partition_remembers_its_own_leaves(name):
    labels = {"u": "a", "c": "b", "w": "a"}
    tx = optax.partition({"a": METHODS[name](), "b": METHODS[name]()}, labels)
    expected = plain_one_task_later(name)
    chex.assert_trees_all_close(one_task_later(tx), expected, rtol=1e-5, atol=1e-7)


@every_method
def test_wrappers_that_hold_or_skip_steps_pass_the_boundary_through(name):
    expected = plain_one_task_later(name)
    finite = optax.apply_if_finite(METHODS[name](), 3)
    chex.assert_trees_all_close(one_task_later(finite), expected, rtol=1e-5, atol=1e-7)
    steps = optax.MultiSteps(METHODS[name](), 2)
    state = boundary(steps.init(PARAMS), PARAMS)
    for _ in range(2):
        got, state = steps.update(grads_at(PARAMS), state, moved(PARAMS))
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-7)


def test_injected_strength_and_decay_take_effect_at_the_next_step():
    tx = optax.inject_hyperparams(ewc)(strength=2.0, accumulate="decay", decay=0.5)
    state = boundary(tx.init(PARAMS), PARAMS)
    zeros, there = jax.tree.map(np.zeros_like, PARAMS), moved(PARAMS)
    before, _ = tx.update(zeros, state, there)
    state.hyperparams.update(strength=jnp.float32(6.0), decay=jnp.float32(0.25))
    after, state = tx.update(zeros, state, there)
    chex.assert_trees_all_close(
        after, jax.tree.map(lambda x: 1.5 * np.asarray(x), before), rtol=1e-5
    )
    assert state.inner_state.memory.decay == 0.25


def test_an_injected_capacity_must_be_static():
    arguments = {"strength": 1.0, "anchors": "separate", "capacity": 3}
    with pytest.raises(TypeError, match="`capacity` must be a Python integer"):
        optax.inject_hyperparams(ewc)(**arguments).init(PARAMS)
    tx = optax.inject_hyperparams(ewc, static_args="capacity")(**arguments)
    assert tasks.describe(tx.init(PARAMS))[0].capacity == 3


@every_method
def test_vmap_over_seeds_equals_a_loop(name):
    tx = METHODS[name]()
    seeds = [moved(PARAMS, 0.1 * i) for i in range(2)]
    states = [boundary(tx.init(p), p) for p in seeds]

    def stack(trees):
        return jax.tree.map(lambda *x: np.stack(x), *trees)

    arguments = [(grads_at(p), s, moved(p)) for p, s in zip(seeds, states, strict=True)]
    both = jax.jit(jax.vmap(tx.update))(*stack(arguments))
    alone = [tx.update(*one) for one in arguments]
    chex.assert_trees_all_close(both, stack(alone), rtol=1e-5, atol=1e-7)


@every_method
def test_none_leaves_stay_none_and_integer_leaves_are_left_alone(name):
    tx = METHODS[name]()
    params = {**PARAMS, "none": None, "steps": np.int32(3)}
    grads = {**grads_at(PARAMS), "none": None, "steps": np.int32(7)}
    state = boundary(tx.init(params), params)
    elsewhere = {**params, **moved(PARAMS)}
    got, _ = tx.update(grads, state, elsewhere)
    assert got["none"] is None and got["steps"] == 7
    expected = plain_one_task_later(name)
    chex.assert_trees_all_close({k: got[k] for k in expected}, expected, rtol=1e-5)
    if name.startswith("ewc"):
        at_home = {k: elsewhere[k] for k in expected}
        assert ewc_loss(state, {**elsewhere, **at_home}) > 0


@every_method
def test_an_empty_tree_is_no_fault(name):
    tx = METHODS[name]()
    assert tx.update({}, tx.init({}), {})[0] == {}


def test_equal_estimators_share_one_pass_and_others_do_not():
    tx = optax_cl.chain(
        ewc(1.0), rescale_by_importance(0.5), ewc(1.0, estimator="empirical")
    )
    stats = tasks.collect(tx.init(PARAMS), PARAMS, data(0), task=TASK, key=KEY)
    assert sorted(stats.results) == ["fisher/empirical", "fisher/exact"]
    assert stats.num_examples == stats.results["fisher/exact"].num_examples == 10


def test_the_value_is_summed_over_all_penalties_wherever_they_stand():
    links = optax.masked(ewc(2.0), {"u": True, "c": False, "w": False}), ewc(1.0)
    state = boundary(optax_cl.chain(*links).init(PARAMS), PARAMS)
    total = ewc_loss(state, moved(PARAMS))
    parts = [ewc_loss(s, moved(PARAMS)) for s in state]
    np.testing.assert_allclose(total, sum(parts), rtol=1e-6)
    assert min(parts) > 0


def test_a_full_bank_is_described_refused_and_can_grow():
    tx = ewc(1.0, anchors="separate", capacity=1)
    state = boundary(tx.init(PARAMS), PARAMS)
    (row,) = tasks.describe(state)
    assert (row.tasks, row.capacity, row.left) == (1, 1, 0)
    with pytest.raises(ValueError, match=r"all 1 places.*grow"):
        boundary(state, PARAMS)
    state = boundary(tasks.grow(state, 3), moved(PARAMS), 1)
    assert tasks.describe(state)[0].left == 1
    merged = ewc(1.0)
    expected = boundary(boundary(merged.init(PARAMS), PARAMS), moved(PARAMS), 1)
    zeros = jax.tree.map(np.zeros_like, PARAMS)
    chex.assert_trees_all_close(
        tx.update(zeros, state, moved(PARAMS, -1))[0],
        merged.update(zeros, expected, moved(PARAMS, -1))[0],
        rtol=1e-4,
        atol=1e-6,
    )


def test_banks_of_several_seeds_are_described_and_grow_each_by_itself():
    state = boundary(METHODS["ewc banks"]().init(PARAMS), PARAMS)
    stacked = jax.tree.map(lambda x: jnp.asarray(np.stack([x] * 3)), state)
    row, single = optax_cl.describe(stacked)[0], optax_cl.describe(state)[0]
    assert (row.tasks, row.left) == (single.tasks, single.left)
    grown = optax_cl.grow(stacked, row.capacity + 2)
    alone = optax_cl.grow(state, row.capacity + 2)
    one = jax.tree.map(lambda x: np.asarray(x)[1], grown)
    chex.assert_trees_all_equal(one, alone)


def test_memory_does_not_grow_with_the_tasks():
    tx = ewc(1.0)
    state = tx.init(PARAMS)
    sizes = set()
    for i in range(3):
        state = boundary(state, PARAMS, i)
        sizes.add(tasks.describe(state)[0].bytes)
    numbers = sum(p.size for p in jax.tree.leaves(PARAMS))
    assert len(sizes) == 1
    assert sizes.pop() == pytest.approx(2 * 4 * numbers, abs=32)


@every_method
def test_sharded_parameters_and_data_give_the_result_of_one_device(name):
    auto = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(auto, auto))

    def sharded(*axes):
        return jax.NamedSharding(mesh, jax.P(*axes))

    def place(tree, *axes):
        return jax.device_put(tree, sharded(*axes))

    def spread_out(tree):
        return {
            "u": place(tree["u"], "model"),
            "c": place(tree["c"]),
            "w": place(tree["w"]),
        }

    tx = METHODS[name]()
    end_task, update = jax.jit(tasks.end_task), jax.jit(tx.update)
    params = spread_out(PARAMS)
    state = tx.init(params)
    stored = state.memory.importance["u"].sharding.spec
    assert stored == jax.P(*(None,) * (name == "ewc banks"), "model")
    batches = data(0)[:2]
    alone, spread = (
        tasks.collect(s, p, b, task=TASK, key=KEY)
        for s, p, b in (
            (tx.init(PARAMS), PARAMS, batches),
            (state, params, [place(b, "data") for b in batches]),
        )
    )
    chex.assert_trees_all_close(spread.results, alone.results, rtol=1e-4, atol=1e-7)
    grads, there = grads_at(PARAMS), moved(PARAMS)
    state = end_task(state, params, spread)
    got, _ = update(spread_out(grads), state, spread_out(there))
    single = end_task(tx.init(PARAMS), PARAMS, alone)
    expected, _ = update(grads, single, there)
    chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-6)
