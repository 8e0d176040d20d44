"""A run that is saved in the middle of a task goes on bit for bit."""

import functools
import gc
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from orbax.checkpoint import v1

import optax_cl
from optax_cl import isolation, lora, testing
from tests import registry

STEPS = 5


def standard_save(path, tree):
    with ocp.CheckpointManager(path) as manager:
        manager.save(7, args=ocp.args.StandardSave(tree))
        manager.wait_until_finished()


def standard_restore(path, target):
    with ocp.CheckpointManager(path) as manager:
        return manager.restore(7, args=ocp.args.StandardRestore(target))


SAVERS = {
    "standard": (standard_save, standard_restore),
    "v1": (lambda path, tree: v1.save(path, tree), v1.load),
}
ONE_QUICK = ["standard", pytest.param("v1", marks=pytest.mark.slow)]


def everything(rank=2, capacity=3, average=0.5):
    """Banks, bases, curvature, averages, moments and a schedule."""
    ewc = optax_cl.ewc(
        optax.linear_schedule(0.0, 2.0, 10), anchors="separate", capacity=capacity
    )
    links = (
        optax_cl.agem(decay=average),
        ewc,
        optax_cl.attenuate(optax_cl.balance()),
        optax_cl.measure("overlap"),
        optax_cl.scale_by_decoupled_adam(),
    )
    return optax.chain(optax_cl.protect(rank, *links), optax.scale(-0.05))


def wrapped():
    """The same behind wrappers that have states and holes of their own."""
    seen = {"dense": {"bias": False, "kernel": True}, "scale": True}
    inner = optax.inject_hyperparams(everything, static_args=("rank", "capacity"))()
    masked = optax.masked(optax.apply_if_finite(inner, 2), seen)
    return optax_cl.multi_steps(masked, 2)


def make_step(tx):
    @jax.jit
    def step(params, state, seed):
        keys = jax.random.split(jax.random.key(seed))
        grads, reference = (
            jax.tree.map(
                lambda p, k=k: jax.random.normal(k, p.shape).astype(p.dtype), params
            )
            for k in keys
        )
        updates, state = tx.update(grads, state, params, reference_updates=reference)
        return optax.apply_updates(params, updates), state

    return step


def run(step, params, state, seeds):
    for seed in seeds:
        params, state = step(params, state, seed)
    return params, state


def middle_of_a_task(tx, step, params):
    params, state = run(step, params, placed(jax.jit(tx.init)(params)), range(4))
    state = optax_cl.end_task(
        state, params, testing.collect_synthetic(state, params), moments="project"
    )
    state = placed(optax_cl.begin_task(state, params))
    return run(step, params, state, range(4, 7))


def placed(tree):
    """Committed to a device, as what is restored is: one compilation serves both."""
    return jax.device_put(tree, jax.devices()[0])


def target_of(tx, params):
    """What a fresh process can know: shapes, dtypes and the static settings."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.eval_shape(lambda p: {"params": p, "state": tx.init(p)}, params)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), abstract
    )


def assert_bit_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)

    def equal(path, a, b):
        assert a.dtype == b.dtype, path
        np.testing.assert_array_equal(
            np.atleast_1d(a).view(np.uint8), np.atleast_1d(b).view(np.uint8), str(path)
        )

    jax.tree_util.tree_map_with_path(equal, found, expected)


@functools.cache
def trained(make, dtype):
    """Step, parameters and state in the middle of the second task."""
    tx = make()
    step = make_step(tx)
    params = placed(optax.tree.cast(registry.params(), dtype))
    return step, *middle_of_a_task(tx, step, params)


@pytest.mark.parametrize("saver", SAVERS)
@pytest.mark.parametrize(
    ("make", "dtype"),
    [
        pytest.param(everything, jnp.float32, id="float32"),
        pytest.param(everything, jnp.bfloat16, id="bfloat16", marks=pytest.mark.slow),
        pytest.param(wrapped, jnp.float32, id="wrapped"),
    ],
)
def test_a_run_goes_on_bit_for_bit_from_a_checkpoint(tmp_path, saver, make, dtype):
    step, params, state = trained(make, dtype)
    save, restore = SAVERS[saver]
    save(tmp_path / "saved", {"params": params, "state": state})
    # A new optimizer, as in a new process: nothing is left of the old one.
    back = restore(tmp_path / "saved", target_of(make(), params))

    assert_bit_equal(back, {"params": params, "state": state})
    future = range(7, 7 + STEPS)
    assert_bit_equal(
        run(step, back["params"], back["state"], future),
        run(step, params, state, future),
    )


@pytest.mark.parametrize("saver", SAVERS)
def test_owners_and_stored_directions_come_back_in_the_middle_of_a_task(
    tmp_path, saver
):
    def make():
        ogd = optax_cl.ogd(2, samples=3)
        return optax.chain(optax.adam(0.1), ogd, isolation.packnet())

    tx = make()
    step = jax.jit(lambda p, s: tx.update(p, s, p))
    params = placed(registry.params())
    state, params = isolation.packnet_prune(placed(tx.init(params)), params, 0.5)
    statistics = testing.collect_synthetic(state, params)
    _, state = step(params, placed(optax_cl.end_task(state, params, statistics)))
    save, restore = SAVERS[saver]
    save(tmp_path / "saved", {"params": params, "state": state})
    back = restore(tmp_path / "saved", target_of(make(), params))
    assert_bit_equal(back, {"params": params, "state": state})
    assert_bit_equal(step(back["params"], back["state"]), step(params, state))
    assert {m.method: m.tasks for m in optax_cl.describe(back["state"])} == {
        "Ogd": 1,
        "Packnet": 1,
    }


def test_the_saved_state_is_of_the_second_task():
    # Or else the tests above would compare empty memories.
    *_, state = trained(everything, jnp.float32)
    memories = {m.method: m.tasks for m in optax_cl.describe(state)}
    assert memories["Protect"] == memories["Ewc"] == 1
    for tree in (state[0].basis, state[0].curvature, state[0].inner[0].reference):
        assert any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("saver", SAVERS)
def test_a_restored_state_serves_at_the_next_boundary(tmp_path, saver):
    # The boundary reads the static settings: estimator, rank rule, anchors.
    _, params, state = trained(everything, jnp.float32)
    save, restore = SAVERS[saver]
    save(tmp_path / "saved", {"params": params, "state": state})
    back = restore(tmp_path / "saved", target_of(everything(), params))["state"]
    assert back[0].settings == state[0].settings
    assert back[0].inner[1].memory.rules == state[0].inner[1].memory.rules

    def end(state):
        statistics = testing.collect_synthetic(state, params)
        return optax_cl.end_task(state, params, statistics)

    assert_bit_equal(end(back), end(state))


@pytest.mark.parametrize(
    "dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)]
)
def test_adapters_on_a_manifold_go_on_bit_for_bit_from_a_checkpoint(tmp_path, dtype):
    kernel = {"kernel": jnp.zeros((6, 4))}
    targets = lora.targets(kernel, {"kernel": 2}, alpha=2.0)
    batch = jax.random.normal(jax.random.key(0), (2, 6))

    def make():
        return lora.eblora(optax.adam(0.1), targets=targets, memory_rank=3)

    def losses(both, batch):
        merged = lora.merge(targets, both[1], both[0])["kernel"]
        return jnp.sum((batch @ merged - 1.0) ** 2, axis=-1)

    def start(memory=None):
        adapters = lora.eblora_init(targets, {"kernel": batch.T @ -jnp.ones((2, 4))})
        if memory is not None:
            v = lora.stiefel.random(jax.random.key(1), (6, 2), memory=memory)
            adapters["kernel"] = adapters["kernel"]._replace(v=v)
        return placed(optax.tree.cast(adapters, dtype))

    tx, task = make(), optax_cl.Task(loss=losses)
    step = make_step(tx)
    params = start()
    params, state = run(step, params, placed(tx.init(params)), range(3))
    statistics = optax_cl.collect(
        state, params, [batch], task=task, frozen=kernel, key=jax.random.key(2)
    )
    state = optax_cl.end_task(state, params, statistics)
    memory = lora.memory(state)["kernel"]
    assert np.abs(memory).max() > 0.1
    params = start(memory)
    state = placed(optax_cl.begin_task(state, params))
    params, state = run(step, params, state, range(3, 5))
    assert len(jax.tree.leaves(state.master)) == (3 if dtype == jnp.bfloat16 else 0)

    standard_save(tmp_path / "saved", {"params": params, "state": state})
    back = standard_restore(tmp_path / "saved", target_of(make(), params))
    assert_bit_equal(back, {"params": params, "state": state})
    assert_bit_equal(
        run(step, back["params"], back["state"], range(5, 8)),
        run(step, params, state, range(5, 8)),
    )


@pytest.fixture
def reads_end():
    """Waits for the reads that Orbax leaves behind when it raises.

    They report to an event loop that is closed by then; the reports are harmless, and
    have to come before the next test, in which they would count as its errors.
    """
    yield
    time.sleep(0.3)
    gc.collect()


@pytest.mark.usefixtures("reads_end")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("saver", ONE_QUICK)
@pytest.mark.parametrize(
    "changed", [{"capacity": 4}, {"rank": 1}], ids=["bank", "rank"]
)
def test_a_checkpoint_of_other_sizes_is_refused(tmp_path, saver, changed):
    _, params, state = trained(everything, jnp.float32)
    save, restore = SAVERS[saver]
    save(tmp_path / "saved", {"params": params, "state": state})
    with pytest.raises(ValueError, match="shape") as error:
        restore(tmp_path / "saved", target_of(everything(**changed), params))
    # It says what was asked for and what is there, of one array that differs.
    asked, stored = re.findall(r"\(\d+(?:, \d+)*,?\)", str(error.value))
    assert asked != stored


@pytest.mark.usefixtures("reads_end")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("saver", ONE_QUICK)
def test_a_checkpoint_of_another_chain_is_refused(tmp_path, saver):
    _, params, state = trained(everything, jnp.float32)
    save, restore = SAVERS[saver]
    save(tmp_path / "saved", {"params": params, "state": state})
    with pytest.raises((ValueError, KeyError), match=r"structure|key|match"):
        restore(tmp_path / "saved", target_of(optax_cl.decoupled_adamw(0.1), params))
