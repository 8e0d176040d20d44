"""Models that Hugging Face's transformers wrote give its own logits, or are refused."""

import json

import numpy as np
import pytest

from experiments.data import DataError
from experiments.models import llama, llama_weights

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOKENS = np.array([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 69]])
SIZES = {
    "vocab_size": 70,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    # Larger than usual, so that attention is far from uniform.
    "initializer_range": 0.3,
    "tie_word_embeddings": True,
}


@pytest.fixture
def write(tmp_path):
    """Lets transformers make a model and save it; gives the folder and its logits."""

    def write(*, dtype=torch.float32, max_shard_size="1GB", **stated):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**(SIZES | stated))
        model = transformers.LlamaForCausalLM(config).to(dtype)
        model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
        # What is stored in bfloat16 is read exactly, and computed in float32.
        model = model.from_pretrained(tmp_path, dtype=torch.float32)
        with torch.no_grad():
            logits = model(torch.as_tensor(TOKENS)).logits
        return tmp_path, logits.numpy()

    return write


def assert_same_logits(folder, expected):
    config, params = llama_weights.from_safetensors(folder)
    found = llama.forward(config, params, TOKENS)
    assert np.abs(expected).max() > 3
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "stated",
    [
        {},
        {"num_key_value_heads": 4},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}},
        {"rms_norm_eps": 1e-2},
        {"dtype": torch.bfloat16},
    ],
    ids=["plain", "all heads", "another rotation", "another epsilon", "bfloat16"],
)
def test_a_model_of_transformers_gives_its_logits(write, stated):
    assert_same_logits(*write(**stated))


def test_a_model_in_several_files_gives_the_same(write):
    folder, expected = write(max_shard_size="20KB")
    parts = sorted(folder.glob("*.safetensors"))
    assert len(parts) > 2
    # What the index does not name is none of the model.
    (folder / "consolidated.safetensors").write_bytes(parts[0].read_bytes())
    assert_same_logits(folder, expected)
    parts[1].unlink()
    with pytest.raises(DataError, match=rf"lacks the file `{parts[1].name}`"):
        llama_weights.from_safetensors(folder)


def test_a_head_of_its_own_is_refused_even_where_it_is_missing(write):
    folder, _ = write(tie_word_embeddings=False)
    with pytest.raises(DataError, match=r"a head of its own, `lm_head\.weight`"):
        llama_weights.from_safetensors(folder)
    safetensors = pytest.importorskip("safetensors.torch")
    file = folder / "model.safetensors"
    tensors = safetensors.load_file(file)
    del tensors["lm_head.weight"]
    safetensors.save_file(tensors, file)
    with pytest.raises(DataError, match="says tie_word_embeddings = False"):
        llama_weights.from_safetensors(folder)


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"attention_bias": True}, r"no place for, the first is .*k_proj\.bias"),
        ({"mlp_bias": True}, r"no place for, the first is .*down_proj\.bias"),
        ({"head_dim": 16}, "head_dim = 16"),
        ({"rope_parameters": LLAMA3}, "rope_type = 'llama3'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ],
)
def test_variants_that_transformers_makes_are_refused(write, stated, message):
    folder, _ = write(**stated)
    with pytest.raises(DataError, match=message):
        llama_weights.from_safetensors(folder)


def test_a_damaged_index_is_refused(write):
    folder, _ = write(max_shard_size="20KB")
    index = folder / "model.safetensors.index.json"
    for damaged in ("{", "[]", json.dumps({"metadata": {}})):
        index.write_text(damaged)
        with pytest.raises(DataError, match=r"index\.json"):
            llama_weights.from_safetensors(folder)
