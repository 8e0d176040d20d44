"""A small causal transformer over bytes.

Pre-norm blocks (RMSNorm without biases), learned positions, GELU feed-forward layers
and an *untied* head, so that the last layer is a kernel like any other and a method
that protects kernels can protect it. Every kernel is a matrix ``[in, out]``; the
embeddings are lookup tables ``[vocabulary, width]`` and ``[context, width]``.
"""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx

VOCABULARY = 256


class ByteLMConfig(NamedTuple):
    """Sizes of the model.

    Attributes:
      layers: Number of transformer blocks.
      width: Width of the residual stream; a multiple of ``heads``.
      heads: Number of attention heads.
      hidden: Width of the feed-forward layers.
      context: Longest input, in bytes.
    """

    layers: int
    width: int
    heads: int
    hidden: int
    context: int


SMALL = ByteLMConfig(layers=2, width=32, heads=2, hidden=64, context=32)
FULL = ByteLMConfig(layers=12, width=768, heads=12, hidden=3072, context=1024)


class Block(nnx.Module):
    """Attention and a feed-forward layer, each normalised first and added."""

    def __init__(self, config: ByteLMConfig, rngs: nnx.Rngs):
        """Initializes the block."""
        width, hidden = config.width, config.hidden
        self.heads = config.heads
        self.norm_attention = nnx.RMSNorm(width, rngs=rngs)
        self.query_key_value = _linear(width, 3 * width, rngs)
        self.attention_out = _linear(width, width, rngs)
        self.norm_hidden = nnx.RMSNorm(width, rngs=rngs)
        self.hidden_in = _linear(width, hidden, rngs)
        self.hidden_out = _linear(hidden, width, rngs)

    def __call__(self, x: chex.Array) -> chex.Array:
        """Maps ``[batch, time, width]`` to the same shape."""
        split = (*x.shape[:2], 3 * self.heads, -1)
        qkv = self.query_key_value(self.norm_attention(x)).reshape(split)
        query, key, value = jnp.split(qkv, 3, axis=2)
        attended = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(attended.reshape(x.shape))
        return x + self.hidden_out(jax.nn.gelu(self.hidden_in(self.norm_hidden(x))))


class ByteLM(nnx.Module):
    """Next-byte logits of a byte sequence."""

    def __init__(self, config: ByteLMConfig, rngs: nnx.Rngs):
        """Initializes the model."""
        self.tokens = nnx.Embed(VOCABULARY, config.width, rngs=rngs)
        self.positions = nnx.Embed(config.context, config.width, rngs=rngs)
        self.blocks = nnx.List([Block(config, rngs) for _ in range(config.layers)])
        self.norm = nnx.RMSNorm(config.width, rngs=rngs)
        self.head = _linear(config.width, VOCABULARY, rngs)

    def __call__(self, tokens: chex.Array) -> chex.Array:
        """Maps integers ``[batch, time]`` to logits ``[batch, time, 256]``."""
        x = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1])[None])
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Functions(NamedTuple):
    """The model as pure functions.

    Attributes:
      init: Takes a PRNG key to parameters, nested dictionaries of arrays.
      apply: Takes parameters and bytes ``[batch, time]`` to logits
        ``[batch, time, 256]``; position ``i`` sees the bytes up to ``i``.
    """

    init: Callable[[chex.PRNGKey], chex.ArrayTree]
    apply: Callable[[chex.ArrayTree, chex.Array], chex.Array]


def byte_lm(config: ByteLMConfig) -> Functions:
    """Builds the model as functions of a plain tree of parameters.

    Args:
      config: Sizes of the model.

    Returns:
      ``init`` and ``apply``.

    Raises:
      ValueError: If a size is not positive or ``width`` is no multiple of ``heads``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> model = byte_lm(SMALL)
      >>> params = model.init(jax.random.key(0))
      >>> model.apply(params, jnp.zeros([4, 32], jnp.uint8)).shape
      (4, 32, 256)
    """
    for name, size in config._asdict().items():
        if size < 1:
            raise ValueError(f"`{name}` must be at least 1; got {size}.")
    if config.width % config.heads:
        raise ValueError(
            f"`width` must be a multiple of `heads`; got {config.width} and "
            f"{config.heads}."
        )
    abstract = nnx.eval_shape(lambda: ByteLM(config, nnx.Rngs(0)))
    definition, _ = nnx.split(abstract, nnx.Param)

    def init(key):
        model = ByteLM(config, nnx.Rngs(key))
        return nnx.to_pure_dict(nnx.state(model, nnx.Param))

    def apply(params, tokens):
        model = nnx.merge(definition, nnx.State(params))
        return model(tokens.astype(jnp.int32))

    return Functions(init, apply)


def next_byte_loss(logits: chex.Array, targets: chex.Array) -> chex.Array:
    """Mean cross-entropy in nats: logits ``[..., 256]``, integer targets ``[...]``."""
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    picked = jnp.take_along_axis(log_probs, targets[..., None].astype(jnp.int32), -1)
    return -picked.mean()


def _linear(fan_in: int, fan_out: int, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(fan_in, fan_out, use_bias=False, rngs=rngs)
