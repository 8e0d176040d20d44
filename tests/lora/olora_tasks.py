"""Adapters of one layer over tasks, and the penalty of O-LoRA in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_cl
from optax_cl import lora

RNG = np.random.default_rng(0)
IN, OUT, R = 12, 5, 3
KEY = jax.random.key(0)
NOTHING = optax_cl.Task()


def adapters(dtype=jnp.float32, scale=1.0, batch=()):
    """One layer with a drawn `a` and `b`."""
    a = RNG.normal(size=(*batch, IN, R)) * scale
    b = RNG.normal(size=(*batch, R, OUT))
    return {"layer/kernel": lora.LoRA(a.astype(dtype), b.astype(dtype))}


def factor(tree):
    return tree["layer/kernel"].a


def boundary(state, tree):
    """What a user does at the end of a task; no data is needed."""
    statistics = optax_cl.collect(state, tree, [], task=NOTHING, key=KEY)
    return optax_cl.end_task(state, tree, statistics)


def remembering(tx, history, like=None):
    state = tx.init(history[0] if like is None else like)
    for tree in history:
        state = boundary(state, tree)
    return state


def pull(tx, state, tree):
    """What is added to a gradient of zero."""
    return tx.update(optax.tree.zeros_like(tree), state, tree)[0]


def oracle(history, here, penalty):
    """Value and gradient in the paper's layout: rows of A, one task after the other."""
    new = np.float64(factor(here)).T
    value, gradient = 0.0, np.zeros_like(new)
    for old in history:
        old = np.float64(factor(old)).T
        overlap = old @ new.T  # A_old A_new^T
        if penalty == "l1":
            value += np.abs(overlap).sum()
            gradient += np.sign(overlap).T @ old
        else:
            value += (overlap**2).sum()
            gradient += 2 * (new @ old.T) @ old
    return value, gradient.T


HISTORY = [adapters() for _ in range(3)]
HERE = adapters()
