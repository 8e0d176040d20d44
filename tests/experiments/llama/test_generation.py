"""Generation: greedy and sampled, ragged prompts, the stop token."""

import chex
import jax
import numpy as np
import pytest
from scipy.special import softmax

from experiments.models import generation, llama
from tests.experiments.llama.tiny import (
    CONFIG,
    FORWARD,
    KERNELS,
    adapters_of,
)


def continued(params, tokens, steps, **kwargs):
    """Takes the likeliest token of a full pass over everything so far."""
    batch, time = tokens.shape
    # What comes after doesn't matter, so that one length compiles once.
    tokens = np.concatenate([tokens, np.zeros((batch, 17 - time), np.int32)], 1)
    for t in range(time, time + steps):
        logits = FORWARD(CONFIG, params, tokens, **kwargs)
        tokens[:, t] = np.asarray(logits)[:, t - 1].argmax(-1)
    return tokens[:, time : time + steps]


def test_greedy_generation_takes_the_likeliest_token_each_time(params, tokens, targets):
    adapters = adapters_of("lora", targets, KERNELS[:2])
    for extra in ({}, {"adapters": adapters, "targets": targets}):
        found = generation.generate(CONFIG, params, tokens, 6, **extra)
        np.testing.assert_array_equal(found, continued(params, tokens, 6, **extra))


def test_ragged_prompts_are_continued_as_if_alone(params, tokens):
    pads = np.array([0, 4, 7])
    mask = np.arange(11) >= pads[:, None]
    found = generation.generate(CONFIG, params, tokens * mask, 4, mask=mask)
    for i, n in enumerate(pads):
        alone = continued(params, tokens[i : i + 1, n:], 4)[0]
        np.testing.assert_array_equal(found[i], alone)


def test_after_the_stop_token_there_is_nothing_else(params, tokens):
    free = np.asarray(generation.generate(CONFIG, params, tokens, 8))
    stop = int(free[0, 3])
    found = np.asarray(generation.generate(CONFIG, params, tokens, 8, stop=stop))
    for row, whole in zip(found, free, strict=True):
        at = list(whole).index(stop) if stop in whole else 8
        np.testing.assert_array_equal(row[:at], whole[:at])
        assert (row[at:] == stop).all()
    assert (found[0] == stop).any()


def test_sampling_follows_the_probabilities_and_the_key(params, tokens):
    prompt = tokens[:1, :3]
    many = np.tile(prompt, (4000, 1))

    def draw(seed, heat):
        key = jax.random.key(seed)
        drawn = generation.generate(CONFIG, params, many, 1, key=key, temperature=heat)
        return np.asarray(drawn)[:, 0]

    logits = np.asarray(FORWARD(CONFIG, params, prompt))[0, -1]
    drawn = {heat: draw(0, heat) for heat in (1.0, 0.3)}
    for heat, found in drawn.items():
        shares = np.bincount(found, minlength=64) / 4000
        expected = softmax(logits / heat)
        # Five standard errors of a share.
        assert (np.abs(shares - expected) < 5 * np.sqrt(expected / 4000) + 1e-3).all()
    np.testing.assert_array_equal(draw(0, 1.0), drawn[1.0])
    assert (draw(1, 1.0) != drawn[1.0]).any()


def test_one_compilation_decodes_any_number_of_tokens(params, tokens):
    chex.clear_trace_counter()
    traced = chex.assert_max_traces(llama.forward, n=1)
    step = jax.jit(traced, static_argnums=0)
    cache = llama.empty_cache(CONFIG, 3, 11)
    for t in range(11):
        _, cache = step(CONFIG, params, tokens[:, t : t + 1], cache=cache)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"steps": 0}, "`steps` must be at least 1"),
        ({"steps": 54}, "longer than the context of 64"),
        ({"temperature": -1.0}, "`temperature`"),
        ({"temperature": 1.0}, "needs a `key`"),
        ({"stop": 64}, "`stop` must be a token, 0 to 63; got 64"),
        (
            {"mask": np.arange(11)[None] < np.array([[11], [11], [9]])},
            "Pad on the left",
        ),
    ],
    ids=str,
)
def test_unfit_requests_for_generation_are_refused(params, tokens, kwargs, message):
    with pytest.raises(ValueError, match=message):
        generation.generate(CONFIG, params, tokens, **{"steps": 3, **kwargs})
