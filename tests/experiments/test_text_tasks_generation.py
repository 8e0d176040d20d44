"""Tasks with free answers: greedy answers inside jit, Rouge-L of them on strings."""

import dataclasses
import json
import types
from functools import partial

import jax
import numpy as np
import pytest
from jax import export

from experiments import data, engine, run_folder
from experiments.data import TextTask
from experiments.models import generation, llama, smollm2
from experiments.progress import Progress
from experiments.studies import _lora_arms as arms
from experiments.studies import _lora_results as results
from experiments.studies import _lora_text_generation as free
from experiments.studies import lora_text
from experiments.studies._lora_results import ArmResults

CONFIG = llama.LlamaConfig.tiny()
INIT = jax.jit(llama.init, static_argnums=0)
VOCABULARY = "the cat sat on a mat dog ran".split()
STOP = 60


def decode(ids):
    """Numbers to words; 60 ends a text."""
    ids = list(ids)
    ids = ids[: ids.index(STOP)] if STOP in ids else ids
    return " ".join(VOCABULARY[i] for i in ids)


@pytest.fixture(scope="module")
def given():
    """What ``write`` takes: a trunk of one layer, 19 prompts, and the layers above."""
    params = jax.tree.map(np.asarray, INIT(CONFIG, jax.random.key(0)))
    random = np.random.default_rng(1)
    tokens = random.integers(0, CONFIG.vocabulary, [1, 19, 7]).astype(np.int32)
    last = (np.arange(19, dtype=np.int32) % 6 + 1)[None]
    first = jax.tree.map(lambda x: x[:1], params["layers"])
    own = jax.tree.map(lambda x: x[1:], params["layers"])
    writer = free.Writer(first, tokens, last, np.array([17], np.int32))
    return {"writer": writer, "task": 0, "params": {**params, "layers": own}}


WRITE = jax.jit(
    partial(
        free.write,
        dataclasses.replace(CONFIG, layers=CONFIG.layers - 1),
        form=free.Answer(4, STOP),
    )
)


def test_answers_are_those_to_each_prompt_alone(given):
    found = np.asarray(WRITE(**given))
    assert found.shape == (19, 4)
    params = INIT(CONFIG, jax.random.key(0))
    for row in (0, 16):
        last = given["writer"].last[0, row]
        prompt = given["writer"].prompts[0, row : row + 1, : last + 1]
        alone = generation.generate(CONFIG, params, prompt, 4, stop=STOP)
        np.testing.assert_array_equal(found[row], alone[0])


def test_texts_that_no_answer_is_wanted_for_cost_nothing(given):
    writer = given["writer"]._replace(rows=np.array([16], np.int32))
    found = np.asarray(WRITE(**{**given, "writer": writer}))
    assert found[:16].any(axis=1).all()
    np.testing.assert_array_equal(found[16:], 0)


def test_writing_compiles_for_cuda_and_tpu(given):
    export.export(WRITE, platforms=["cuda", "tpu"])(**given)


def test_prompts_are_moved_to_the_end_and_what_follows_them_is_masked():
    tokens = np.array([[1, 2, 3, 9, 9], [4, 5, 6, 7, 9]])
    moved, mask = map(np.asarray, jax.jit(free.left_padded)(tokens, np.array([2, 3])))
    np.testing.assert_array_equal(mask, [[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]])
    np.testing.assert_array_equal(moved[0][2:], [1, 2, 3])
    np.testing.assert_array_equal(moved[1][1:], [4, 5, 6, 7])


def test_an_answer_ends_with_the_stop_token_if_that_fits():
    tokenizer = types.SimpleNamespace(
        encode=lambda text: types.SimpleNamespace(ids=[len(w) for w in text.split()])
    )
    assert free.answer_tokens(tokenizer, free.Answer(5, STOP), "to be or") == [
        2,
        2,
        2,
        STOP,
    ]
    assert free.answer_tokens(tokenizer, free.Answer(3, STOP), "to be or") == [2, 2, 2]


def test_text_ends_before_the_stop_token():
    tokenizer = types.SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)))
    assert free.text_of(tokenizer, 7, [1, 2, 7, 7]) == "1 2"
    assert free.text_of(tokenizer, 7, [1, 2]) == "1 2"
    assert free.text_of(tokenizer, 7, [7, 1]) == ""


def test_scores_go_to_the_seeds_own_tasks():
    # Two lanes, two seeds of opposite orders, tasks: of words, and free.
    order = np.array([[0, 1], [1, 0]])
    right = [(), (("the cat",), ("a dog", "the mat"))]
    ids = [[0, 1, STOP], [0, 5, STOP]]
    written = np.zeros([2, 3, 2, 3, 3], int)  # one row more than the task has
    written[0, :, 1, :2] = ids
    written[1, 2, 0, :2] = ids
    written[1, :2, 0, :2] = [[0, 1, 0], [STOP, 0, 1]]
    found = free.scores(written, order, right, decode)
    assert found.shape == (2, 3, 2)
    np.testing.assert_array_equal(found[0, :, 1], 1.0)
    assert np.isnan(found[0, :, 0]).all()
    # "the cat the" of "the cat" is 4 / 5, nothing is nothing.
    np.testing.assert_allclose(found[1, :, 0], [0.4, 0.4, 1.0])
    assert np.isnan(found[1, :, 1]).all()


def arm_results(matrix, name="LoRA"):
    empty = np.zeros([*matrix.shape[:2], 2, 1])
    return ArmResults(arms.ARMS[name], np.array([1e-3]), 0, matrix, *(empty,) * 5)


def test_rouge_stands_where_answers_were_free(tmp_path):
    (tmp_path / "raw").mkdir()
    pairs = [(arms.ARMS["LoRA"], "sequence"), (arms.ARMS["O-LoRA .1"], "sequence")]
    of = {a.name: arm_results(np.full([1, 2, 3, 2], 0.5), a.name) for a, _ in pairs}
    rouge = np.full([4, 3, 2], np.nan)
    rouge[3, :, 1] = 0.25
    run_folder.save_arrays(tmp_path / "raw" / "one-rouge.npz", {"rouge": rouge})
    found = free.with_rouge({"sequence": of}, tmp_path, {"one": pairs, "two": []})
    np.testing.assert_array_equal(found["sequence"]["LoRA"].matrix, 0.5)
    matrix = found["sequence"]["O-LoRA .1"].matrix
    np.testing.assert_array_equal(matrix[0, 1, :, 1], 0.25)
    np.testing.assert_array_equal(matrix[0, 0], 0.5)
    np.testing.assert_array_equal(matrix[0, 1, :, 0], 0.5)


def test_published_measures_by_hand():
    rows = [[0.9, 0.9, 0.9], [0.8, 0.9, 0.9], [0.7, 0.6, 0.9], [0.5, 0.5, 0.4]]
    matrix = np.array(rows)[None, None].repeat(2, 1)
    alone = np.array([[0.0] * 3, [0.6] * 3, [0.5] * 3, [0.4] * 3])[None, None]
    of = {
        "LoRA": arm_results(matrix),
        "LoRA per task": arm_results(alone.repeat(2, 1), "LoRA per task"),
    }
    table = free.published_table(of)
    name, final, forgotten, gain = table.rows[0]
    assert name == "LoRA"
    np.testing.assert_allclose(final[0], 100 * 1.4 / 3)
    # Not .9 - .5 for the second task: it was not learnt yet then.
    np.testing.assert_allclose(forgotten[0], 100 * (0.3 + 0.1) / 2)
    np.testing.assert_allclose(gain[0], 100 * (0.8 + 0.6 + 0.4 - 1.5) / 3)
    assert table.rows[1][3] is None


def test_examples_show_an_answer_before_after_and_at_the_end():
    rows = (("a text", ("the cat",)),)
    tasks = [
        TextTask("words", "", ("x", "y"), (), ()),
        TextTask("free", "", (), rows, rows),
    ]
    written = np.full([3, 2, 1, 2], STOP)
    written[0, 0, 0], written[1, 0, 0], written[2, 0, 0] = [6, 7], [0, 1], [0, STOP]
    (row,) = free.examples(written, np.array([1, 0]), tasks, decode)
    assert row == ["free", "a text", "the cat", "dog ran", "the cat", "the"]


class Words:
    """A tokenizer that gives every new word the next number."""

    def __init__(self):
        self.known = []

    def encode(self, text):
        new = [word for word in text.split() if word not in self.known]
        self.known += dict.fromkeys(new)
        # Whatever else is read has no tokens of its own.
        ids = [min(self.known.index(word), STOP - 1) for word in text.split()]
        return types.SimpleNamespace(ids=ids)

    def decode(self, ids):
        return " ".join(self.known[i] for i in ids if i < len(self.known))


def folder_of_two_tasks(folder):
    """One answered by "no" or "yes", one by a text; the latter has fewer rows."""
    answers = {
        "words": ("Is it so?", 24, lambda i: ["no", "yes"][i % 2]),
        "text": ("Who sat?", 10, lambda i: ["the cat sat", "a cat sat down"]),
    }
    for name, (question, count, answer) in answers.items():
        rows = [{"input": f"text {i}", "output": answer(i)} for i in range(count)]
        (folder / name).mkdir()
        for part in ("train", "test"):
            content = {"Definition": [question], "Instances": rows}
            (folder / name / f"{part}.json").write_text(json.dumps(content))
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["LoRA", "LoRA per task"])
def test_a_tiny_model_learns_a_free_answer_from_a_folder(name, tmp_path, monkeypatch):
    params = llama.init(CONFIG, jax.random.key(0))
    # As it is, the head can't tell tokens apart with any confidence.
    params["embed"]["embedding"] *= 20.0
    model = smollm2.SmolLM2(CONFIG, params, Words(), STOP)
    monkeypatch.setattr(smollm2, "load", lambda: model)
    monkeypatch.setattr(data, "model_file", lambda name: None)
    (tmp_path / "tasks").mkdir()
    config = lora_text.Config(
        streams=("sequence",),
        source=folder_of_two_tasks(tmp_path / "tasks"),
        arms=(name,),
        seeds=2,
        tuning=0,
        rates=(3e-2,),
        layers=2,
        length=16,
        batch=8,
        steps=32,
        train=24,
        test=20,
        answer=5,
    )
    lora_text.check(config)
    (folder := tmp_path / "run").mkdir()
    run_folder.open_run(folder, "lora_text", config)
    with jax.numpy_rank_promotion("allow"):
        context = engine.Context(folder, Progress(stream=None))
        found = lora_text.run(config, folder, context)["sequence"][name]

    loaded = lora_text._load(folder, config)["sequence"][name]
    measured = results.load(folder, lora_text.programs(config), config)
    matrix, accuracy = loaded.matrix[0], measured["sequence"][name].matrix[0]
    for seed, order in enumerate(lora_text._orders(config, "ab", (1000, 1001))):
        (text,) = np.flatnonzero(order == 0)
        # Nearly nothing is right at first, nearly everything when it has been learnt.
        assert matrix[seed, 0, text] < 0.3
        assert matrix[seed, text + 1, text] > 0.9
        # The other task has its accuracies.
        np.testing.assert_array_equal(
            matrix[seed, :, 1 - text], accuracy[seed, :, 1 - text]
        )
    np.testing.assert_allclose(found["final"], matrix[:, -1].mean(-1))

    tables = {table.name: table for table in lora_text.report(folder).tables}
    assert "Rouge-L" in tables["methods-sequence"].note
    kinds = [row[:4] for row in tables["tasks"].rows]
    assert kinds == [["text", "free text", 10, 10], ["words", "one of 2 words", 24, 20]]
    (shown,) = tables["answers"].rows
    assert shown[0] == "text"
    assert shown[2] == "the cat sat"
    np.testing.assert_allclose(
        tables["published"].rows[0][1][0], 100 * found["final"].mean()
    )


def test_pairs_are_not_mined_from_free_answers_alone(tmp_path):
    source = folder_of_two_tasks(tmp_path)
    rows = json.loads((tmp_path / "text" / "train.json").read_text())
    for part in ("train", "test"):
        (tmp_path / "words" / f"{part}.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="give `--streams sequence`"):
        lora_text.check(lora_text.Config(source=source))


def test_seeds_take_the_published_orders_in_turn():
    tasks = [TextTask(name, "", (), (), ()) for name in ("agnews", "cb", "mnli")]
    config = lora_text.Config(order="published", tasks=2)
    orders = lora_text._orders(config, tasks, (1000, 1001, 1002))
    np.testing.assert_array_equal(orders, [[2, 1], [2, 1], [2, 1]])
    tasks.append(TextTask("wic", "", (), (), ()))
    orders = lora_text._orders(dataclasses.replace(config, tasks=4), tasks, (0, 1, 2))
    np.testing.assert_array_equal(orders, [[2, 1, 3, 0], [2, 1, 0, 3], [2, 1, 3, 0]])


def test_an_order_that_nobody_published_is_refused(tmp_path):
    source = folder_of_two_tasks(tmp_path)
    with pytest.raises(ValueError, match="no published order of these tasks"):
        lora_text.check(lora_text.Config(source=source, order="published"))
