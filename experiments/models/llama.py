"""A decoder of the Llama family, as pure functions and as one Flax NNX module.

RMSNorm before each half-layer, rotary positions, grouped-query attention, SwiGLU, and a
head tied to the embedding. With ``r(x) = x / sqrt(mean(x^2) + eps) * scale``, a layer
is

    h = x + o(attention(rotate(q(r(x))), rotate(k(r(x))), v(r(x))))
    y = h + down(silu(gate(r(h))) * up(r(h)))

All layers are *stacked*: every kernel is ``[layers, in, out]`` and one ``scan`` runs
them, so that the model compiles as fast as a single layer does. The parameters are a
plain nested dictionary:

=======================  ============================================
``embed/embedding``      ``[vocabulary, width]``, also the head
``layers/q/kernel``      ``[layers, width, heads * head_dim]``
``layers/k/kernel``      ``[layers, width, kv_heads * head_dim]``
``layers/v/kernel``      ``[layers, width, kv_heads * head_dim]``
``layers/o/kernel``      ``[layers, heads * head_dim, width]``
``layers/gate/kernel``   ``[layers, width, hidden]``
``layers/up/kernel``     ``[layers, width, hidden]``
``layers/down/kernel``   ``[layers, hidden, width]``
``layers/norm_attention/scale``, ``layers/norm_hidden/scale``  ``[layers, width]``
``norm/scale``           ``[width]``
=======================  ============================================

The rotation is the half-split one: coordinate ``j`` of a head turns with coordinate
``j + head_dim / 2``. Activations have the dtype of the embedding; norms, rotations, the
softmax and the logits are computed in float32.

References:
  Touvron et al., `LLaMA: Open and Efficient Foundation Language Models
  <https://arxiv.org/abs/2302.13971>`_, 2023

  Ainslie et al., `GQA: Training Generalized Multi-Query Transformer Models from
  Multi-Head Checkpoints <https://arxiv.org/abs/2305.13245>`_, 2023

  Su et al., `RoFormer: Enhanced Transformer with Rotary Position Embedding
  <https://arxiv.org/abs/2104.09864>`_, 2021
"""

from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from experiments.models._llama_config import (
    KERNELS,
    Cache,
    LlamaConfig,
    abstract_params,
    check_adapters,
    check_cache,
    check_params,
    check_tokens,
    empty_cache,
)
from experiments.models._llama_layer import layers, rms_norm, rotate, sight
from experiments.models._llama_parts import last_layers, rest, trunk

__all__ = [
    "KERNELS",
    "Cache",
    "Llama",
    "LlamaConfig",
    "abstract_params",
    "empty_cache",
    "features",
    "forward",
    "init",
    "last_layers",
    "next_token_loss",
    "rest",
    "rms_norm",
    "rotate",
    "trunk",
    "unembed",
]


def init(
    config: LlamaConfig, key: chex.PRNGKey, dtype: Any = jnp.float32
) -> dict[str, Any]:
    """Random parameters: kernels of variance 1 / in, a small embedding, scales of one.

    Args:
      config: Sizes of the model.
      key: PRNG key.
      dtype: Dtype of the parameters.

    Returns:
      The parameters, a nested dictionary.

    Example:
      >>> config = LlamaConfig.tiny()
      >>> params = init(config, jax.random.key(0))
      >>> params["layers"]["k"]["kernel"].shape
      (3, 24, 8)
      >>> forward(config, params, jnp.zeros([2, 5], jnp.int32)).shape
      (2, 5, 64)
    """
    paths_and_leaves, structure = jax.tree.flatten_with_path(
        abstract_params(config, dtype)
    )

    def draw(key, path, leaf):
        if path[-1].key == "scale":
            return jnp.ones(leaf.shape, leaf.dtype)
        scale = 0.02 if path[-1].key == "embedding" else leaf.shape[-2] ** -0.5
        return (scale * jax.random.normal(key, leaf.shape)).astype(leaf.dtype)

    keys = jax.random.split(key, len(paths_and_leaves))
    leaves = [draw(k, *pair) for k, pair in zip(keys, paths_and_leaves, strict=True)]
    return jax.tree.unflatten(structure, leaves)


def forward(
    config: LlamaConfig,
    params: Mapping[str, Any],
    tokens: chex.Array,
    adapters: Mapping[str, Any] | None = None,
    targets: Any = None,
    cache: Cache | None = None,
    positions: chex.Array | None = None,
    mask: chex.Array | None = None,
) -> Any:
    """Logits of the next token at every position.

    Args:
      config: Sizes of the model.
      params: Its parameters.
      tokens: Integers ``[batch, time]``. A token outside the vocabulary is an error
        where the values are known, and has undefined logits under ``jit``.
      adapters: Path of a kernel, ``"layers/q/kernel"``, to an adapter of
        ``optax_cl.lora`` whose leading axis is the layers'. A kernel without a path has
        no adapter.
      targets: The ``optax_cl.lora.Targets`` of the adapters; they hold the scales.
      cache: Keys and values of the tokens before these, of ``empty_cache``. It must
        have ``time`` free slots; with a length known only under ``jit`` this can't be
        checked.
      positions: Integers ``[batch, time]`` or ``[time]``; by default the number of real
        tokens before each.
      mask: Bool ``[batch, time]``, false for padding, which no token attends to. The
        logits at a padding token are finite and mean nothing.

    Returns:
      Logits ``[batch, time, vocabulary]``, float32; with a cache, the logits and the
      cache that these tokens were added to.

    Raises:
      ValueError: If shapes don't fit, the sequence is longer than the context or the
        cache, a token is outside the vocabulary, or an adapter belongs to no kernel.
      TypeError: If the tokens aren't integers.
    """
    hidden, new = features(
        config, params, tokens, adapters, targets, cache, positions, mask
    )
    logits = unembed(params, hidden)
    return logits if cache is None else (logits, new)


def features(
    config: LlamaConfig,
    params: Mapping[str, Any],
    tokens: chex.Array,
    adapters: Mapping[str, Any] | None = None,
    targets: Any = None,
    cache: Cache | None = None,
    positions: chex.Array | None = None,
    mask: chex.Array | None = None,
) -> tuple[chex.Array, Cache | None]:
    """What the head reads: the normalised output of the last layer.

    Args:
      config: As in ``forward``, like the other arguments.
      params: As in ``forward``.
      tokens: As in ``forward``.
      adapters: As in ``forward``.
      targets: As in ``forward``.
      cache: As in ``forward``.
      positions: As in ``forward``.
      mask: As in ``forward``.

    Returns:
      Features ``[batch, time, width]`` and the cache with these tokens, if there was
      one.
    """
    check_params(config, params)
    check_tokens(config, tokens, mask)
    if cache is not None:
        check_cache(config, cache, *tokens.shape)
    adapters = {} if adapters is None else adapters
    check_adapters(config, adapters, targets)
    valid = jnp.ones(tokens.shape, bool) if mask is None else mask.astype(bool)
    # Slots: where the tokens' keys stand. Positions: how many real tokens came before.
    start, seen, before = 0, valid, jnp.cumsum(valid, axis=1) - valid
    if cache is not None:
        start = cache.length
        seen = jax.lax.dynamic_update_slice(cache.valid, valid, (0, start))
        before += cache.valid.sum(axis=1, keepdims=True)
    positions = jnp.broadcast_to(
        before if positions is None else positions, tokens.shape
    )
    x = params["embed"]["embedding"][tokens]
    past = None if cache is None else (cache.keys, cache.values)
    view = sight(config, positions, seen, start)
    x, past = layers(config, params["layers"], x, adapters, targets, view, past)
    if past is not None:
        keys, values = past
        cache = Cache(keys, values, seen, start + tokens.shape[1])
    return rms_norm(x, params["norm"]["scale"], config.norm_eps), cache


def unembed(params: Mapping[str, Any], hidden: chex.Array) -> chex.Array:
    """Logits ``[..., vocabulary]``, float32, of features ``[..., width]``."""
    table = params["embed"]["embedding"]
    return jnp.einsum(
        "...d,vd->...v", hidden, table, preferred_element_type=jnp.float32
    )


def next_token_loss(
    logits: chex.Array, tokens: chex.Array, weights: chex.Array | None = None
) -> chex.Array:
    """Mean negative log-likelihood, in nats, of each token given those before it.

    Args:
      logits: Logits ``[batch, time, vocabulary]`` of ``forward(config, params,
        tokens)``.
      tokens: Integers ``[batch, time]``.
      weights: ``[batch, time]``; how much each token counts *as a target*, so that
        zeros leave out padding and prompts. The first token is never a target.

    Returns:
      The weighted mean, a float32 scalar; zero if all weights are.
    """
    log_probs = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
    picked = jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1)[..., 0]
    counts = jnp.ones_like(picked) if weights is None else weights[:, 1:]
    counts = counts.astype(jnp.float32)
    return -(picked * counts).sum() / jnp.maximum(counts.sum(), 1e-9)


class Llama(nnx.Module):
    """The same function and the same parameter paths as a Flax NNX module.

    Example:
      >>> config = LlamaConfig.tiny()
      >>> model = Llama(config, init(config, jax.random.key(0)))
      >>> model(jnp.zeros([2, 5], jnp.int32)).shape
      (2, 5, 64)
    """

    def __init__(self, config: LlamaConfig, params: Mapping[str, Any]):
        """Wraps parameters of ``init`` or of a file."""
        check_params(config, params)
        self.config = config
        self.embed = _variables(params["embed"])
        self.layers = _variables(params["layers"])
        self.norm = _variables(params["norm"])

    def params(self) -> dict[str, Any]:
        """The parameters as a plain dictionary, for ``forward`` and ``generate``."""
        return nnx.to_pure_dict(nnx.state(self, nnx.Param))

    def __call__(self, tokens: chex.Array, **kwargs: Any) -> Any:
        """``forward`` of this module's parameters, with its keyword arguments."""
        return forward(self.config, self.params(), tokens, **kwargs)


def _variables(tree: Mapping[str, Any]) -> nnx.Dict:
    return nnx.Dict(
        {
            name: _variables(node) if isinstance(node, Mapping) else nnx.Param(node)
            for name, node in tree.items()
        }
    )
