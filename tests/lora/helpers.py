"""Adapters: balanced ones, a gradient that pulls on them, and steps; random ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_cl
from optax_cl import lora
from tests.arrays import normal, orthonormal

PATH = "layer/kernel"


def chosen(fan_in=12, fan_out=12, rank=2, stack=()):
    params = {"layer": {"kernel": np.zeros((*stack, fan_in, fan_out), np.float32)}}
    views = optax_cl.matrix_views(stacked="kernel" if stack else None)
    return lora.targets(params, {"kernel": rank}, alpha=2.0 * rank, matrices=views)


def start(targets, seed=0, s=-0.5, dtype=jnp.float32):
    adapters = {}
    for i, (path, target) in enumerate(targets.items()):
        *batch, fan_in, fan_out = target.matrix_shape
        adapters[path] = lora.Spectral(
            s=jnp.asarray(np.full(batch, s).astype(dtype)),
            u=orthonormal((seed, i, 0), *batch, fan_out, target.rank, dtype=dtype),
            v=orthonormal((seed, i, 1), *batch, fan_in, target.rank, dtype=dtype),
        )
    return adapters


@functools.cache
def pull(targets, seed=9):
    """The gradient of half the squared distance of each product to a random matrix."""
    # Drawn here, since in the loss a scan would draw them anew in each of its steps.
    rng = np.random.default_rng(seed)
    wanted = {
        path: rng.normal(size=target.matrix_shape).astype(np.float32)
        for path, target in targets.items()
    }

    def loss(adapters):
        return sum(
            jnp.sum((lora.product(adapters[path]) - matrix) ** 2) / 2
            for path, matrix in wanted.items()
        )

    return jax.jit(jax.grad(loss))


@functools.cache
def scanned(tx, gradient, steps):
    def body(carry, _):
        params, opt_state = carry
        updates, opt_state = tx.update(gradient(params), opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    return jax.jit(lambda carry: jax.lax.scan(body, carry, None, length=steps)[0])


def run(tx, adapters, gradient, steps, state=None):
    """The adapters and the state after some steps; one compilation for each ``tx``."""
    state = tx.init(adapters) if state is None else state
    return scanned(tx, gradient, steps)((adapters, state))


def plain():
    """Parameters with kernels and what is none."""
    return {
        "embed": {"embedding": jnp.asarray(np.ones((11, 4), np.float32))},
        "hidden": {"kernel": normal(1, 4, 6), "bias": normal(2, 6)},
        "out": {"kernel": normal(3, 6, 3), "bias": None},
    }


def random_lora(targets, seed=0):
    """Adapters of these targets whose products are not zero."""
    adapters = {}
    for i, (path, target) in enumerate(targets.items()):
        *batch, fan_in, fan_out = target.matrix_shape
        a = normal((seed, i, 0), *batch, fan_in, target.rank)
        b = normal((seed, i, 1), *batch, target.rank, fan_out)
        adapters[path] = lora.LoRA(a, b)
    return adapters
