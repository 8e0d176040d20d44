"""Weights of two programs give the oracle's logits; unfit files are refused by name."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.data import DataError
from experiments.models import gguf, llama, llama_weights
from tests.experiments import gguf_files, llama_oracle

CONFIG = llama.LlamaConfig.tiny()
WEIGHTS = llama_oracle.weights(CONFIG)
TOKENS = np.array([5, 60, 2, 2, 33, 17, 0, 41])
FORWARD = jax.jit(llama.forward, static_argnums=0)


@pytest.fixture
def from_gguf(tmp_path):
    def load(weights=WEIGHTS, entries=None, **kwargs):
        path = tmp_path / "model.gguf"
        llama_oracle.write_gguf(path, CONFIG, weights, entries)
        return llama_weights.from_gguf(gguf.read(path), source=str(path), **kwargs)

    return load


@pytest.fixture
def from_safetensors(tmp_path):
    def load(weights=WEIGHTS, **stated):
        folder = llama_oracle.write_hf(tmp_path / "hf", CONFIG, weights, **stated)
        return llama_weights.from_safetensors(folder)

    return load


def test_safetensors_give_the_logits_of_the_half_split_oracle(from_safetensors):
    config, params = from_safetensors()
    assert config == CONFIG
    found = FORWARD(config, params, TOKENS[None])[0]
    expected = llama_oracle.logits(CONFIG, WEIGHTS, TOKENS)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)


def test_gguf_gives_the_logits_of_the_interleaved_oracle(from_gguf):
    config, params = from_gguf()
    assert config == CONFIG
    found = FORWARD(config, params, TOKENS[None])[0]
    # The oracle takes llama.cpp's rows as they stand and turns neighbours.
    permuted = dict(WEIGHTS)
    for name, rows in llama_oracle.gguf_weights(CONFIG, WEIGHTS).items():
        for ggml, hf in (("attn_q", "q_proj"), ("attn_k", "k_proj")):
            if ggml in name:
                layer = name.split(".")[1]
                permuted[f"model.layers.{layer}.self_attn.{hf}.weight"] = rows
    expected = llama_oracle.logits(CONFIG, permuted, TOKENS, interleaved=True)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)
    # The same rows with the other rotation are another model.
    wrong = llama_oracle.logits(CONFIG, permuted, TOKENS)
    assert np.abs(found - wrong).max() > 0.1


def test_both_formats_give_the_same_parameters(from_gguf, from_safetensors):
    a, b = from_gguf()[1], from_safetensors()[1]
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_weights_can_be_loaded_in_bfloat16(from_gguf):
    exact, coarse = from_gguf()[1], from_gguf(dtype=jnp.bfloat16)[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(coarse)} == {jnp.dtype(jnp.bfloat16)}
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a.astype(jnp.bfloat16), b),
        exact,
        coarse,
    )


def test_a_tied_head_that_is_stored_again_is_accepted(from_safetensors):
    embedding = WEIGHTS["model.embed_tokens.weight"]
    params = from_safetensors(WEIGHTS | {"lm_head.weight": embedding})[1]
    assert set(params) == {"embed", "layers", "norm"}
    with pytest.raises(DataError, match="a head of its own"):
        from_safetensors(WEIGHTS | {"lm_head.weight": embedding + 1})


def test_newer_and_older_spellings_of_the_rotation_are_read(from_safetensors):
    rope = {"rope_theta": 5e4, "rope_type": "default"}
    assert from_safetensors(rope_parameters=rope)[0].rope_theta == 5e4
    inverse = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
    assert from_safetensors(WEIGHTS | inverse)[0] == CONFIG


def without(name):
    return {key: value for key, value in WEIGHTS.items() if key != name}


GATE = "model.layers.1.mlp.gate_proj.weight"
NAN = np.full((CONFIG.hidden, CONFIG.width), np.nan, np.float32)
BAD_WEIGHTS = {
    "missing": (without(GATE), "lacks 1 of 29 tensors, the first is `{}`"),
    "shape": (WEIGHTS | {GATE: NAN[:, :-1]}, r"`{}` has the shape \(40, 23\)"),
    "extra": (
        WEIGHTS | {"model.layers.1.self_attn.q_proj.bias": NAN[0]},
        "no place for",
    ),
    "nan": (WEIGHTS | {GATE: NAN}, "`{}` holds NaN or infinity"),
}


@pytest.mark.parametrize("fault", BAD_WEIGHTS)
def test_unfit_safetensors_are_refused_by_name(from_safetensors, fault):
    weights, message = BAD_WEIGHTS[fault]
    with pytest.raises(DataError, match=message.format(GATE)):
        from_safetensors(weights)


@pytest.mark.parametrize("fault", BAD_WEIGHTS)
def test_an_unfit_gguf_file_is_refused_by_name(from_gguf, fault):
    weights, message = BAD_WEIGHTS[fault]
    with pytest.raises(DataError, match=message.format("blk.1.ffn_gate.weight")):
        from_gguf(weights)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"general.architecture": (gguf_files.STRING, "gpt2")}, "'gpt2', expected"),
        ({"llama.rope.scaling.type": (gguf_files.STRING, "yarn")}, "'yarn'"),
        ({"llama.rope.dimension_count": (gguf_files.U32, 2)}, "rotates 2 of 4"),
        ({"llama.attention.head_count": (gguf_files.U32, 5)}, "multiple of `heads`"),
        ({"llama.block_count": (gguf_files.U32, 4)}, "lacks 9 of 38 tensors"),
        (
            {"llama.feed_forward_length": (gguf_files.U32, 48)},
            r"ffn_gate\.weight` has the shape \(40, 24\), expected \(48, 24\)",
        ),
    ],
)
def test_a_gguf_file_of_another_model_is_refused(from_gguf, entry, message):
    with pytest.raises(DataError, match=message):
        from_gguf(entries=entry)


def test_missing_metadata_are_named(tmp_path):
    entries = llama_oracle.gguf_entries(CONFIG)
    del entries["llama.block_count"]
    path = tmp_path / "model.gguf"
    tensors = {"token_embd.weight": gguf_files.f32(np.ones((4, 24)))}
    path.write_bytes(gguf_files.build(entries, tensors))
    with pytest.raises(DataError, match=r"lacks the entry `llama\.block_count`"):
        llama_weights.from_gguf(gguf.read(path))
    path.write_bytes(gguf_files.build(entries, {}))
    with pytest.raises(DataError, match=r"lacks the tensor `token_embd\.weight`"):
        llama_weights.from_gguf(gguf.read(path))


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"model_type": "gpt2"}, "model_type = 'gpt2'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_type = 'llama3'"),
        ({"head_dim": 8}, "head_dim = 8"),
        ({"num_attention_heads": 7}, "multiple of `heads`"),
        ({"hidden_size": "many"}, "`width` must be a Python integer"),
    ],
)
def test_safetensors_of_another_model_are_refused(from_safetensors, stated, message):
    with pytest.raises(DataError, match=message):
        from_safetensors(**stated)


def test_damaged_folders_are_refused_with_the_file(tmp_path):
    folder = llama_oracle.write_hf(tmp_path, CONFIG, WEIGHTS)
    part = folder / "model-1.safetensors"
    whole = part.read_bytes()
    part.write_bytes(whole[:-3])
    with pytest.raises(DataError, match=r"model-1\.safetensors is truncated"):
        llama_weights.from_safetensors(folder)
    part.write_bytes((folder / "model-0.safetensors").read_bytes())
    with pytest.raises(DataError, match="twice"):
        llama_weights.from_safetensors(folder)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(DataError, match=r"holds no file \*\.safetensors"):
        llama_weights.from_safetensors(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(DataError, match=r"lacks the entry `num_attention_heads`"):
        llama_weights.from_safetensors(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(DataError, match=r"config\.json cannot be read"):
        llama_weights.from_safetensors(folder)
