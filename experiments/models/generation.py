"""Continuing a prompt with a Llama-family decoder, in one compiled loop."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from experiments.models._llama_config import (
    LlamaConfig,
    check_tokens,
    empty_cache,
    is_known,
)
from experiments.models.llama import features, unembed
from optax_cl._core import checks


def generate(
    config: LlamaConfig,
    params: Mapping[str, Any],
    tokens: chex.Array,
    steps: int,
    *,
    key: chex.PRNGKey | None = None,
    temperature: float = 0.0,
    stop: int | None = None,
    adapters: Mapping[str, Any] | None = None,
    targets: Any = None,
    mask: chex.Array | None = None,
) -> chex.Array:
    """Continues each prompt by ``steps`` tokens, in one compiled loop.

    Args:
      config: Sizes of the model.
      params: Its parameters.
      tokens: Prompts, integers ``[batch, time]``; shorter ones are padded on the
        *left*.
      steps: How many tokens to add at most.
      key: PRNG key, needed for a positive temperature.
      temperature: The logits are divided by it before a token is drawn; zero takes the
        likeliest token.
      stop: Token after which a sequence is finished. The loop ends once all are.
      adapters: As in ``forward``.
      targets: As in ``forward``.
      mask: Bool ``[batch, time]``, false for padding.

    Returns:
      The tokens added, int32 ``[batch, steps]``; after ``stop`` only ``stop``.

    Raises:
      ValueError: If the result would be longer than the context, a temperature lacks a
        key, or a prompt ends with padding; and as in ``forward``.
    """
    checks.check_positive_int("steps", steps)
    checks.check_number("temperature", temperature, low=0.0)
    check_tokens(config, tokens, mask)
    if tokens.shape[1] + steps > config.context:
        raise ValueError(
            f"`tokens` of length {tokens.shape[1]} and {steps} `steps` are longer than "
            f"the context of {config.context}. Ask for fewer, or shorten the prompt."
        )
    if temperature > 0 and key is None:
        raise ValueError("A positive `temperature` draws tokens and needs a `key`.")
    if mask is not None and is_known(mask) and not np.asarray(mask)[:, -1].all():
        raise ValueError(
            "`mask` says that a prompt ends with padding, so that its continuation "
            "would follow the padding. Pad on the left."
        )
    if stop is not None and not 0 <= stop < config.vocabulary:
        raise ValueError(
            f"`stop` must be a token, 0 to {config.vocabulary - 1}; got {stop}."
        )
    return _generate(
        config,
        params,
        jnp.asarray(tokens),
        steps,
        key if temperature > 0 else None,
        temperature,
        stop,
        adapters,
        targets,
        mask,
    )


@partial(jax.jit, static_argnames=("config", "steps", "stop"))
def _generate(
    config, params, tokens, steps, key, temperature, stop, adapters, targets, mask
):
    batch, time = tokens.shape
    dtype = params["embed"]["embedding"].dtype
    cache = empty_cache(config, batch, time + steps, dtype)

    def advance(tokens, cache, mask=None):
        hidden, cache = features(
            config, params, tokens, adapters, targets, cache, mask=mask
        )
        return unembed(params, hidden[:, -1]), cache

    def pick(logits, index):
        if key is None:
            return logits.argmax(-1).astype(jnp.int32)
        drawn = jax.random.fold_in(key, index)
        return jax.random.categorical(drawn, logits / temperature).astype(jnp.int32)

    def unfinished(carry):
        index, _, _, done, _ = carry
        return (index < steps) & ~done.all()

    def step(carry):
        index, token, added, done, cache = carry
        logits, cache = advance(token[:, None], cache)
        token = jnp.where(done, added[:, index], pick(logits, index))
        return index + 1, token, added.at[:, index].set(token), ends(done, token), cache

    def ends(done, token):
        return done if stop is None else done | (token == stop)

    logits, cache = advance(tokens, cache, mask)
    token = pick(logits, 0)
    added = jnp.full((batch, steps), 0 if stop is None else stop, jnp.int32)
    added = added.at[:, 0].set(token)
    done = ends(jnp.zeros(batch, bool), token)
    return jax.lax.while_loop(unfinished, step, (1, token, added, done, cache))[2]
