"""Streams of gradients, and protected subspaces, by boundaries or put in by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import optax_cl
from optax_cl import matrix_views
from optax_cl.routing import ProtectState
from tests.arrays import normal


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
        shape = fields["basis"].shape[:-2] + fields["basis"].shape[-1:]
        fields["energy"] = jnp.asarray(np.ones(shape, np.float32))
    return optax_cl.map_states(lambda s: s._replace(**fields), state, ProtectState)


# A linear classifier and an owner of its subspace.

KEY = jax.random.key(0)
IN, OUT = 6, 3


def logits(params, batch):
    return batch["x"] @ params["w"] + params["b"]


TASK = optax_cl.classification(logits, lambda batch: batch["y"])


def make_params(seed=0):
    return {
        "w": normal(seed, IN, OUT),
        "b": jnp.asarray(np.zeros((1, OUT), np.float32)),
    }


def make_batches(seed, sizes=(5, 5, 5), scale=None):
    """Batches of one task; ``scale`` weighs the input directions."""
    rng = np.random.default_rng(seed)
    scale = np.ones(IN) if scale is None else np.asarray(scale)
    return [
        {
            "x": np.float32(rng.normal(size=(n, IN)) * scale),
            "y": np.int32(rng.integers(0, OUT, n)),
        }
        for n in sizes
    ]


@functools.cache
def protected(rank=2, *, rule=None, **settings):
    links = [optax_cl.scale_by_decoupled_adam()]
    if rule is not None:
        links = [optax_cl.attenuate(rule), *links]
    settings = {"matrices": matrix_views(skip="b"), **settings}
    return optax_cl.protect(rank, *links, **settings)


def boundary(state, params, batches, key=KEY, task=TASK):
    stats = optax_cl.collect(state, params, batches, task=task, key=key)
    return optax_cl.end_task(state, params, stats)


def projector(u):
    u = np.asarray(u, np.float64)
    return u @ np.swapaxes(u, -1, -2)
