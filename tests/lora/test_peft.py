"""Adapters as PEFT files: what peft wrote, and what peft reads."""

import importlib.util
import json
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_cl import lora, matrix_views
from tests.lora.peft_models import (
    PATTERNS,
    REFERENCE,
    forward,
    lora_init,
    reference,
    small,
    tree,
)

safetensors = pytest.importorskip("safetensors.numpy")

# Compiled as one function: quicker than their operations one by one.
merge, pissa_init = jax.jit(lora.merge), jax.jit(lora.pissa_init)
to_spectral, product = jax.jit(lora.to_spectral), jax.jit(lora.product)

# Files that peft wrote


@pytest.mark.parametrize(
    ("name", "ranks", "alpha"),
    [("patterns", PATTERNS, 4.0), ("rslora", {"proj": 4}, 6.0)],
)
def test_a_file_of_peft_gives_the_outputs_of_peft(name, ranks, alpha):
    params, x, y = reference(name)
    targets = lora.targets(params, ranks, alpha=alpha, rslora=name == "rslora")
    adapters = lora.load_peft(REFERENCE / f"peft_{name}", targets)
    merged = merge(targets, params, adapters)
    assert np.abs(forward(params, x) - y).max() > 0.1  # the adapter matters
    np.testing.assert_allclose(forward(merged, x), y, rtol=1e-5, atol=1e-5)


def test_targets_of_another_alpha_give_the_same_update():
    params, x, y = reference("rslora")
    targets = lora.targets(params, {"proj": 4}, alpha=1.0)
    adapters = lora.load_peft(REFERENCE / "peft_rslora", targets)
    merged = merge(targets, params, adapters)
    np.testing.assert_allclose(forward(merged, x), y, rtol=1e-5, atol=1e-5)


def test_stacked_layers_are_read_layer_by_layer():
    params, _, _ = reference("rslora")
    layers = jax.tree.map(lambda *x: np.stack(x), *params["layers"].values())
    stacked = lora.targets(
        {"layers": layers},
        {"proj": 4},
        alpha=1.0,
        matrices=matrix_views(stacked="^layers"),
    )
    together = lora.load_peft(REFERENCE / "peft_rslora", stacked)
    single = lora.load_peft(
        REFERENCE / "peft_rslora", lora.targets(params, {"proj": 4}, alpha=1.0)
    )
    for i in (0, 1):
        for name in ("q_proj", "o_proj"):
            chex.assert_trees_all_equal(
                jax.tree.map(
                    lambda x, i=i: np.asarray(x)[i], together[f"layers/{name}/kernel"]
                ),
                single[f"layers/{i}/{name}/kernel"],
            )


# Files that we wrote


def test_layout_of_the_file(tmp_path):
    _, targets, adapters = small()
    lora.save_peft(tmp_path, targets, adapters, base_model="some/model")
    tensors = safetensors.load_file(tmp_path / "adapter_model.safetensors")
    a, b = map(np.asarray, adapters["layers/1/o_proj/kernel"])
    prefix = "base_model.model.layers.1.o_proj."
    np.testing.assert_array_equal(tensors[prefix + "lora_A.weight"], a.T)
    np.testing.assert_array_equal(tensors[prefix + "lora_B.weight"], b.T)
    assert len(tensors) == 2 * len(targets)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 4)
    assert config["rank_pattern"] == {"head": 1, "layers.1.o_proj": 3}
    assert config["alpha_pattern"] == {}
    assert config["base_model_name_or_path"] == "some/model"
    assert config["peft_type"] == "LORA" and "head" in config["target_modules"]


def test_round_trip_is_exact(tmp_path):
    _, targets, adapters = small()
    lora.save_peft(tmp_path / "new" / "folder", targets, adapters)
    again = lora.load_peft(tmp_path / "new" / "folder", targets)
    chex.assert_trees_all_equal(again, adapters)


def test_round_trip_of_rank_stabilised_scales(tmp_path):
    params, _, adapters = small()
    targets = lora.targets(params, PATTERNS, alpha=5.0, rslora=True)
    lora.save_peft(tmp_path, targets, adapters)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["use_rslora"] is False
    alpha = config["alpha_pattern"]["layers.1.o_proj"]
    assert math.isclose(alpha / 3, 5.0 / math.sqrt(3))
    again = lora.load_peft(tmp_path, targets)
    chex.assert_trees_all_close(again, adapters, rtol=1e-6)


def test_spectral_adapters_are_written_as_their_update(tmp_path):
    _, targets, adapters = small()
    spectral = to_spectral(adapters)
    lora.save_peft(tmp_path, targets, spectral)
    for path, adapter in lora.load_peft(tmp_path, targets).items():
        np.testing.assert_allclose(product(adapter), product(spectral[path]), atol=1e-6)


def test_bfloat16_adapters_come_back_in_float32(tmp_path):
    _, targets, adapters = small()
    half = jax.tree.map(lambda x: np.asarray(x).astype(jnp.bfloat16), adapters)
    lora.save_peft(tmp_path, targets, half)
    again = lora.load_peft(tmp_path, targets)
    chex.assert_trees_all_equal(again, jax.tree.map(np.float32, half))


def test_stacked_layers_are_written_as_single_modules(tmp_path):
    params = {"params": {"layers": {"q": {"kernel": np.ones((3, 4, 5), np.float32)}}}}
    views = matrix_views(stacked="layers/")
    targets = lora.targets(params, {"q": 2}, alpha=2.0, matrices=views)
    adapters = lora_init(targets, params, jax.random.key(0)).adapters
    lora.save_peft(tmp_path, targets, adapters)
    tensors = safetensors.load_file(tmp_path / "adapter_model.safetensors")
    a = np.asarray(adapters["params/layers/q/kernel"].a)
    for i in range(3):
        key = f"base_model.model.layers.{i}.q.lora_A.weight"
        np.testing.assert_array_equal(tensors[key], a[i].T)
    chex.assert_trees_all_equal(lora.load_peft(tmp_path, targets), adapters)


def test_names_give_the_modules_of_the_other_model(tmp_path):
    params = {"blocks": {"wq": np.ones((3, 4, 5), np.float32)}}
    views = matrix_views(stacked="blocks/")
    targets = lora.targets(params, {"wq": 2}, alpha=2.0, matrices=views)
    adapters = lora_init(targets, params, jax.random.key(0)).adapters
    names = {"blocks/wq": "model.layers.{}.self_attn.q_proj"}.__getitem__
    lora.save_peft(tmp_path, targets, adapters, names=names)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"][0] == "model.layers.0.self_attn.q_proj"
    again = lora.load_peft(tmp_path, targets, names=names)
    chex.assert_trees_all_equal(again, adapters)


def test_a_pattern_for_one_module_does_not_catch_another(tmp_path):
    params = {
        "head": np.ones((4, 4), np.float32),
        "lm": {"head": np.ones((4, 4), np.float32)},
    }
    targets = lora.targets(params, {"^head": 1, "lm/head": 3}, alpha=3.0)
    adapters = lora_init(targets, params, jax.random.key(0)).adapters
    lora.save_peft(tmp_path, targets, adapters)
    chex.assert_trees_all_equal(lora.load_peft(tmp_path, targets), adapters)


def absorbed():
    """A start that changed the weights, and its adapters after some training."""
    params, x, _ = reference("patterns")
    targets = lora.targets(params, {"proj": 2}, alpha=4.0)
    start = pissa_init(targets, params)
    trained = jax.tree.map(
        lambda p: np.float32(1.1) * np.asarray(p) + np.float32(0.05), start.adapters
    )
    expected = forward(merge(targets, start.params, trained), x)
    return params, x, targets, start, trained, expected


def test_adapters_whose_start_changed_the_weights_fit_the_base_model(tmp_path):
    params, x, targets, start, trained, expected = absorbed()
    lora.save_peft(tmp_path, targets, trained, initial=start.adapters)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    twice = lora.targets(params, {"proj": 4}, alpha=8.0)
    read = lora.load_peft(tmp_path, twice)
    np.testing.assert_allclose(
        forward(merge(twice, params, read), x), expected, atol=1e-4
    )
    # Without it the file belongs to the absorbed weights.
    lora.save_peft(tmp_path, targets, trained)
    read = lora.load_peft(tmp_path, targets)
    found = [forward(merge(targets, p, read), x) for p in (start.params, params)]
    np.testing.assert_allclose(found[0], expected, atol=1e-4)
    assert np.abs(found[1] - expected).max() > 0.01
    with pytest.raises(ValueError, match=r"`initial` must map.*field `adapters`"):
        lora.save_peft(tmp_path, targets, trained, initial=start)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_itself_reads_our_file(tmp_path, rslora):
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    spec = importlib.util.spec_from_file_location("make", REFERENCE / "make_peft.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    params, _, adapters = small()
    targets = lora.targets(params, PATTERNS, alpha=5.0, rslora=rslora)
    lora.save_peft(tmp_path, targets, adapters)
    arrays = make.answers(tmp_path)
    x, y = arrays.pop("inputs"), arrays.pop("outputs")
    chex.assert_trees_all_equal(tree(arrays), params)
    merged = merge(targets, params, adapters)
    assert np.abs(forward(params, x) - y).max() > 0.1
    np.testing.assert_allclose(forward(merged, x), y, rtol=1e-5, atol=1e-5)
