"""Every public transformation on parameters that four devices share out.

State as ``state_sharding`` lays it out, two tasks with a boundary between them. Chains
with Adam would hide a wrong scale of the gradient, but here gradients are given.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_cl
from optax_cl import testing
from optax_cl._core.sharding import state_sharding
from tests import registry

DEVICES = 4
# One chain with each of: a penalty, memories of gradients, a mask; a basis is tried in
# `test_devices.py`.
QUICK = ("si", "ogd", "pcgrad")


def shardings(tree):
    """The first axis that the devices divide is split."""
    mesh = jax.make_mesh((DEVICES,), ("d",), axis_types=(AxisType.Auto,))

    def one(x):
        spec = next(
            (P(*[None] * a, "d") for a, n in enumerate(x.shape) if n % DEVICES == 0),
            P(),
        )
        return NamedSharding(mesh, spec)

    return jax.tree.map(one, tree)


def run(entry, shared):
    """Parameters after each step, and the state at the end."""
    tx, params = entry.make(), entry.params()
    state = tx.init(params)

    def update(grads, params, state):
        updates, state = tx.update(grads, state, params, **entry.extra_args(grads))
        return optax.apply_updates(params, updates), state

    def boundary(state, params, statistics):
        state = optax_cl.end_task(state, params, statistics)
        return optax_cl.begin_task(state, params)

    if shared:
        places = shardings(params)
        assert any(p.spec != P() for p in jax.tree.leaves(places))
        states = state_sharding(tx, params, places)
        params, state = jax.device_put((params, state), (places, states))
        update = jax.jit(
            update,
            in_shardings=(places, places, states),
            out_shardings=(places, states),
        )
        boundary = jax.jit(boundary, out_shardings=states)
    else:
        update, boundary = jax.jit(update), jax.jit(boundary)
    rng, found = np.random.default_rng(0), []
    for task in range(2):
        if task:
            statistics = testing.collect_synthetic(state, params)
            try:
                state = boundary(state, params, statistics)
            except ValueError as error:  # what is full can't be known inside `jit`
                assert "outside `jit`" in str(error)
                state = optax_cl.end_task(state, params, statistics)
        for _ in range(2):
            grads = jax.tree.map(
                lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params
            )
            params, state = update(grads, params, state)
            found.append(jax.tree.map(np.asarray, params))
    return found, jax.tree.map(np.asarray, state)


# The gradients move parameters as they like, off the manifold too.
@pytest.mark.filterwarnings("ignore:`eblora` found its factors elsewhere")
@pytest.mark.filterwarnings("ignore:`packnet` has no weight free")
@pytest.mark.filterwarnings("ignore:`progressive` has 1 columns")
@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in registry.ENTRIES
    ],
)
def test_shared_out_it_computes_what_one_device_does(name):
    entry = registry.ENTRIES[name]
    found, expected = run(entry, shared=True), run(entry, shared=False)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5),
        found[0],
        expected[0],
    )
    assert jax.tree.structure(found[1]) == jax.tree.structure(expected[1])
