"""Adapters as PEFT files: what peft wrote, what peft reads, and what is refused."""

import importlib.util
import json
import math
import pathlib
import shutil
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_cl import lora, matrix_views

safetensors = pytest.importorskip("safetensors.numpy")

REFERENCE = pathlib.Path(__file__).parent / "reference"
PATTERNS = {"1/o_proj": 3, "proj": 2, "head": 1}


def tree(weights):
    """PyTorch weights ``[out, in]`` by name as a tree of kernels ``[in, out]``."""
    params = {"layers": {"0": {}, "1": {}}, "head": {}}
    for name, weight in weights.items():
        *parts, _ = name.split(".")
        node = params
        for part in parts:
            node = node.setdefault(part, {})
        node["kernel"] = jnp.asarray(weight.T)
    return params


def forward(params, x):
    for layer in ("0", "1"):
        block = params["layers"][layer]
        h = jnp.tanh(x @ block["q_proj"]["kernel"])
        x = x + h @ block["o_proj"]["kernel"]
    return x @ params["head"]["kernel"]


def reference(name):
    """Parameters, inputs and outputs of the model that peft adapted."""
    arrays = dict(np.load(REFERENCE / f"peft_{name}" / "expected.npz"))
    x, y = arrays.pop("inputs"), arrays.pop("outputs")
    return tree(arrays), x, y


def small():
    """Targets of unequal ranks with random adapters, for a model of two layers."""
    params, _, _ = reference("patterns")
    targets = lora.targets(params, PATTERNS, alpha=4.0)
    start = lora.lora_init(targets, params, jax.random.key(0)).adapters
    adapters = {p: x._replace(b=jnp.ones_like(x.b) / 3) for p, x in start.items()}
    return params, targets, adapters


# Files that peft wrote


@pytest.mark.parametrize(
    ("name", "ranks", "alpha"),
    [("patterns", PATTERNS, 4.0), ("rslora", {"proj": 4}, 6.0)],
)
def test_a_file_of_peft_gives_the_outputs_of_peft(name, ranks, alpha):
    params, x, y = reference(name)
    targets = lora.targets(params, ranks, alpha=alpha, rslora=name == "rslora")
    adapters = lora.load_peft(REFERENCE / f"peft_{name}", targets)
    merged = lora.merge(targets, params, adapters)
    assert np.abs(forward(params, x) - y).max() > 0.1  # the adapter matters
    np.testing.assert_allclose(forward(merged, x), y, rtol=1e-5, atol=1e-5)


def test_targets_of_another_alpha_give_the_same_update():
    params, x, y = reference("rslora")
    targets = lora.targets(params, {"proj": 4}, alpha=1.0)
    adapters = lora.load_peft(REFERENCE / "peft_rslora", targets)
    merged = lora.merge(targets, params, adapters)
    np.testing.assert_allclose(forward(merged, x), y, rtol=1e-5, atol=1e-5)


def test_stacked_layers_are_read_layer_by_layer():
    params, _, _ = reference("rslora")
    layers = jax.tree.map(lambda *x: jnp.stack(x), *params["layers"].values())
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
                jax.tree.map(lambda x, i=i: x[i], together[f"layers/{name}/kernel"]),
                single[f"layers/{i}/{name}/kernel"],
            )


# Files that we wrote


def test_layout_of_the_file(tmp_path):
    _, targets, adapters = small()
    lora.save_peft(tmp_path, targets, adapters, base_model="some/model")
    tensors = safetensors.load_file(tmp_path / "adapter_model.safetensors")
    a, b = adapters["layers/1/o_proj/kernel"]
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
    spectral = lora.to_spectral(adapters)
    lora.save_peft(tmp_path, targets, spectral)
    for path, adapter in lora.load_peft(tmp_path, targets).items():
        np.testing.assert_allclose(
            lora.product(adapter), lora.product(spectral[path]), atol=1e-6
        )


def test_bfloat16_adapters_come_back_in_float32(tmp_path):
    _, targets, adapters = small()
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), adapters)
    lora.save_peft(tmp_path, targets, half)
    again = lora.load_peft(tmp_path, targets)
    chex.assert_trees_all_equal(
        again, jax.tree.map(lambda x: x.astype(jnp.float32), half)
    )


def test_stacked_layers_are_written_as_single_modules(tmp_path):
    params = {"params": {"layers": {"q": {"kernel": jnp.ones((3, 4, 5))}}}}
    views = matrix_views(stacked="layers/")
    targets = lora.targets(params, {"q": 2}, alpha=2.0, matrices=views)
    adapters = lora.lora_init(targets, params, jax.random.key(0)).adapters
    lora.save_peft(tmp_path, targets, adapters)
    tensors = safetensors.load_file(tmp_path / "adapter_model.safetensors")
    a = adapters["params/layers/q/kernel"].a
    for i in range(3):
        key = f"base_model.model.layers.{i}.q.lora_A.weight"
        np.testing.assert_array_equal(tensors[key], a[i].T)
    chex.assert_trees_all_equal(lora.load_peft(tmp_path, targets), adapters)


def test_names_give_the_modules_of_the_other_model(tmp_path):
    params = {"blocks": {"wq": jnp.ones((3, 4, 5))}}
    views = matrix_views(stacked="blocks/")
    targets = lora.targets(params, {"wq": 2}, alpha=2.0, matrices=views)
    adapters = lora.lora_init(targets, params, jax.random.key(0)).adapters
    names = {"blocks/wq": "model.layers.{}.self_attn.q_proj"}.__getitem__
    lora.save_peft(tmp_path, targets, adapters, names=names)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"][0] == "model.layers.0.self_attn.q_proj"
    again = lora.load_peft(tmp_path, targets, names=names)
    chex.assert_trees_all_equal(again, adapters)


def test_a_pattern_for_one_module_does_not_catch_another(tmp_path):
    params = {"head": jnp.ones((4, 4)), "lm": {"head": jnp.ones((4, 4))}}
    targets = lora.targets(params, {"^head": 1, "lm/head": 3}, alpha=3.0)
    adapters = lora.lora_init(targets, params, jax.random.key(0)).adapters
    lora.save_peft(tmp_path, targets, adapters)
    chex.assert_trees_all_equal(lora.load_peft(tmp_path, targets), adapters)


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
    merged = lora.merge(targets, params, adapters)
    assert np.abs(forward(params, x) - y).max() > 0.1
    np.testing.assert_allclose(forward(merged, x), y, rtol=1e-5, atol=1e-5)


# Bad input


@pytest.fixture
def saved(tmp_path):
    _, targets, adapters = small()
    lora.save_peft(tmp_path, targets, adapters)
    return tmp_path, targets


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    safetensors.save_file(change(safetensors.load_file(path)), path)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(saved, file):
    folder, targets = saved
    (folder / file).unlink()
    with pytest.raises(FileNotFoundError, match=file):
        lora.load_peft(folder, targets)


def test_a_pickled_adapter_gets_advice(saved):
    folder, targets = saved
    file = folder / "adapter_model.safetensors"
    shutil.move(file, file.with_suffix(".bin"))
    with pytest.raises(FileNotFoundError, match="is a pickle"):
        lora.load_peft(folder, targets)


@pytest.mark.parametrize("keep", [0, 5, 100, -7])
def test_a_truncated_file_is_refused(saved, keep):
    folder, targets = saved
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match="damaged or no safetensors file"):
        lora.load_peft(folder, targets)


def test_a_damaged_config_is_refused(saved):
    folder, targets = saved
    (folder / "adapter_config.json").write_text('{"r": 2,')
    with pytest.raises(ValueError, match="is no JSON"):
        lora.load_peft(folder, targets)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"modules_to_save": ["head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"peft_type": "IA3"}, "peft_type 'LORA'; got 'IA3'"),
        ({"r": None}, "`r`, above 0; got None"),
        ({"lora_alpha": 0}, "`lora_alpha`, above 0; got 0"),
        ({"rank_pattern": {"head": 0}}, r"`rank_pattern\[head\]`, above 0; got 0"),
        ({"rank_pattern": {"(": 2}}, "map from regular expressions"),
        ({"alpha_pattern": [2]}, "map from regular expressions"),
        ({"r": 4}, "rank 4, but the target .* has rank 2"),
    ],
)
def test_configs_that_can_not_be_held_are_refused(saved, changes, match):
    folder, targets = saved
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=match):
        lora.load_peft(folder, targets)


def test_a_missing_tensor_is_named(saved):
    folder, targets = saved
    key = "base_model.model.head.lora_B.weight"
    edit_tensors(folder, lambda x: {k: v for k, v in x.items() if k != key})
    with pytest.raises(ValueError, match=r"1 \(.*head.lora_B.weight\) missing, none"):
        lora.load_peft(folder, targets)


def test_adapters_that_no_target_asks_for_are_not_dropped(saved):
    folder, _ = saved
    params, _, _ = small()
    fewer = lora.targets(params, {"layers/1/o_proj": 3, "proj": 2}, alpha=4.0)
    with pytest.raises(ValueError, match=r"none missing, 2 \(.*head.* not expected"):
        lora.load_peft(folder, fewer)


def test_a_tensor_of_another_shape_is_named(saved):
    folder, targets = saved
    key = "base_model.model.head.lora_A.weight"
    edit_tensors(folder, lambda x: x | {key: np.ones((1, 7), np.float32)})
    with pytest.raises(ValueError, match=r"head.lora_A.*shape \(1, 6\).*got \(1, 7\)"):
        lora.load_peft(folder, targets)


def test_numbers_that_are_not_finite_are_refused(saved):
    folder, targets = saved
    key = "base_model.model.head.lora_A.weight"
    edit_tensors(folder, lambda x: x | {key: np.full((1, 6), np.nan, np.float32)})
    with pytest.raises(ValueError, match=r"head.lora_A.* not finite"):
        lora.load_peft(folder, targets)


def test_integer_tensors_are_refused(saved):
    folder, targets = saved
    key = "base_model.model.head.lora_A.weight"
    edit_tensors(folder, lambda x: x | {key: np.ones((1, 6), np.int8)})
    with pytest.raises(ValueError, match=r"head.lora_A.weight` as I8"):
        lora.load_peft(folder, targets)


@pytest.mark.parametrize(
    ("path", "shape", "views", "kind"),
    [
        ("conv", (3, 3, 4, 4), matrix_views(), "a convolution"),
        ("embed", (9, 4), matrix_views(embeddings="features"), "an embedding table"),
    ],
)
def test_kernels_of_another_layout_are_refused(tmp_path, path, shape, views, kind):
    params = {path: jnp.ones(shape)}
    targets = lora.targets(params, {path: 2}, alpha=1.0, matrices=views)
    adapters = lora.lora_init(targets, params, jax.random.key(0)).adapters
    with pytest.raises(ValueError, match=f"`{path}`.*read as {kind}"):
        lora.save_peft(tmp_path, targets, adapters)


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (None, "can't tell where the number of the layer goes"),
        (lambda path: "q", "with 1 `{}`"),
        (lambda path: None, "with 1 `{}`"),
    ],
)
def test_stacked_kernels_need_a_place_for_their_number(tmp_path, names, match):
    params = {"q": jnp.ones((3, 4, 4))}
    views = matrix_views(stacked="q")
    targets = lora.targets(params, {"q": 2}, alpha=1.0, matrices=views)
    adapters = lora.lora_init(targets, params, jax.random.key(0)).adapters
    with pytest.raises(ValueError, match=match):
        lora.save_peft(tmp_path, targets, adapters, names=names)


def test_two_kernels_of_one_name_are_refused(tmp_path):
    _, targets, adapters = small()
    with pytest.raises(ValueError, match="the same module `q`"):
        lora.save_peft(tmp_path, targets, adapters, names=lambda path: "q")


def test_without_safetensors_the_extra_is_named(tmp_path, monkeypatch):
    _, targets, adapters = small()
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(ImportError, match=r"optax-cl\[peft\]"):
        lora.save_peft(tmp_path, targets, adapters)


def absorbed():
    """A start that changed the weights, and its adapters after some training."""
    params, x, _ = reference("patterns")
    targets = lora.targets(params, {"proj": 2}, alpha=4.0)
    start = lora.pissa_init(targets, params)
    trained = jax.tree.map(lambda p: 1.1 * p + 0.05, start.adapters)
    expected = forward(lora.merge(targets, start.params, trained), x)
    return params, x, targets, start, trained, expected


def test_adapters_whose_start_changed_the_weights_fit_the_base_model(tmp_path):
    params, x, targets, start, trained, expected = absorbed()
    lora.save_peft(tmp_path, targets, trained, initial=start.adapters)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    twice = lora.targets(params, {"proj": 4}, alpha=8.0)
    read = lora.load_peft(tmp_path, twice)
    np.testing.assert_allclose(
        forward(lora.merge(twice, params, read), x), expected, atol=1e-4
    )
    # Without it the file belongs to the absorbed weights.
    lora.save_peft(tmp_path, targets, trained)
    read = lora.load_peft(tmp_path, targets)
    found = [forward(lora.merge(targets, p, read), x) for p in (start.params, params)]
    np.testing.assert_allclose(found[0], expected, atol=1e-4)
    assert jnp.abs(found[1] - expected).max() > 0.01
    with pytest.raises(ValueError, match=r"`initial` must map.*field `adapters`"):
        lora.save_peft(tmp_path, targets, trained, initial=start)
