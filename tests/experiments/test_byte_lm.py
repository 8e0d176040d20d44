"""The byte transformer: an independent forward pass, causality, sizes, learning."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import log_softmax, softmax

from experiments.models import byte_lm

TINY = byte_lm.ByteLMConfig(layers=2, width=8, heads=2, hidden=12, context=6)
INIT = jax.jit(byte_lm.byte_lm(TINY).init)
APPLY = jax.jit(byte_lm.byte_lm(TINY).apply)


def random_bytes(seed, shape):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def rms_norm(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


def gelu(x):  # The tanh approximation that JAX uses by default.
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def reference_logits(params, tokens, config):
    """The forward pass of one sequence in float64 NumPy, head by head."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    time = len(tokens)
    x = p["tokens"]["embedding"][tokens] + p["positions"]["embedding"][:time]
    size = config.width // config.heads
    for layer in range(config.layers):
        b = p["blocks"][layer]
        normed = rms_norm(x, b["norm_attention"]["scale"])
        qkv = normed @ b["query_key_value"]["kernel"]
        heads = []
        for head in range(config.heads):
            q, k, v = (
                qkv[:, part * config.width + head * size :][:, :size]
                for part in range(3)
            )
            scores = q @ k.T / np.sqrt(size)
            scores[np.triu_indices(time, 1)] = -np.inf
            heads.append(softmax(scores, axis=-1) @ v)
        x = x + np.concatenate(heads, -1) @ b["attention_out"]["kernel"]
        normed = rms_norm(x, b["norm_hidden"]["scale"])
        x = x + gelu(normed @ b["hidden_in"]["kernel"]) @ b["hidden_out"]["kernel"]
    return rms_norm(x, p["norm"]["scale"]) @ p["head"]["kernel"]


def test_logits_match_an_independent_forward_pass():
    params = INIT(jax.random.key(0))
    tokens = random_bytes(1, (3, 6))
    logits = np.asarray(APPLY(params, tokens))
    for sequence, got in zip(tokens, logits, strict=True):
        want = reference_logits(params, sequence, TINY)
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


def test_a_position_sees_only_itself_and_what_came_before():
    params = INIT(jax.random.key(0))
    tokens = random_bytes(1, (1, 6))
    changed = tokens.copy()
    changed[0, 3] ^= 0xFF
    before, after = (np.asarray(APPLY(params, t)) for t in (tokens, changed))
    np.testing.assert_array_equal(before[0, :3], after[0, :3])
    assert np.all(np.any(before[0, 3:] != after[0, 3:], axis=-1))


def test_loss_is_the_mean_cross_entropy_in_nats():
    logits = np.random.default_rng(0).normal(size=(2, 5, 256)) * 3
    targets = random_bytes(2, (2, 5))
    want = -np.take_along_axis(
        log_softmax(logits, -1), targets[..., None].astype(int), -1
    )
    got = jax.jit(byte_lm.next_byte_loss)(logits, targets)
    np.testing.assert_allclose(got, want.mean(), rtol=1e-6)


def test_parameters_are_a_plain_tree_whose_kernels_are_matrices():
    drawn = jax.tree.leaves(INIT(jax.random.key(0)))
    assert all(type(leaf).__name__ == "ArrayImpl" for leaf in drawn)
    params = jax.eval_shape(byte_lm.byte_lm(byte_lm.SMALL).init, jax.random.key(0))
    leaves = jax.tree_util.tree_leaves_with_path(params)
    kernels = [leaf for path, leaf in leaves if path[-1].key == "kernel"]
    assert len(kernels) == 9
    assert all(kernel.ndim == 2 for kernel in kernels)
    assert sum(leaf.size for _, leaf in leaves) == 33_952
    fan_ins = {"hidden_in": 32, "hidden_out": 64, "query_key_value": 32}
    block = params["blocks"][0]
    assert {name: block[name]["kernel"].shape[0] for name in fan_ins} == fan_ins


def test_the_full_size_can_be_built_without_allocating_it():
    shapes = jax.eval_shape(byte_lm.byte_lm(byte_lm.FULL).init, jax.random.key(0))
    assert 8.5e7 < sum(leaf.size for leaf in jax.tree.leaves(shapes)) < 9e7


def test_init_is_traceable_over_seeds_and_differs_between_them():
    model = byte_lm.byte_lm(TINY)
    both = jax.jit(jax.vmap(lambda seed: model.init(jax.random.key(seed))))(
        jnp.arange(2)
    )
    head = np.asarray(both["head"]["kernel"])
    assert np.abs(head[0] - head[1]).min() > 0
    alone = INIT(jax.random.key(1))["head"]["kernel"]
    np.testing.assert_array_equal(head[1], alone)


def test_the_model_learns_a_repeating_text():
    model = byte_lm.byte_lm(TINY)
    text = np.frombuffer(b"abcdef" * 20, np.uint8)
    batch = np.stack([text[i : i + 7] for i in range(6)])

    def loss(params):
        return byte_lm.next_byte_loss(model.apply(params, batch[:, :-1]), batch[:, 1:])

    tx = optax.adam(3e-2)

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state)
        return (optax.apply_updates(params, updates), state), value

    @jax.jit
    def train(params):
        return jax.lax.scan(step, (params, tx.init(params)), length=100)[1]

    losses = np.asarray(train(INIT(jax.random.key(0))))
    assert losses[0] > 5.0 > 0.2 > losses[-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"heads": 3}, "`width` must be a multiple"), ({"layers": 0}, "`layers` must be")],
)
def test_impossible_sizes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        byte_lm.byte_lm(TINY._replace(**change))
