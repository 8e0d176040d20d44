"""Starts by a gradient: what the first step does with them, and a gradient too poor."""

import warnings

import jax
import numpy as np
import pytest

from experiments.models import llama
from optax_cl import lora, matrix_views

RNG = np.random.default_rng(0)


def low_rank(n, o, rank, scale=1.0):
    drawn = RNG.normal(size=(n, rank)) @ RNG.normal(size=(rank, o))
    return np.float32(scale * drawn)


def first_change(start, gradient, rate=1e-4):
    """What one step of SGD on the adapter adds to its product, per unit of the rate."""
    a, b = map(np.float64, start.adapters["w"])
    gradient = np.float64(gradient)
    a_new, b_new = a - rate * gradient @ b.T, b - rate * a.T @ gradient
    return (a_new @ b_new - a @ b) / rate


def cosine(x, y):
    return float((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y))


def test_the_first_step_of_lora_ga_goes_down_the_gradient_more_than_that_of_lora():
    params = {"w": np.float32(RNG.normal(size=(32, 24)))}
    chosen = lora.targets(params, {"w": 4}, alpha=4.0)
    g = RNG.normal(size=(32, 24))
    gradients = {"w": np.float32(g)}
    found = {
        "lora": lora.lora_init(chosen, params, jax.random.key(0)),
        "lora_ga": lora.lora_ga_init(chosen, params, gradients),
    }
    along = {name: cosine(first_change(s, g), -g) for name, s in found.items()}
    # Two factors of rank 4 can follow at most the eight strongest directions.
    energy = np.linalg.svd(g, compute_uv=False) ** 2
    best = np.sqrt(energy[:8].sum() / energy.sum())
    assert along["lora_ga"] == pytest.approx(best, abs=0.01)
    assert along["lora"] < 0.7 * along["lora_ga"]


def test_along_the_operated_gradient_the_replay_loss_does_not_rise_to_first_order():
    params = {"w": np.float32(RNG.normal(size=(16, 12)))}
    chosen = lora.targets(params, {"w": 2}, alpha=2.0)
    # Of ranks so low that an adapter of rank 2 follows what surgery leaves of them.
    past = low_rank(16, 12, 1)
    new = low_rank(16, 12, 3) - 0.8 * past
    assert (new * past).sum() < 0
    gradients, reference = {"w": new}, {"w": past}
    kept = new - (new * past).sum() / (past * past).sum() * past

    def rise(start, gradient):
        """Of the replay loss, to first order, per unit of the step's length."""
        step = first_change(start, gradient)
        return (step * past).sum() / np.linalg.norm(step) / np.linalg.norm(past)

    operated = lora.slice_init(chosen, params, gradients, reference)
    plain = lora.slice_init(chosen, params, gradients)
    assert operated.diagnostics.gate_open["w"]
    assert rise(plain, new) > 0.1
    assert rise(operated, kept) < 1e-4


def test_slice_leaves_the_logits_of_a_language_model_as_they_were():
    config = llama.LlamaConfig.tiny()
    params = jax.jit(llama.init, static_argnums=0)(config, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 7), 0, config.vocabulary)
    targets = lora.targets(
        params,
        {r"layers/(q|down)/kernel": 2},
        alpha=4.0,
        rslora=True,
        matrices=matrix_views(stacked="layers"),
    )
    new, noise = (
        {
            path: np.float32(RNG.normal(size=t.matrix_shape))
            for path, t in targets.items()
        }
        for _ in range(2)
    )
    past = jax.tree.map(lambda g, n: n - g, new, noise)
    start = jax.jit(lora.slice_init)(targets, params, new, past)
    forward = jax.jit(llama.forward, static_argnums=(0, 4))
    nothing = jax.tree.map(np.zeros_like, start.adapters)
    before = forward(config, params, tokens, nothing, targets)
    after = forward(config, start.params, tokens, start.adapters, targets)
    without = forward(config, start.params, tokens, nothing, targets)
    np.testing.assert_allclose(after, before, atol=1e-5)
    assert np.abs(np.asarray(without) - np.asarray(before)).max() > 1e-2


@pytest.mark.parametrize("method", ["slice_init", "lora_ga_init"])
def test_a_gradient_of_too_few_directions_is_told(method):
    params = {"w": np.float32(RNG.normal(size=(16, 12)))}
    chosen = lora.targets(params, {"w": 3}, alpha=3.0)
    init = getattr(lora, method)
    rich = {"w": low_rank(16, 12, 6, 1e-6)}  # of any size
    poor = {"w": low_rank(16, 12, 5)}
    init(chosen, params, rich)  # warnings are errors here
    with pytest.warns(UserWarning, match=r"`w` has a rank below 6") as warned:
        told = init(chosen, params, poor)
    assert warned[0].filename == __file__
    choice = {"order": "ArBr"} if method == "lora_ga_init" else {"selection": "top"}
    init(chosen, params, poor, **choice)  # which takes three
    # Inside jit nothing is told; what is missing is orthonormal, and never NaN.
    inside = jax.jit(lambda g: init(chosen, params, g))(poor)
    for adapter in (told.adapters["w"], inside.adapters["w"]):
        a = np.float64(adapter.a)
        gram = a.T @ a
        np.testing.assert_allclose(gram / gram[0, 0], np.eye(3), atol=1e-4)


def test_layers_of_a_stack_are_judged_one_by_one():
    params = {"w": np.float32(RNG.normal(size=(2, 9, 8)))}
    chosen = lora.targets(
        params, {"w": 2}, alpha=2.0, matrices=matrix_views(stacked="w")
    )
    g = {"w": np.stack([low_rank(9, 8, 8), low_rank(9, 8, 3)])}
    with pytest.warns(UserWarning, match="rank below 4"):
        lora.slice_init(chosen, params, g)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lora.slice_init(chosen, params, {"w": g["w"][:1].repeat(2, axis=0)})


@pytest.mark.parametrize(
    "init",
    [
        lambda chosen, params, g: lora.lora_ga_init(chosen, params, g),
        lambda chosen, params, g: lora.slice_init(chosen, params, g, g),
        lambda chosen, params, g: lora.frozen_a_init(chosen, g),
        lambda chosen, params, g: lora.eblora_init(chosen, g),
    ],
    ids=["lora_ga", "slice", "frozen_a", "eblora"],
)
def test_inside_jit_gradients_may_be_known(init):
    # What is asked of their values is traced all the same.
    params = {"w": np.float32(RNG.normal(size=(9, 8)))}
    chosen = lora.targets(params, {"w": 2}, alpha=2.0)
    known = {"w": low_rank(9, 8, 8)}
    outside = init(chosen, params, known)
    inside = jax.jit(lambda params: init(chosen, params, known))(params)
    for found, expected in zip(*map(jax.tree.leaves, (inside, outside)), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)
