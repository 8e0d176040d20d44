"""Which leaves of a tree are the input-side factors of adapters."""

import re
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from optax_cl._core import checks
from optax_cl.lora import _checks

FACTORS = r"(^|/)(a|lora_a)$"  # `LoRA.a` here, and in `flax.nnx.LoRA`


def is_factor(factors: str, path: Any) -> bool:
    """Whether the leaf at a path is an input-side factor."""
    return re.search(factors, checks.path_str(path)) is not None


def map_factors(
    method: str,
    factors: str,
    function: Callable[[chex.Array], Any],
    params: chex.ArrayTree,
) -> Any:
    """Maps over the factors, ``[*batch, in, r]``; ``MaskedNode`` at other leaves.

    Raises:
      ValueError: For a whole ``Start``, if a tree with leaves has no factor, or if a
        factor is a vector.
      TypeError: If a factor is not floating point.
    """
    _checks.check_not_start(params)
    seen = {}

    def one(path, leaf):
        name = checks.path_str(path)
        seen[name] = is_factor(factors, path)
        if not seen[name]:
            return optax.MaskedNode()
        what = (
            f"`{method}` takes `{name}` for the input-side factor of an adapter, a "
            "floating-point [*batch, in, r], but "
        )
        fix = "Say which leaves are factors with `factors=`."
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(f"{what}it holds {jnp.result_type(leaf)}. {fix}")
        if jnp.ndim(leaf) < 2:
            raise ValueError(f"{what}its shape is {jnp.shape(leaf)}. {fix}")
        return function(leaf)

    mapped = jax.tree_util.tree_map_with_path(one, params)
    if seen and not any(seen.values()):
        shown = ", ".join(f"`{path}`" for path in list(seen)[:6])
        raise ValueError(
            f"`factors={factors!r}` finds no input-side factor for `{method}` among "
            f"{shown}{', ...' if len(seen) > 6 else ''}. It acts on the `a` of `LoRA` "
            "adapters."
        )
    return mapped
