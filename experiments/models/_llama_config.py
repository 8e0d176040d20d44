"""Sizes of a Llama-family decoder, the shapes they imply, checks on its input."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from optax_cl._core import checks

KERNELS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes of the model.

    Attributes:
      vocabulary: Number of tokens.
      layers: Number of layers.
      width: Width of the residual stream; a multiple of ``heads``.
      heads: Number of query heads; a multiple of ``kv_heads``.
      kv_heads: Number of key and value heads.
      hidden: Width of the feed-forward layers.
      context: Longest sequence.
      rope_theta: Base of the rotary frequencies.
      norm_eps: Added to the mean square before its root is taken.
      remat: Whether the backward pass computes each layer's activations again instead
        of storing them: memory of one layer, time of one more forward pass.
    """

    vocabulary: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    hidden: int
    context: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    remat: bool = False

    def __post_init__(self):
        """Checks the sizes."""
        sizes = ("vocabulary", "layers", "width", "heads", "kv_heads", "hidden")
        for name in (*sizes, "context"):
            checks.check_positive_int(name, getattr(self, name))
        for name in ("rope_theta", "norm_eps"):
            checks.check_number(name, getattr(self, name), low=0.0, open_low=True)
        for whole, part in (("width", "heads"), ("heads", "kv_heads")):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(
                    f"`{whole}` must be a multiple of `{part}`; got "
                    f"{getattr(self, whole)} and {getattr(self, part)}."
                )
        if self.head_dim % 2:
            raise ValueError(
                "`width // heads` must be even, since coordinates are rotated in "
                f"pairs; got {self.head_dim}."
            )

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.width // self.heads

    @classmethod
    def smollm2_135m(cls) -> "LlamaConfig":
        """The sizes of SmolLM2-135M."""
        return cls(
            vocabulary=49_152,
            layers=30,
            width=576,
            heads=9,
            kv_heads=3,
            hidden=1536,
            context=8192,
            rope_theta=100_000.0,
        )

    @classmethod
    def tiny(cls) -> "LlamaConfig":
        """A model of the same form for tests, 15 thousand parameters."""
        return cls(
            vocabulary=64,
            layers=3,
            width=24,
            heads=6,
            kv_heads=2,
            hidden=40,
            context=64,
        )


class Cache(NamedTuple):
    """Keys and values of the tokens seen, for generation.

    Attributes:
      keys: ``[layers, batch, capacity, kv_heads, head_dim]``, rotated.
      values: ``[layers, batch, capacity, kv_heads, head_dim]``.
      valid: ``[batch, capacity]`` bool; false for padding and for free slots.
      length: ``[]`` int32; slots in use.
    """

    keys: chex.Array
    values: chex.Array
    valid: chex.Array
    length: chex.Array


def abstract_params(config: LlamaConfig, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Shapes and dtype of the parameters, as a tree of ``jax.ShapeDtypeStruct``."""
    width, hidden = config.width, config.hidden
    kv_width = config.kv_heads * config.head_dim
    leaf = partial(jax.ShapeDtypeStruct, dtype=dtype)

    def kernel(*shape):
        return {"kernel": leaf((config.layers, *shape))}

    return {
        "embed": {"embedding": leaf((config.vocabulary, width))},
        "layers": {
            "norm_attention": {"scale": leaf((config.layers, width))},
            "q": kernel(width, width),
            "k": kernel(width, kv_width),
            "v": kernel(width, kv_width),
            "o": kernel(width, width),
            "norm_hidden": {"scale": leaf((config.layers, width))},
            "gate": kernel(width, hidden),
            "up": kernel(width, hidden),
            "down": kernel(hidden, width),
        },
        "norm": {"scale": leaf((width,))},
    }


def empty_cache(
    config: LlamaConfig, batch: int, capacity: int, dtype: Any = jnp.float32
) -> Cache:
    """A cache of ``capacity`` free slots.

    Args:
      config: Sizes of the model.
      batch: Number of sequences.
      capacity: Tokens that fit in.
      dtype: Dtype of keys and values; that of the embedding.

    Returns:
      The cache; memory: ``2 * layers * batch * capacity * kv_heads * head_dim``.
    """
    checks.check_positive_int("batch", batch)
    checks.check_positive_int("capacity", capacity)
    shape = (config.layers, batch, capacity, config.kv_heads, config.head_dim)
    zeros = jnp.zeros(shape, dtype)
    free = jnp.zeros((batch, capacity), bool)
    return Cache(zeros, zeros, free, jnp.zeros((), jnp.int32))


def check_params(config: LlamaConfig, params: Any) -> None:
    """Raises unless the parameters have the paths and shapes that the sizes ask for."""
    expected = abstract_params(config)
    checks.check_same_shapes("params", params, expected, "a model of this `config`")


def is_known(x: Any) -> bool:
    """Whether the values can be looked at, by NumPy: JAX would trace even that."""
    return not isinstance(x, jax.core.Tracer)


def check_tokens(
    config: LlamaConfig, tokens: chex.Array, mask: chex.Array | None
) -> None:
    """Raises unless the model can read these tokens."""
    shape = jnp.shape(tokens)
    if len(shape) != 2 or 0 in shape:
        raise ValueError(
            f"`tokens` must be [batch, time], neither of them zero; got the shape "
            f"{shape}."
        )
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"`tokens` must be integers; got the dtype {tokens.dtype}.")
    if mask is not None and jnp.shape(mask) != shape:
        raise ValueError(
            f"`mask` must have the shape {shape} of `tokens`; got {jnp.shape(mask)}."
        )
    if is_known(tokens):
        known = np.asarray(tokens)
        low, high = known.min(), known.max()
        if low < 0 or high >= config.vocabulary:
            raise ValueError(
                f"`tokens` must lie in 0 to {config.vocabulary - 1}; got {low} to "
                f"{high}. Was another tokenizer used?"
            )
    if shape[1] > config.context:
        raise ValueError(
            f"`tokens` are {shape[1]} long, the context is {config.context}. Cut them."
        )


def check_cache(config: LlamaConfig, cache: Cache, batch: int, time: int) -> None:
    """Raises unless ``[batch, time]`` tokens fit into the cache."""
    layout = (config.layers, batch, config.kv_heads, config.head_dim)
    capacity = cache.keys.shape[2]
    if cache.keys.shape[:2] + cache.keys.shape[3:] != layout:
        raise ValueError(
            "`cache` must be made by `empty_cache` for this config and batch: "
            f"[layers, batch, capacity, kv_heads, head_dim] with {layout} around the "
            f"capacity; got {cache.keys.shape}."
        )
    used = int(cache.length) if is_known(cache.length) else 0
    if used + time > capacity:
        raise ValueError(
            f"`cache` has {capacity - used} free slots of {capacity}, `tokens` need "
            f"{time}. Make it larger: `empty_cache(config, batch, capacity)`."
        )


def check_adapters(
    config: LlamaConfig, adapters: Mapping[str, Any], targets: Any
) -> None:
    """Raises unless every adapter has its kernel and its scale."""
    if not adapters:
        return
    if targets is None:
        raise ValueError(
            "`adapters` need their `targets`, which hold the scales; got None."
        )
    known = [f"layers/{name}/kernel" for name in KERNELS]
    for path, adapter in adapters.items():
        if path not in known:
            raise ValueError(
                f"`adapters` names `{path}`, which no adapter can be applied to; there "
                f"are {', '.join(known)}."
            )
        if path not in targets:
            raise ValueError(
                f"`targets` has no scale for `{path}`, which `adapters` names. Pass "
                "the targets that the adapters were made for."
            )
        for leaf in jax.tree.leaves(adapter):
            if jnp.shape(leaf)[:1] != (config.layers,):
                raise ValueError(
                    f"The adapter of `{path}` must have the {config.layers} layers as "
                    f"its leading axis; got a leaf of shape {jnp.shape(leaf)}. Make "
                    "it from these params with `matrix_views(stacked='layers')`."
                )
