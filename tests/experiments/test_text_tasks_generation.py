"""Tasks with free answers: greedy answers inside jit, Rouge-L of them on strings."""

import dataclasses
import json
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import engine, run_folder
from experiments.data import TextTask
from experiments.data._instructions import read_tasks
from experiments.models import generation, llama
from experiments.progress import Progress
from experiments.studies import _lora_arms as arms
from experiments.studies import _lora_program as program
from experiments.studies import _lora_results as results
from experiments.studies import _lora_text_data as text
from experiments.studies import _lora_text_generation as free
from experiments.studies._lora_results import ArmResults

CONFIG = llama.LlamaConfig.tiny()
VOCABULARY = "the cat sat on a mat dog ran".split()
STOP = 60


def decode(ids):
    """Numbers to words; 60 ends a text."""
    ids = list(ids)
    ids = ids[: ids.index(STOP)] if STOP in ids else ids
    return " ".join(VOCABULARY[i] for i in ids)


def test_answers_are_those_to_each_prompt_alone():
    params = llama.init(CONFIG, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), [19, 7], 0, CONFIG.vocabulary)
    last = jnp.arange(19) % 6 + 1
    first = jax.tree.map(lambda x: x[:1], params["layers"])
    own = jax.tree.map(lambda x: x[1:], params["layers"])
    config = dataclasses.replace(CONFIG, layers=CONFIG.layers - 1)
    writer = free.Writer(first, tokens[None], last[None], jnp.array([17]))
    write = jax.jit(partial(free.write, config, form=free.Answer(4, STOP)))
    found = write(writer, task=0, params={**params, "layers": own})
    assert found.shape == (19, 4)
    for row in (0, 16):
        prompt = tokens[row : row + 1, : last[row] + 1]
        alone = generation.generate(CONFIG, params, prompt, 4, stop=STOP)
        np.testing.assert_array_equal(found[row], alone[0])


def test_prompts_are_moved_to_the_end_and_what_follows_them_is_masked():
    tokens = jnp.array([[1, 2, 3, 9, 9], [4, 5, 6, 7, 9]])
    moved, mask = free.left_padded(tokens, jnp.array([2, 3]))
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
    table = free.published_table(of, "sequence")
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
        return types.SimpleNamespace(ids=[self.known.index(w) for w in text.split()])

    def decode(self, ids):
        return " ".join(self.known[i] if i < len(self.known) else "?" for i in ids)


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


@pytest.mark.parametrize(
    "name", ["LoRA", pytest.param("LoRA per task", marks=pytest.mark.slow)]
)
def test_a_tiny_model_learns_a_free_answer_from_a_folder(name, tmp_path):
    (tmp_path / "tasks").mkdir()
    tasks = read_tasks(folder_of_two_tasks(tmp_path / "tasks"))
    tokenizer, form = Words(), free.Answer(tokens=5, stop=STOP)
    words, train, test = text.encode(tasks, tokenizer, 16, 24, 20, form)
    params = llama.init(CONFIG, jax.random.key(0))
    # As it is, the head can't tell tokens apart with any confidence.
    params["embed"]["embedding"] *= 20.0
    config, last = llama.last_layers(CONFIG, params, 2)
    pattern = r"layers/(v|o|down)/kernel"
    general = test._replace(answer=test.answer - 1)
    arrays = text.Data(
        *text.split(last, pattern),
        words,
        text.read(CONFIG, params, train, 2, tmp_path / "train.npy"),
        text.read(CONFIG, params, test, 2, tmp_path / "test.npy"),
        jax.tree.map(
            lambda x: x[1],
            text.read(CONFIG, params, general, 2, tmp_path / "general.npy"),
        ),
        np.array([[0, 1], [1, 0]], np.int32),
        free.Writer(
            jax.tree.map(lambda x: x[:1], params["layers"]),
            test.inputs,
            test.where[..., 0],
            np.array([10, 0]),
        ),
    )
    settings = text.Settings(config, pattern, 4, 8, 2, 16, form)
    arm = arms.ARMS[name]
    made = program.make_program(
        text.make_bench(settings), arms.FAMILIES[arm.family], 30
    )
    pairs = [(arm, "sequence")]
    with jax.numpy_rank_promotion("allow"):
        engine.run_program(
            made,
            arrays,
            arms.make_lanes(pairs, text.STREAMS, (3e-2,), (5, 6)),
            chunk_steps=30,
            folder=tmp_path,
            progress=Progress(stream=None),
        )
    right = [[answers for _, answers in text.chosen(tasks[0].test, 20)], []]
    decode = partial(free.text_of, tokenizer, STOP)
    free.save_scores(tmp_path, made.name, arrays.order, right, decode)
    run = types.SimpleNamespace(rates=(3e-2,), tuning=0)
    loaded = results.load(tmp_path, {made.name: pairs}, run)
    found = free.with_rouge(loaded, tmp_path, {made.name: pairs})
    matrix = found["sequence"][name].matrix[0]
    accuracy = loaded["sequence"][name].matrix[0]
    # Seed 5 learns the text first, seed 6 last.
    assert matrix[0, 0, 0] < 0.3
    assert matrix[0, 1, 0] > 0.9
    assert matrix[1, 2, 1] > 0.9
    # The other task has accuracies, as they were measured.
    np.testing.assert_array_equal(matrix[0, :, 1], accuracy[0, :, 1])
    np.testing.assert_array_equal(matrix[1, :, 0], accuracy[1, :, 0])
