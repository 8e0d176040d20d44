"""What stands behind EBLoRA: how far it drives the factors off, and who tells."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_cl
from optax_cl import lora
from tests.lora.helpers import PATH, chosen, pull, run, start
from tests.lora.stiefel_points import orthonormality


@pytest.mark.parametrize(
    "after",
    [optax.scale(0.5), optax.clip_by_global_norm(0.3), optax.add_decayed_weights(0.01)],
)
def test_what_stands_behind_it_is_told_at_the_boundary(after):
    targets = chosen()
    inner = lora.eblora(optax.adam(0.1), targets=targets, memory_rank=None)
    adapters, state = run(optax.chain(inner, after), start(targets), pull(targets), 2)
    assert orthonormality(adapters[PATH].u) > 1e-3
    nothing = optax_cl.Statistics(jnp.ones([]), {})
    with pytest.warns(UserWarning, match="inside `directions`") as told:
        state = optax_cl.end_task(state, adapters, nothing)
    assert told[0].filename == __file__  # not a line of this library or of JAX
    # Of the next task it says nothing (warnings are errors here).
    optax_cl.end_task(optax_cl.begin_task(state, start(targets)), adapters, nothing)


def behind(inner, *after):
    targets = chosen(64, 48, 8)
    tx = lora.eblora(inner, targets=targets, memory_rank=None)
    return optax.chain(tx, *after), start(targets), pull(targets)


ADAM = optax.adam(0.1)
RATE_BEHIND = behind(optax.scale_by_adam(), optax.scale(-1e-2))
HALF_BEHIND = behind(ADAM, optax.scale(0.5))


@pytest.mark.parametrize(
    ("setting", "errors"),
    [
        (behind(ADAM), (0, 0, 0)),
        (behind(optax.adamw(0.1, weight_decay=0.1)), (0, 0, 0)),
        (HALF_BEHIND, (0.09, 0.03, 0.002)),
        (behind(ADAM, optax.add_decayed_weights(0.01)), (0.017, 0.02, 0.02)),
        (RATE_BEHIND, (0.018, 0.19, 3.1)),
    ],
    ids=["nothing", "decay inside", "half", "decay", "negative"],
)
def test_the_table_of_damage_in_the_docstring_holds(setting, errors):
    tx, adapters, gradient = setting

    @jax.jit
    def train(adapters):
        def body(carry, _):
            params, state = carry
            updates, state = tx.update(gradient(params), state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), params[PATH].u

        return jax.lax.scan(body, (adapters, tx.init(adapters)), length=300)[1]

    off = orthonormality(train(adapters))
    # A single late step depends on how sums are ordered, the mean of fifty does not.
    off = [off[0], off[9], off[250:].mean()]
    np.testing.assert_allclose(off, errors, rtol=0.15, atol=1e-6)


@functools.partial(jax.jit, static_argnames="dtype")
def stretched(factor, dtype):
    """The factors, and the drift told, where every step is taken ``factor`` times."""
    targets = chosen()
    inner = lora.eblora(optax.adam(0.1), targets=targets, memory_rank=None)
    gradient, adapters = pull(targets), start(targets, dtype=jnp.dtype(dtype))

    def step(_, carry):
        params, state = carry
        updates, state = inner.update(gradient(params), state, params)
        updates = optax.tree.scale(factor, updates)
        return optax.apply_updates(params, updates), state

    carry = (adapters, inner.init(adapters))
    adapters, state = jax.lax.fori_loop(0, 150, step, carry)
    return adapters, state.drift


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("factor", [-0.1, -1.0, 3.0])
def test_no_factor_behind_it_makes_columns_grow_without_bound(factor, dtype):
    adapters, drift = stretched(factor, dtype)
    longest = np.linalg.norm(np.float32(adapters[PATH].u), axis=0).max()
    # A step from within twice the length, away from a point on the manifold.
    assert longest < 2 * abs(1 - factor) + abs(factor)
    assert float(drift) > 0.1


@pytest.mark.parametrize("setting", [RATE_BEHIND, HALF_BEHIND], ids=["rate", "half"])
def test_drift_is_the_error_of_what_a_step_was_given(setting):
    tx, adapters, gradient = setting
    state = tx.init(adapters)
    for _ in range(10):
        adapters, state = run(tx, adapters, gradient, 1, state)
    clean = (state[0]._replace(drift=np.zeros([], np.float32)), *state[1:])
    given = max(orthonormality(x) for x in (adapters[PATH].u, adapters[PATH].v))
    _, state = run(tx, adapters, gradient, 1, clean)
    assert float(state[0].drift) == pytest.approx(given, rel=1e-3)


def test_drift_sees_columns_of_unit_length_that_are_not_orthogonal():
    targets = chosen()
    tx = lora.eblora(optax.sgd(1e-3), targets=targets, memory_rank=None)
    adapters = start(targets)
    state = tx.init(adapters)
    u = np.asarray(adapters[PATH].u)
    slanted = u @ np.float32([[1.0, 0.8], [0.0, 0.6]])
    slanted = {PATH: adapters[PATH]._replace(u=slanted)}
    moved, state = run(tx, slanted, pull(targets), 1, state)
    assert float(state.drift) == pytest.approx(0.8, rel=1e-3)
    # What happened stays to be told, although one step healed it.
    _, state = run(tx, moved, pull(targets), 1, state)
    assert orthonormality(moved[PATH].u) < 1e-6
    assert float(state.drift) == pytest.approx(0.8, rel=1e-3)


def two_layers(memory_rank=None):
    """Two kernels of one shape, whose factors are computed as one stack."""
    params = {f"layers/{i}": np.zeros((12, 12), np.float32) for i in range(2)}
    targets = lora.targets(params, {"layers": 2}, alpha=4.0)
    tx = lora.eblora(optax.sgd(1e-3), targets=targets, memory_rank=memory_rank)
    adapters = start(targets)
    return tx, adapters, tx.init(adapters)


def test_drift_of_one_layer_is_told_beside_one_that_is_not_finite():
    tx, adapters, state = two_layers()
    first, second = adapters.values()
    broken = jax.tree.map(lambda x: np.full_like(x, np.nan), first)
    longer = second._replace(u=np.float32(1.5) * np.asarray(second.u))
    given = dict(zip(adapters, (broken, longer), strict=True))
    _, state = jax.jit(tx.update)(adapters, state, given)
    assert float(state.drift) == pytest.approx(1.25, rel=1e-3)


def test_overlap_of_one_layer_is_told_beside_a_long_step_of_another():
    tx, adapters, state = two_layers(memory_rank=1)
    taken = np.asarray(adapters["layers/1"].v)[:, :1]
    basis = jax.tree.map(lambda m: np.broadcast_to(taken, m.shape), state.memory.basis)
    state = state._replace(memory=state.memory._replace(basis=basis))
    v = np.asarray(adapters["layers/0"].v)
    v = np.linalg.qr(v - taken @ (taken.T @ v))[0]
    adapters["layers/0"] = adapters["layers/0"]._replace(v=v)
    grads = jax.tree.map(np.zeros_like, adapters)
    ones = np.ones((12, 2), np.float32)
    long = ones - v @ (v.T @ ones + ones.T @ v) / 2  # tangent
    grads["layers/0"] = grads["layers/0"]._replace(v=np.float32(1e9) * long)
    _, state = jax.jit(tx.update)(grads, state, adapters)
    assert float(state.drift) == pytest.approx(1.0, rel=1e-3)
