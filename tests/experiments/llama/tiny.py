"""A tiny model of the Llama family: parameters, tokens, adapters, its functions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from experiments.models import llama
from experiments.models.llama import LlamaConfig
from optax_cl import lora, matrix_views

CONFIG = LlamaConfig.tiny()
KERNELS = [f"layers/{name}/kernel" for name in llama.KERNELS]
FORWARD = jax.jit(llama.forward, static_argnums=0)
FEATURES = jax.jit(llama.features, static_argnums=0)
TRUNK = jax.jit(llama.trunk, static_argnums=(0, 3))
REST = jax.jit(llama.rest, static_argnums=0)


@functools.cache
def make_params():
    rng = np.random.default_rng(0)

    def draw(leaf):
        if leaf.ndim < 3:
            return jnp.float32(rng.uniform(0.5, 1.5, leaf.shape))
        # Larger than they start, so that attention is far from uniform.
        scale = 2.0 / np.sqrt(leaf.shape[1])
        return jnp.float32(scale * rng.normal(size=leaf.shape))

    drawn = jax.tree.map(draw, llama.abstract_params(CONFIG))
    table = 0.1 * rng.normal(size=(CONFIG.vocabulary, CONFIG.width))
    return drawn | {"embed": {"embedding": jnp.float32(table)}}


@functools.cache
def make_tokens():
    tokens = np.random.default_rng(1).integers(0, CONFIG.vocabulary, (3, 11))
    return tokens.astype(np.int32)


@functools.cache
def make_targets():
    return lora.targets(
        make_params(),
        {"layers/.*/kernel": 2},
        alpha=6.0,
        matrices=matrix_views(stacked="layers"),
    )


def adapters_of(kind, targets, paths=KERNELS, seed=2):
    rng = np.random.default_rng(seed)
    out = {}
    for path in paths:
        layers, fan_in, fan_out = targets[path].matrix_shape
        a = jnp.float32(rng.normal(size=(layers, fan_in, 2)) / np.sqrt(fan_in))
        b = jnp.float32(rng.normal(size=(layers, 2, fan_out)) / 2)
        if kind == "lora":
            out[path] = lora.LoRA(a, b)
        else:
            s = jnp.float32(rng.uniform(0.5, 2.0, layers))
            out[path] = lora.Spectral(s, b.swapaxes(1, 2), a)
    return out


def close(a, b, tolerance=2e-5):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
