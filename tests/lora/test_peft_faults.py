"""Files of adapters that are refused, and adapters that are refused a file."""

import json
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_cl import lora, matrix_views
from tests.lora.peft_models import small

safetensors = pytest.importorskip("safetensors.numpy")


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
