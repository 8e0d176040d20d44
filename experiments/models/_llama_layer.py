"""The layers of a Llama-family decoder: norms, rotary attention, SwiGLU."""

from collections.abc import Callable, Mapping
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from experiments.models._llama_config import LlamaConfig
from optax_cl import lora

Past = tuple[chex.Array, chex.Array]


class Sight(NamedTuple):
    """Where the tokens stand and what they see; the same in every layer."""

    cos: chex.Array  # [batch, time, 1, head_dim / 2]
    sin: chex.Array  # [batch, time, 1, head_dim / 2]
    visible: chex.Array  # bool [batch, 1, time, slots]
    start: chex.Array | int  # [] int32, slot of the first of these tokens


def sight(
    config: LlamaConfig,
    positions: chex.Array,
    seen: chex.Array,
    start: chex.Array | int = 0,
) -> Sight:
    """What each token sees: the slots up to its own, except for padding.

    Args:
      config: Sizes of the model.
      positions: Integers ``[batch, time]``.
      seen: Bool ``[batch, slots]``, false for padding.
      start: Slot of the first token.

    Returns:
      Turns of the angles p theta^(-2j / dim), and who sees whom.
    """
    exponents = jnp.arange(0, config.head_dim, 2) / config.head_dim
    frequencies = config.rope_theta ** -exponents[None, None, None]
    angles = positions[..., None, None] * frequencies
    slots, own = jnp.arange(seen.shape[1]), start + jnp.arange(positions.shape[1])
    causal = slots[None, :] <= own[:, None]
    visible = (causal[None] & seen[:, None])[:, None]
    return Sight(jnp.cos(angles), jnp.sin(angles), visible, start)


def layers(
    config: LlamaConfig,
    params: Mapping[str, Any],
    x: chex.Array,
    adapters: Mapping[str, Any],
    targets: Any,
    sight: Sight,
    past: Past | None = None,
    where: chex.Array | None = None,
) -> tuple[chex.Array, Past | None]:
    """The residual stream after a stack of layers.

    Args:
      config: Sizes of the model.
      params: Parameters of the layers, stacked.
      x: The stream before them, ``[batch, time, width]``.
      adapters: Path of a kernel to its adapter, stacked.
      targets: The adapters' ``optax_cl.lora.Targets``.
      sight: What the tokens see.
      past: Keys and values of earlier tokens, stacked.
      where: Integers ``[batch, asked]``; with it only these tokens come out.

    Returns:
      The stream, ``[batch, time or asked, width]``, and the past with these tokens.
    """
    scales = {path: targets[path].scale for path in adapters}

    def one(x, stacked, where=None):
        own, adapters, past = stacked
        return layer(config, own, x, adapters, scales, sight, past, where)

    if config.remat:
        one = jax.checkpoint(one, prevent_cse=False)
    stacked = params, dict(adapters), past
    if where is None:
        return jax.lax.scan(one, x, stacked)
    before, last = (jax.tree.map(itemgetter(i), stacked) for i in (slice(-1), -1))
    x, past = jax.lax.scan(one, x, before)
    x, own = one(x, last, where)
    if past is not None:
        past = jax.tree.map(lambda a, b: jnp.append(a, b[None], 0), past, own)
    return x, past


def layer(
    config: LlamaConfig,
    params: Mapping[str, Any],
    x: chex.Array,
    adapters: Mapping[str, Any],
    scales: Mapping[str, Any],
    sight: Sight,
    past: Past | None = None,
    where: chex.Array | None = None,
) -> tuple[chex.Array, Past | None]:
    """The residual stream after one layer.

    Args:
      config: Sizes of the model.
      params: Parameters of this layer.
      x: The stream before it, ``[batch, time, width]``.
      adapters: Path of a kernel to this layer's adapter.
      scales: Path of a kernel to the adapter's scale.
      sight: What the tokens see.
      past: Keys and values of earlier tokens, ``[batch, capacity, kv_heads,
        head_dim]`` each.
      where: Integers ``[batch, asked]``; with it only these tokens come out. All are
        attended to.

    Returns:
      The stream, ``[batch, time or asked, width]``, and the past with these tokens.
    """

    def dense(name, x):
        path = f"layers/{name}/kernel"
        adapter, scale = adapters.get(path), scales.get(path, 1.0)
        y = lora.dense(x, params[name]["kernel"], adapter, scale)
        # Adapters may have a wider dtype than the model.
        return y.astype(x.dtype)

    def norm(name, x):
        return rms_norm(x, params[name]["scale"], config.norm_eps)

    def pick(y):
        if where is None:
            return y
        index = where.reshape(*where.shape, *[1] * (y.ndim - 2))
        return jnp.take_along_axis(y, index, axis=1)

    normed = norm("norm_attention", x)
    attended, past = _attention(config, dense, normed, past, sight, pick)
    x = pick(x) + attended
    normed = norm("norm_hidden", x)
    gated = jax.nn.silu(dense("gate", normed)) * dense("up", normed)
    return x + dense("down", gated), past


def _attention(
    config: LlamaConfig,
    dense: Callable[[str, chex.Array], chex.Array],
    x: chex.Array,
    past: Past | None,
    sight: Sight,
    pick: Callable[[chex.Array], chex.Array],
) -> tuple[chex.Array, Past | None]:
    """Grouped-query attention of the picked tokens, and the layer's new past."""

    def split(y, heads):
        return y.reshape(*y.shape[:2], heads, config.head_dim)

    turns = sight.cos, sight.sin
    asked = split(dense("q", pick(x)), config.heads)
    query = rotate(asked, (pick(sight.cos), pick(sight.sin)))
    key = rotate(split(dense("k", x), config.kv_heads), turns)
    value = split(dense("v", x), config.kv_heads)
    if past is not None:
        at = (0, sight.start, 0, 0)
        write = partial(jax.lax.dynamic_update_slice, start_indices=at)
        past = key, value = write(past[0], key), write(past[1], value)
    mask = pick(sight.visible[:, 0])[:, None]
    attended = jax.nn.dot_product_attention(query, key, value, mask=mask)
    return dense("o", attended.reshape(*attended.shape[:2], -1)), past


def rms_norm(x: chex.Array, scale: chex.Array, eps: float) -> chex.Array:
    """Divides by the root mean square of the last axis, in float32, and scales."""
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + eps)
    scale = jnp.expand_dims(scale.astype(jnp.float32), range(x.ndim - 1))
    return (wide * inverse * scale).astype(x.dtype)


def rotate(x: chex.Array, turns: tuple[chex.Array, chex.Array]) -> chex.Array:
    """Turns coordinates j and j + dim / 2 of ``[batch, time, heads, dim]`` together."""
    cos, sin = turns
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return turned.astype(x.dtype)
