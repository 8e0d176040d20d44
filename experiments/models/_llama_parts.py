"""A decoder cut in two: the trunk, computed once, and the last layers, trained."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp

from experiments.models._llama_config import (
    LlamaConfig,
    check_adapters,
    check_params,
    check_tokens,
)
from experiments.models._llama_layer import layers as run
from experiments.models._llama_layer import rms_norm, sight
from optax_cl._core import checks


def last_layers(
    config: LlamaConfig, params: Mapping[str, Any], count: int
) -> tuple[LlamaConfig, dict[str, Any]]:
    """Sizes and parameters for ``rest``: the last layers, with embedding and last norm.

    Args:
      config: Sizes of the whole model.
      params: Its parameters.
      count: How many layers to keep.

    Returns:
      Sizes and parameters of the part, the latter with the paths of a whole model.

    Raises:
      ValueError: If the model has fewer layers.
    """
    checks.check_positive_int("count", count)
    _check_count(config, "count", count)
    check_params(config, params)
    kept = jax.tree.map(lambda leaf: leaf[config.layers - count :], params["layers"])
    return dataclasses.replace(config, layers=count), {**params, "layers": kept}


def trunk(
    config: LlamaConfig, params: Mapping[str, Any], tokens: chex.Array, layers: int
) -> chex.Array:
    """The residual stream after the first layers, which ``rest`` goes on with.

    Where only the last layers are trained, it is the same in every step and need be
    computed only once for each text.

    Args:
      config: Sizes of the whole model.
      params: Its parameters.
      tokens: Integers ``[batch, time]``, padded on the right if at all.
      layers: How many layers to run; after none of them the stream is the embedding.

    Returns:
      The stream ``[batch, time, width]``.

    Raises:
      ValueError: If shapes don't fit, or the model has fewer layers.
      TypeError: If the tokens aren't integers.
    """
    check_params(config, params)
    check_tokens(config, tokens, None)
    _check_count(config, "layers", layers)
    x = params["embed"]["embedding"][tokens]
    first = jax.tree.map(lambda leaf: leaf[:layers], params["layers"])
    return run(config, first, x, {}, None, _plain_sight(config, x))[0]


def rest(
    config: LlamaConfig,
    params: Mapping[str, Any],
    stream: chex.Array,
    adapters: Mapping[str, Any] | None = None,
    targets: Any = None,
    where: chex.Array | None = None,
) -> chex.Array:
    """What the head reads, from the stream that enters the last layers.

    Args:
      config: Sizes of the part, of ``last_layers``.
      params: Its parameters.
      stream: The stream that enters it, ``[batch, time, width]``, of ``trunk``.
      adapters: As in ``forward``, of these layers.
      targets: As in ``forward``.
      where: Integers ``[batch, asked]``, the tokens to read; all without it. The last
        layer computes keys and values of all tokens, and the rest for these alone.

    Returns:
      Features ``[batch, time or asked, width]``.

    Raises:
      ValueError: If shapes don't fit, or an adapter belongs to no kernel.

    Example:
      >>> from experiments.models import llama
      >>> config = LlamaConfig.tiny()
      >>> params = llama.init(config, jax.random.key(0))
      >>> tokens = jnp.zeros([2, 5], jnp.int32)
      >>> stream = trunk(config, params, tokens, 2)
      >>> rest(*last_layers(config, params, 1), stream).shape
      (2, 5, 24)
    """
    check_params(config, params)
    if stream.ndim != 3 or stream.shape[2] != config.width:
        raise ValueError(
            f"`stream` must be [batch, time, {config.width}]; got {stream.shape}."
        )
    adapters = {} if adapters is None else dict(adapters)
    check_adapters(config, adapters, targets)
    view = _plain_sight(config, stream)
    x, _ = run(config, params["layers"], stream, adapters, targets, view, where=where)
    return rms_norm(x, params["norm"]["scale"], config.norm_eps)


def _check_count(config, name, count):
    if not 0 <= count <= config.layers:
        raise ValueError(
            f"`{name}` must be 0 to {config.layers}, the layers of the model; got "
            f"{count}."
        )


def _plain_sight(config, x):
    """What tokens see without padding before them and without a past."""
    shape = x.shape[:2]
    positions = jnp.broadcast_to(jnp.arange(shape[1]), shape)
    return sight(config, positions, jnp.ones(shape, bool))
