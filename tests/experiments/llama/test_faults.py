"""Sizes, and input that the decoder refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from experiments.models import llama
from experiments.models.llama import LlamaConfig
from optax_cl import lora, matrix_views
from tests.experiments.llama.tiny import (
    CONFIG,
    FORWARD,
    KERNELS,
    adapters_of,
)


def test_the_parameters_of_smollm2_are_135_million():
    leaves = jax.tree.leaves(llama.abstract_params(LlamaConfig.smollm2_135m()))
    assert sum(leaf.size for leaf in leaves) == 134_515_008


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"layers": 0}, "`layers` must be at least 1"),
        ({"heads": 5}, "`width` must be a multiple of `heads`; got 24 and 5"),
        ({"kv_heads": 4}, "`heads` must be a multiple of `kv_heads`; got 6 and 4"),
        ({"heads": 24, "kv_heads": 24}, "must be even"),
        ({"rope_theta": 0.0}, "rope_theta"),
        ({"norm_eps": float("nan")}, "norm_eps"),
    ],
)
def test_impossible_sizes_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **sizes)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (jnp.zeros(4, jnp.int32), r"`tokens` must be \[batch, time\]"),
        (jnp.zeros((2, 0), jnp.int32), "neither of them zero"),
        (jnp.full((1, 3), 64), "`tokens` must lie in 0 to 63; got 64"),
        (jnp.full((1, 3), -1), "got -1 to -1. Was another tokenizer used"),
        (jnp.zeros((1, 65), jnp.int32), "65 long, the context is 64"),
    ],
    ids=["axes", "empty", "large", "negative", "long"],
)
def test_unfit_tokens_are_refused(params, tokens, message):
    with pytest.raises(ValueError, match=message):
        llama.forward(CONFIG, params, tokens)


def test_tokens_that_are_no_integers_are_refused(params):
    with pytest.raises(TypeError, match="must be integers; got the dtype float32"):
        llama.forward(CONFIG, params, jnp.zeros((1, 3)))


def test_unfit_parameters_are_refused_with_the_path(params, tokens):
    norm = {"scale": jnp.ones(23)}
    with pytest.raises(
        ValueError, match=r"at `norm/scale` got \(23,\), expected \(24,"
    ):
        llama.forward(CONFIG, params | {"norm": norm}, tokens)
    with pytest.raises(ValueError, match="tree structure"):
        llama.Llama(CONFIG, {"embed": params["embed"]})
    with pytest.raises(ValueError, match="`count` must be 0 to 3, the layers of"):
        llama.last_layers(CONFIG, params, 4)
    with pytest.raises(ValueError, match="`layers` must be 0 to 3, the layers of"):
        llama.trunk(CONFIG, params, tokens, 4)
    with pytest.raises(ValueError, match=r"must be \[batch, time, 24\]; got \(3, 11"):
        llama.rest(CONFIG, params, jnp.zeros((3, 11, 23)))


def test_unfit_caches_and_masks_are_refused(params, tokens):
    with pytest.raises(ValueError, match=r"`mask` must have the shape \(3, 11\)"):
        llama.forward(CONFIG, params, tokens, mask=jnp.ones((3, 10), bool))
    with pytest.raises(ValueError, match="10 free slots of 10, `tokens` need 11"):
        cache = llama.empty_cache(CONFIG, 3, 10)
        llama.forward(CONFIG, params, tokens, cache=cache)
    cache = llama.empty_cache(CONFIG, 3, 15)
    _, cache = FORWARD(CONFIG, params, tokens, cache=cache)
    with pytest.raises(ValueError, match="4 free slots of 15, `tokens` need 11"):
        llama.forward(CONFIG, params, tokens, cache=cache)
    with pytest.raises(ValueError, match="made by `empty_cache` for this config"):
        llama.forward(CONFIG, params, tokens[:2], cache=cache)


def test_unfit_adapters_are_refused(params, tokens, targets):
    adapters = adapters_of("lora", targets, KERNELS[:1])
    (adapter,) = adapters.values()
    with pytest.raises(ValueError, match="need their `targets`"):
        llama.forward(CONFIG, params, tokens, adapters)
    with pytest.raises(ValueError, match="`q/kernel`, which no adapter can be applied"):
        llama.forward(CONFIG, params, tokens, {"q/kernel": adapter}, targets)
    with pytest.raises(
        ValueError, match="`targets` has no scale for `layers/v/kernel`"
    ):
        llama.forward(
            CONFIG,
            params,
            tokens,
            {"layers/v/kernel": adapter},
            lora.targets(
                params, {"q": 2}, alpha=1.0, matrices=matrix_views(stacked="layers")
            ),
        )
    cut = jax.tree.map(lambda leaf: leaf[:2], adapters)
    with pytest.raises(ValueError, match="3 layers as its leading axis"):
        llama.forward(CONFIG, params, tokens, cut, targets)
