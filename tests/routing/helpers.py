"""Streams of gradients, and protected subspaces put in place by hand."""

import jax
import jax.numpy as jnp
import numpy as np

import optax_cl
from optax_cl.routing import ProtectState


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def orthonormal(seed, rows, columns):
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(rows, columns)))
    return jnp.asarray(q, jnp.float32)


def run(tx, grads, params=None, state=None):
    """All updates of ``tx`` over a stream ``[T, ...]``, in one scan; and the state."""
    params = jnp.zeros_like(grads[0]) if params is None else params
    state = tx.init(params) if state is None else state

    def step(state, g):
        updates, state = tx.update(g, state, params)
        return state, updates

    state, updates = jax.lax.scan(step, state, grads)
    return updates, state


def install(state, **fields):
    """Gives every ``ProtectState`` in a state these fields (arrays for one leaf)."""
    if "basis" in fields and "energy" not in fields:
        fields["energy"] = jnp.ones(
            fields["basis"].shape[:-2] + fields["basis"].shape[-1:]
        )
    return optax_cl.map_states(lambda s: s._replace(**fields), state, ProtectState)
