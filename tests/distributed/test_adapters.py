"""EBLoRA and a frozen A on eight devices: data shared out, factors shared out.

Two tasks, so that the second runs off a memory. SGD, since Adam hides a wrong scale.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_cl
from optax_cl import lora

DEVICES, FAN_IN, FAN_OUT, RANK = 8, 16, 8, 2


def setup(method):
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=(FAN_IN, FAN_OUT)) / 4, jnp.float32)
    params = {"kernel": kernel}
    targets = lora.targets(params, {"kernel": RANK}, alpha=4.0)
    gradients = {"kernel": jnp.asarray(rng.normal(size=kernel.shape), jnp.float32)}
    if method == "eblora":
        tx = lora.eblora(
            optax.sgd(0.1), optax.sgd(0.05), targets=targets, memory_rank=6
        )
        return (
            params,
            targets,
            tx,
            functools.partial(lora.eblora_init, targets, gradients),
        )
    tx = optax.chain(lora.frozen_a(targets=targets, memory_rank=6), optax.sgd(0.1))
    return (
        params,
        targets,
        tx,
        functools.partial(lora.frozen_a_init, targets, gradients),
    )


def batch(seed):
    rng = np.random.default_rng(seed)
    # Inputs in few directions, so that the memory does not fill up with one task.
    inputs = rng.normal(size=(DEVICES * 2, 3)) @ rng.normal(size=(3, FAN_IN))
    return {
        "x": jnp.asarray(inputs, jnp.float32),
        "y": jnp.asarray(rng.normal(size=(DEVICES * 2, FAN_OUT)), jnp.float32),
    }


def run(method, place=lambda tree: tree, spread=lambda tree: tree):
    """Adapters after each of two tasks, and the memory between them."""
    params, targets, tx, start = setup(method)

    def losses(both, batch):
        adapters, params = both
        merged = lora.merge(targets, params, adapters)
        return jnp.sum((batch["x"] @ merged["kernel"] - batch["y"]) ** 2, axis=-1)

    task = optax_cl.Task(loss=losses)

    @jax.jit
    def step(adapters, state, batch):
        grads = jax.grad(lambda a: losses((a, params), batch).mean())(adapters)
        updates, state = tx.update(grads, state, adapters)
        return optax.apply_updates(adapters, updates), state

    state = place(tx.init(start()))
    found = []
    for number in range(2):
        adapters = place(start(memory=lora.memory(state)))
        state = optax_cl.begin_task(state, adapters)
        data = spread(batch(number))
        for _ in range(3):
            adapters, state = step(adapters, state, data)
        statistics = optax_cl.collect(
            state,
            adapters,
            [data],
            task=task,
            frozen=params,
            key=jax.random.key(0),
        )
        state = jax.jit(optax_cl.end_task)(state, adapters, statistics)
        found.append((adapters, lora.memory(state)))
    return jax.tree.map(np.asarray, found)


@functools.cache
def on_one_device(method):
    return run(method)


def mesh():
    return jax.make_mesh((DEVICES,), ("d",), axis_types=(AxisType.Auto,))


def on_all(tree, spec=None):
    def put(x):
        own = spec(x) if spec else P()
        return jax.device_put(x, NamedSharding(mesh(), own))

    return jax.tree.map(put, tree)


def factors_split(x):
    """Every axis that eight devices divide is split, the first of them."""
    for axis, size in enumerate(x.shape):
        if size % DEVICES == 0 and size:
            return P(*[None] * axis, "d")
    return P()


PLACES = {
    "data": (on_all, functools.partial(on_all, spec=lambda x: P("d"))),
    "factors": (functools.partial(on_all, spec=factors_split), on_all),
}


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize(
    "method", ["eblora", pytest.param("frozen_a", marks=pytest.mark.slow)]
)
def test_eight_devices_equal_one(method, where):
    place, spread = PLACES[where]
    expected = on_one_device(method)
    for (ours, memory), (theirs, other) in zip(
        run(method, place, spread), expected, strict=True
    ):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5),
            _products(ours),
            _products(theirs),
        )
        # A basis is free up to rotations: its projector is not.
        for path, basis in memory.items():
            np.testing.assert_allclose(
                basis @ basis.T, other[path] @ other[path].T, atol=2e-4
            )
    assert expected[0][1]["kernel"].any()  # there was a memory to share out


def _products(adapters):
    return {path: np.asarray(lora.product(a)) for path, a in adapters.items()}
