"""EBLoRA inside Optax's wrappers, under vmap, and held to the contract."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_cl
from optax_cl import lora, testing
from optax_cl.lora import stiefel
from tests.arrays import distance
from tests.lora.helpers import PATH, chosen, pull, run, start


@functools.cache
def _plain(targets):
    return lora.eblora(optax.adam(0.1), targets=targets, memory_rank=3)


def _inject(targets):
    return lora.eblora(
        optax.inject_hyperparams(optax.adam)(optax.constant_schedule(0.1)),
        targets=targets,
        memory_rank=3,
    )


@pytest.mark.parametrize(
    "wrap",
    [
        _inject,
        lambda t: optax.MultiSteps(_plain(t), 1).gradient_transformation(),
        lambda t: optax.apply_if_finite(_plain(t), 2),
        lambda t: optax.masked(_plain(t), lambda p: jax.tree.map(lambda _: True, p)),
        lambda t: optax.partition(
            {"a": _plain(t), "b": optax.set_to_zero()}, {PATH: "a", "frozen": "b"}
        ),
        lambda t: optax_cl.chain(
            lora.eblora(
                optax.chain(
                    optax_cl.scale_by_decoupled_adam(),
                    optax.scale_by_learning_rate(0.1),
                ),
                targets=t,
                memory_rank=3,
            )
        ),
        lambda t: lora.eblora(
            optax_cl.chain(
                optax_cl.scale_by_decoupled_adam(), optax.scale_by_learning_rate(0.1)
            ),
            targets=t,
            memory_rank=3,
        ),
        lambda t: lora.eblora(
            optax_cl.chain(
                optax_cl.scale_by_decoupled_adam(), optax.scale_by_learning_rate(0.1)
            ),
            optax.adam(0.1),
            targets=t,
            memory_rank=3,
        ),
    ],
    ids=[
        "inject",
        "multi_steps",
        "apply_if_finite",
        "masked",
        "partition",
        "decoupled outside",
        "decoupled inside",
        "decoupled beside",
    ],
)
def test_wrappers_and_routes_give_the_same_steps(wrap):
    targets = chosen()
    adapters = start(targets)
    expected, _ = run(_plain(targets), adapters, pull(targets), 3)
    params = {**adapters, "frozen": jnp.ones(2)}

    def gradient(params):
        grads = pull(targets)({PATH: params[PATH]})
        return {**grads, "frozen": jnp.zeros(2)}

    found, state = run(wrap(targets), params, gradient, 3)
    assert distance(found[PATH], expected[PATH]) < 5e-6
    assert lora.memory(state)[PATH].shape == (12, 3)


@pytest.mark.parametrize("captured", ["in front", "behind"])
def test_raw_updates_reach_directions_made_tangent(captured):
    targets = chosen()
    adapters, grads = start(targets), start(targets, seed=3)
    given = {}

    def spy(updates, state, params=None, *, raw_updates, **extra_args):
        given.update(routed=updates[PATH], raw=raw_updates[PATH])
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), spy)
    eblora = lora.eblora(inner, targets=targets, memory_rank=None)
    halve = optax.scale(0.5)
    tx = (
        optax_cl.chain(halve, eblora)
        if captured == "in front"
        else optax.chain(halve, optax_cl.capture_raw(eblora))
    )
    tx.update(grads, tx.init(adapters), adapters)
    raw = 1.0 if captured == "in front" else 0.5
    for field in ("u", "v"):
        x, g = (getattr(tree[PATH], field) for tree in (adapters, grads))
        tangent = stiefel.tangent_project(x, g)
        assert distance(getattr(given["routed"], field), 0.5 * tangent) < 1e-6
        assert distance(getattr(given["raw"], field), raw * tangent) < 1e-6
        assert distance(tangent, g) > 0.01


def test_an_adapter_of_which_only_one_factor_is_seen_trains_that_one():
    targets = chosen()
    adapters = start(targets)
    mask = {PATH: lora.Spectral(s=False, u=False, v=True)}
    tx = optax.masked(_plain(targets), mask)
    grads = pull(targets)(adapters)
    updates, _ = jax.jit(tx.update)(grads, tx.init(adapters), adapters)
    moved = np.asarray(adapters[PATH].v) + np.asarray(updates[PATH].v)
    assert float(stiefel.orthonormality_error(moved)) < 5e-6
    assert distance(updates[PATH].u, grads[PATH].u) == 0


def test_seeds_under_vmap_train_as_each_by_itself():
    targets = chosen()
    tx = _plain(targets)

    adapter = start(targets)[PATH]

    def one(s):
        adapters = {PATH: adapter._replace(s=s)}
        updates, _ = tx.update(pull(targets)(adapters), tx.init(adapters), adapters)
        return optax.apply_updates(adapters, updates)

    magnitudes = jnp.array([0.1, -0.4])
    both = jax.jit(jax.vmap(one))(magnitudes)
    alone = jax.jit(one)(magnitudes[1])
    assert distance(jax.tree.map(lambda x: x[1], both), alone) < 1e-5


# --- The contract --------------------------------------------------------------------


def _new_inputs(v):
    """Statistics of a task whose gradient is off ``v``, so that it may stay."""
    inputs = np.linalg.svd(np.asarray(v))[0][:, v.shape[-1] :].T
    task = optax_cl.Task(loss=lambda both, x: jnp.sum(x @ both[1]["kernel"], -1))
    frozen, key = {"kernel": jnp.zeros((12, 12))}, jax.random.key(0)

    def collect(state, params):
        return optax_cl.collect(
            state, params, [inputs], task=task, frozen=frozen, key=key
        )

    return collect


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`eblora` found its factors elsewhere")
def test_beside_a_memory_it_keeps_the_contract():
    # All of it but `check_vmap`, at whose boundary the factors are not orthonormal,
    # which `begin_task` refuses; a test above has seeds that are.
    targets = lora.targets({"kernel": jnp.zeros((12, 12))}, {"kernel": 2}, alpha=4.0)
    (adapter,) = start(targets).values()
    params = {"bias": jnp.ones(3), "kernel": adapter, "scale": jnp.ones(2)}

    def make(threshold=0.9, step_multiplier=1.0):
        return lora.eblora(
            optax.adam(0.05),
            optax.sgd(0.1),
            targets=targets,
            memory_rank=3,
            threshold=threshold,
            step_multiplier=step_multiplier,
        )

    tx, collect = make(), _new_inputs(adapter.v)
    state = optax_cl.end_task(tx.init(params), params, collect(tx.init(params), params))
    assert int(state.memory.count["kernel"].v) == 1  # it has something to restrict
    testing.check_accepts_extra_args(tx, params)
    testing.check_update_dtypes(tx, params)
    testing.check_state_is_stable(tx, params)
    testing.check_map_params(tx, params)
    testing.check_empty_tree(tx)
    testing.check_tasks(tx, params, collect=collect)
    testing.check_jit_and_scan(tx, params, collect=collect)
    testing.check_masks(tx, params, collect=collect)
    testing.check_multi_steps(tx, params, collect=collect)
    testing.check_apply_if_finite(tx, params, collect=collect)
    testing.check_inject_hyperparams(make, params, collect=collect)
