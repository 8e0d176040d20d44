"""Choosing kernels: patterns, ranks, scales, and kernels that are no plain matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_cl import MatrixView, lora, matrix_views
from tests.arrays import normal
from tests.lora.helpers import plain, random_lora

# Compiled as one function: quicker than their operations one by one.
merge, product = jax.jit(lora.merge), jax.jit(lora.product)


def test_first_matching_pattern_decides():
    targets = lora.targets(plain(), {"out/kernel": 1, "kernel": 2}, alpha=4.0)
    assert {path: (t.rank, t.scale) for path, t in targets.items()} == {
        "hidden/kernel": (2, 2.0),
        "out/kernel": (1, 4.0),
    }


def test_rank_stabilised_scale_divides_by_the_root():
    targets = lora.targets(plain(), {"hidden/kernel": 4}, alpha=4.0, rslora=True)
    assert targets["hidden/kernel"].scale == 2.0


def test_a_pattern_without_a_kernel_names_near_paths():
    with pytest.raises(ValueError, match=r"'hiden/kernel'.*There are hidden/kernel"):
        lora.targets(plain(), {"hiden/kernel": 2}, alpha=1.0)


def test_a_long_list_of_paths_is_cut():
    params = {f"layer_{i}": jnp.ones((3, 3)) for i in range(40)}
    with pytest.raises(ValueError, match="and 34 more") as error:
        lora.targets(params, {"nothing": 1}, alpha=1.0)
    assert str(error.value).count("layer_") == 6


def test_a_pattern_that_only_biases_match_says_so():
    with pytest.raises(ValueError, match=r"`hidden/bias`.*not read as a matrix"):
        lora.targets(plain(), {"bias": 1}, alpha=1.0)


def test_a_pattern_behind_a_wider_one_says_so():
    with pytest.raises(ValueError, match=r"taken by 'kernel'.*narrower pattern first"):
        lora.targets(plain(), {"kernel": 1, "hidden/kernel": 2}, alpha=1.0)


def test_rank_beyond_the_kernel_is_refused():
    with pytest.raises(ValueError, match=r"`out/kernel` rank 4.*6x3"):
        lora.targets(plain(), {"out": 4}, alpha=1.0)


def test_integer_kernels_are_refused():
    with pytest.raises(TypeError, match=r"`q/kernel`, which holds int8"):
        lora.targets({"q": {"kernel": jnp.ones((3, 3), jnp.int8)}}, {"q": 1}, alpha=1.0)


@pytest.mark.parametrize(
    ("ranks", "alpha", "error", "match"),
    [
        ({"kernel": 0}, 1.0, ValueError, "at least 1"),
        ({"kernel": 1.0}, 1.0, TypeError, "must be a Python integer"),
        ({"kernel": 1}, 0.0, ValueError, "`alpha`"),
        ({"kernel": 1}, float("nan"), ValueError, "`alpha`"),
        ({"(": 1}, 1.0, ValueError, "regular expression"),
        ({3: 1}, 1.0, ValueError, "regular expression"),
        ({}, 1.0, ValueError, "must map patterns to ranks"),
        (4, 1.0, ValueError, "must map patterns to ranks"),
    ],
)
def test_bad_arguments_are_named(ranks, alpha, error, match):
    with pytest.raises(error, match=match):
        lora.targets(plain(), ranks, alpha=alpha)


def test_embeddings_are_refused_with_advice():
    with pytest.raises(ValueError, match=r"`embed/embedding`.*embedding table") as e:
        lora.targets(plain(), {"embed": 1}, alpha=1.0)
    assert "targets(..., matrices=...)" in str(e.value)


def test_embeddings_work_on_their_feature_side():
    params = plain()
    targets = lora.targets(
        params, {"embed": 2}, alpha=2.0, matrices=matrix_views(embeddings="features")
    )
    assert targets["embed/embedding"].matrix_shape == (4, 11)
    adapters = random_lora(targets)
    merged = merge(targets, params, adapters)["embed"]["embedding"]
    update = np.asarray(product(adapters["embed/embedding"])).T
    np.testing.assert_allclose(merged, 1.0 + update, rtol=1e-5)


def test_convolutions_get_an_adapter_on_their_patches():
    x = normal(4, 1, 2, 3, 4)
    params = {"conv": {"kernel": jnp.ones((2, 3, 4, 5))}}
    targets = lora.targets(params, {"conv": 2}, alpha=2.0)
    adapters = random_lora(targets)
    kernel = merge(targets, params, adapters)["conv"]["kernel"]
    y = jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    a, b = (np.asarray(f, np.float64) for f in adapters["conv/kernel"])
    patch = np.asarray(x, np.float64).reshape(1, 24)
    expected = patch @ np.ones((24, 5)) + patch @ a @ b
    np.testing.assert_allclose(y.reshape(1, 5), expected, rtol=1e-4, atol=1e-4)


def test_attention_kernels_by_override():
    params = {"q": {"kernel": jnp.zeros((4, 2, 3))}}
    views = matrix_views(override={"q/kernel": MatrixView((0,), (1, 2))})
    targets = lora.targets(params, {"q": 2}, alpha=2.0, matrices=views)
    adapters = random_lora(targets)
    merged = merge(targets, params, adapters)["q"]["kernel"]
    a, b = adapters["q/kernel"]
    np.testing.assert_allclose(
        merged, jnp.einsum("ir,rhd->ihd", a, b.reshape(2, 2, 3)), rtol=1e-5
    )


def test_stacked_layers_are_adapted_one_by_one():
    params = {"layers": {"kernel": jnp.zeros((5, 4, 3))}}
    views = matrix_views(stacked="^layers/")
    targets = lora.targets(params, {"kernel": 2}, alpha=2.0, matrices=views)
    adapters = random_lora(targets)
    merged = merge(targets, params, adapters)["layers"]["kernel"]
    for layer in range(5):
        alone = jax.tree.map(lambda x, i=layer: x[i], adapters["layers/kernel"])
        np.testing.assert_allclose(
            merged[layer], np.asarray(alone.a) @ np.asarray(alone.b), rtol=1e-4
        )


def test_targets_are_static_hashable_and_compare_by_value():
    targets = lora.targets(plain(), {"kernel": 2}, alpha=4.0)
    again = lora.targets(plain(), {"kernel": 2}, alpha=jnp.float32(4.0))
    assert targets == again and hash(targets) == hash(again)
    assert targets != lora.targets(plain(), {"kernel": 2}, alpha=2.0)
    assert jax.tree.leaves(targets) == []
