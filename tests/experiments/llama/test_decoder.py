"""The decoder: cache, padding, adapters, precision, loss, module."""

import dataclasses
from operator import itemgetter

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.models import llama
from optax_cl import lora, matrix_views
from optax_cl._core import checks
from tests.arrays import distance
from tests.experiments.llama.tiny import (
    CONFIG,
    FEATURES,
    FORWARD,
    KERNELS,
    REST,
    TRUNK,
    adapters_of,
    close,
)

PADDED = np.ones((3, 11), bool)
PADDED[1], PADDED[2, :3] = False, False
LOSS = jax.jit(llama.next_token_loss)


@pytest.fixture(scope="module")
def loss(tokens, targets):
    """Loss of parameters and adapters; the second sequence is padding altogether."""

    def loss(params, adapters, config):
        logits = llama.forward(config, params, tokens, adapters, targets, mask=PADDED)
        return llama.next_token_loss(logits, tokens, PADDED)

    return loss


@pytest.fixture(scope="module")
def value_and_gradient(loss):
    gradient = jax.value_and_grad(loss, argnums=(0, 1))
    return jax.jit(gradient, static_argnums=2)


@pytest.fixture(scope="module")
def found(value_and_gradient, params, targets):
    return value_and_gradient(params, adapters_of("lora", targets), CONFIG)


# Time.


def test_a_token_does_not_see_those_after_it(params, tokens):
    changed = tokens.copy()
    changed[:, 6] = (changed[:, 6] + 1) % CONFIG.vocabulary
    a, b = (np.asarray(FORWARD(CONFIG, params, t)) for t in (tokens, changed))
    np.testing.assert_array_equal(a[:, :6], b[:, :6])
    assert (np.abs(a[:, 6:] - b[:, 6:]).max(-1) > 1e-4).all()


def test_only_distances_between_positions_matter(params, tokens):
    logits = FORWARD(CONFIG, params, tokens)
    steps = np.arange(tokens.shape[1])
    close(FORWARD(CONFIG, params, tokens, positions=steps + 40), logits, 2e-4)
    apart = FORWARD(CONFIG, params, tokens, positions=3 * steps)
    assert distance(apart, logits) > 0.01


@pytest.mark.parametrize("sizes", [(4, 7), (1,) * 11], ids=str)
def test_cached_logits_equal_uncached_ones(params, tokens, sizes):
    cache = llama.empty_cache(CONFIG, 3, 13)
    pieces, start = [], 0
    for size in sizes:
        piece = tokens[:, start : start + size]
        logits, cache = FORWARD(CONFIG, params, piece, cache=cache)
        pieces.append(logits)
        start += size
    close(np.concatenate(pieces, 1), FORWARD(CONFIG, params, tokens))
    assert int(cache.length) == 11
    assert np.sum(cache.valid, axis=1).tolist() == [11] * 3


def test_padding_changes_nothing_wherever_it_stands(params, tokens):
    pads = [0, 5, 5]
    rows = [np.r_[np.full(n, 9), tokens[i, n:]] for i, n in enumerate(pads)]
    left = np.stack(rows).astype(np.int32)
    mask = np.arange(11) >= np.array(pads)[:, None]
    padded = FORWARD(CONFIG, params, left, mask=mask)
    cache = llama.empty_cache(CONFIG, 3, 11)
    first, cache = FORWARD(CONFIG, params, left[:, :6], cache=cache, mask=mask[:, :6])
    second, _ = FORWARD(CONFIG, params, left[:, 6:], cache=cache)
    padded, pieces = np.asarray(padded), np.concatenate([first, second], 1)
    assert np.isfinite(padded).all() and np.isfinite(first).all()
    for i, n in enumerate(pads):
        (alone,) = np.asarray(FORWARD(CONFIG, params, tokens[i : i + 1, n:]))
        close(padded[i, n:], alone)
        close(pieces[i, n:], alone)


def test_gradients_are_finite_with_a_sequence_that_is_all_padding(found):
    chex.assert_tree_all_finite(found)
    _, (gradient, _) = found
    assert np.abs(gradient["layers"]["q"]["kernel"]).max() > 0


# Adapters.


@pytest.mark.parametrize("kind", ["lora", "spectral"])
def test_adapters_equal_merged_kernels(params, tokens, targets, kind):
    adapters = adapters_of(kind, targets)
    found = FORWARD(CONFIG, params, tokens, adapters, targets)
    merged = lora.merge(targets, params, adapters)
    close(found, FORWARD(CONFIG, merged, tokens), 2e-4)
    assert distance(found, FORWARD(CONFIG, params, tokens)) > 0.1


@pytest.mark.parametrize("path", KERNELS)
def test_each_adapter_reaches_its_own_kernel(params, tokens, targets, path):
    adapters = adapters_of("lora", targets)
    adapter = adapters[path]
    # All others are zero, so that the cases are one program.
    only = jax.tree.map(np.zeros_like, adapters) | {path: adapter}
    _, name, _ = path.split("/")
    update = targets[path].scale * np.matmul(adapter.a, adapter.b)
    kernel = np.add(params["layers"][name]["kernel"], update)
    layers = params["layers"] | {name: {"kernel": kernel}}
    merged = FORWARD(CONFIG, params | {"layers": layers}, tokens)
    close(FORWARD(CONFIG, params, tokens, only, targets), merged, 2e-4)
    assert distance(merged, FORWARD(CONFIG, params, tokens)) > 0.01


def test_gradients_reach_every_layer_of_every_adapter(found):
    _, (_, gradient) = found
    assert set(gradient) == set(KERNELS)
    for path, adapter in gradient.items():
        for leaf in adapter:
            assert (np.abs(leaf).max((1, 2)) > 1e-6).all(), path


def test_cached_logits_equal_uncached_ones_with_adapters(params, tokens, targets):
    adapters = adapters_of("lora", targets, KERNELS[:3])
    cache = llama.empty_cache(CONFIG, 3, 11)
    pieces = []
    for piece in (tokens[:, :5], tokens[:, 5:]):
        logits, cache = FORWARD(CONFIG, params, piece, adapters, targets, cache)
        pieces.append(logits)
    whole = FORWARD(CONFIG, params, tokens, adapters, targets)
    close(np.concatenate(pieces, 1), whole)


def test_the_paths_of_adapters_are_those_of_the_parameters(params):
    leaves = jax.tree_util.tree_leaves_with_path(params)
    paths = [checks.path_str(path) for path, leaf in leaves if leaf.ndim == 3]
    assert sorted(paths) == sorted(KERNELS)


# Memory, depth and precision.


def test_recomputing_activations_changes_no_gradient(
    value_and_gradient, found, params, targets
):
    short = dataclasses.replace(CONFIG, remat=True)
    arguments = (params, adapters_of("lora", targets), short)
    again = value_and_gradient(*arguments)
    chex.assert_trees_all_close(again, found, rtol=1e-4, atol=1e-5)
    jaxpr = jax.make_jaxpr(value_and_gradient, static_argnums=2)(*arguments)
    assert "checkpoint" in str(jaxpr) or "remat" in str(jaxpr)


@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.slow), 2, 3])
def test_trunk_and_rest_are_the_whole_model(params, tokens, count):
    stream = TRUNK(CONFIG, params, tokens, CONFIG.layers - count)
    config, last = llama.last_layers(CONFIG, params, count)
    assert config == dataclasses.replace(CONFIG, layers=count)
    whole, _ = FEATURES(CONFIG, params, tokens)
    close(REST(config, last, stream), whole)


def test_the_stream_before_all_layers_is_the_embedding(params, tokens):
    stream = TRUNK(CONFIG, params, tokens, 0)
    table = np.asarray(params["embed"]["embedding"])
    np.testing.assert_array_equal(stream, table[tokens])


@pytest.mark.parametrize("remat", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_the_rest_asked_at_some_places_is_the_rest_there(params, tokens, count, remat):
    where = np.array([[3, 10], [0, 1], [7, 7]])
    config, last = llama.last_layers(CONFIG, params, count)
    config = dataclasses.replace(config, remat=remat)
    stream = TRUNK(CONFIG, params, tokens, CONFIG.layers - count)
    whole, _ = FEATURES(CONFIG, params, tokens)
    asked = np.take_along_axis(np.asarray(whole), where[..., None], axis=1)
    close(REST(config, last, stream, where=where), asked)


def test_adapters_of_the_rest_are_those_of_a_model_with_none_before(
    params, tokens, targets
):
    adapters = adapters_of("lora", targets)
    first = np.arange(CONFIG.layers)[:, None, None] < 1
    silent = jax.tree.map(lambda x: np.where(first, np.float32(0), x), adapters)
    whole, _ = FEATURES(CONFIG, params, tokens, silent, targets)
    config, last = llama.last_layers(CONFIG, params, 2)
    own = jax.tree.map(lambda x: np.asarray(x)[1:], adapters)
    stream = TRUNK(CONFIG, params, tokens, 1)
    close(REST(config, last, stream, own, targets), whole)
    plain, _ = FEATURES(CONFIG, params, tokens)
    assert distance(plain, whole) > 0.1


def test_gradients_of_the_rest_are_those_of_the_whole_model(params, tokens):
    where = np.array([[10], [4], [7]])
    config, last = llama.last_layers(CONFIG, params, 2)
    stream = TRUNK(CONFIG, params, tokens, 1)

    def of_rest(layers):
        part = last | {"layers": layers}
        return llama.rest(config, part, stream, where=where).sum()

    def of_whole(layers):
        hidden, _ = llama.features(CONFIG, params | {"layers": layers}, tokens)
        return jnp.take_along_axis(hidden, where[..., None], axis=1).sum()

    ours = jax.jit(jax.grad(of_rest))(last["layers"])
    theirs = jax.jit(jax.grad(of_whole))(params["layers"])
    theirs = jax.tree.map(lambda x: np.asarray(x)[1:], theirs)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_bfloat16_keeps_its_dtype_inside_and_gives_float32_logits(
    params, tokens, targets
):
    # Halved, so that errors don't grow from layer to layer.
    params = jax.tree.map(lambda x: np.multiply(0.5, x) if x.ndim == 3 else x, params)
    coarse = jax.tree.map(lambda x: np.asarray(x).astype(jnp.bfloat16), params)
    # The adapters stay float32, as a master copy is.
    adapters = adapters_of("lora", targets, KERNELS[:2])
    hidden, _ = FEATURES(CONFIG, coarse, tokens, adapters, targets)
    logits = FORWARD(CONFIG, coarse, tokens, adapters, targets)
    exact = FORWARD(CONFIG, params, tokens, adapters, targets)
    assert (hidden.dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)
    error = np.linalg.norm(np.subtract(logits, exact)) / np.linalg.norm(exact)
    assert 0 < error < 0.1


def test_norms_are_computed_in_float32():
    # The square of 300 overflows nothing in bfloat16, but the sum of 4096 of them
    # would stop growing: 8 bits of mantissa.
    x = np.full((1, 4096), 300.0, jnp.bfloat16)
    norm = jax.jit(llama.rms_norm)
    np.testing.assert_allclose(norm(x, np.ones(4096, np.float32), 1e-5), 1.0)


def test_a_new_model_has_kernels_of_variance_one_over_fan_in():
    drawn = jax.jit(llama.init, static_argnums=0)(CONFIG, jax.random.key(0))
    chex.assert_trees_all_equal_shapes(drawn, llama.abstract_params(CONFIG))
    kernel = np.asarray(drawn["layers"]["down"]["kernel"])
    assert float(kernel.std()) == pytest.approx(40**-0.5, rel=0.05)
    assert np.abs(kernel[0] - kernel[1]).max() > 0.1, "the layers start apart"


def test_seeds_run_side_by_side_under_vmap(params, tokens):
    many = jax.tree.map(lambda leaf: np.stack([leaf, np.multiply(0.5, leaf)]), params)
    together = jax.jit(jax.vmap(lambda p: llama.forward(CONFIG, p, tokens)))(many)
    together = np.asarray(together)
    for i in range(2):
        alone = jax.tree.map(itemgetter(i), many)
        close(together[i], FORWARD(CONFIG, alone, tokens))


# Loss.


def test_the_loss_of_uniform_logits_is_the_log_of_the_vocabulary(tokens):
    loss = LOSS(np.zeros((3, 11, 64), np.float32), tokens)
    assert float(loss) == pytest.approx(np.log(64), rel=1e-6)


def test_weights_choose_targets_and_each_target_is_read_off_the_position_before():
    tokens = np.array([[0, 1, 2]])
    logits = np.log([[[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [1.0, 1.0, 1.0]]])
    losses = -np.log([0.3, 0.8])
    assert float(LOSS(logits, tokens)) == pytest.approx(losses.mean())
    for weights, expected in (([1, 1, 0], losses[0]), ([9, 0, 1], losses[1])):
        found = LOSS(logits, tokens, np.array([weights]))
        assert float(found) == pytest.approx(expected, rel=1e-5)
    assert LOSS(logits, tokens, np.array([[0, 0, 0]])) == 0.0


# The module.


def test_the_module_is_the_same_function_of_the_same_paths(params, tokens, targets):
    model = llama.Llama(CONFIG, params)
    adapters = adapters_of("lora", targets)
    call = nnx.jit(lambda m, t, a: m(t, adapters=a, targets=targets))
    expected = FORWARD(CONFIG, params, tokens, adapters, targets)
    # Both are one program, whose constants and arguments are the same.
    chex.assert_trees_all_equal(call(model, tokens, adapters), expected)
    chex.assert_trees_all_equal(model.params(), params)
    assert (
        lora.targets(
            nnx.state(model, nnx.Param),
            {"layers/.*/kernel": 2},
            alpha=6.0,
            matrices=matrix_views(stacked="layers"),
        )
        == targets
    )


def test_the_module_is_differentiated_by_nnx(found, params, tokens, targets):
    adapters = adapters_of("lora", targets)

    def loss(model):
        logits = model(tokens, adapters=adapters, targets=targets, mask=PADDED)
        return llama.next_token_loss(logits, tokens, PADDED)

    gradient = nnx.jit(nnx.grad(loss))(llama.Llama(CONFIG, params))
    _, (expected, _) = found
    pure = nnx.to_pure_dict(gradient)
    chex.assert_trees_all_close(pure, expected, rtol=1e-4, atol=1e-5)
