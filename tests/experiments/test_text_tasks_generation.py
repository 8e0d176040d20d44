"""Tasks with free answers: greedy answers inside jit, Rouge-L of them on strings."""

import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from experiments import run_folder
from experiments.data import TextTask
from experiments.models import generation, llama
from experiments.studies import _lora_arms as arms
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
    write = jax.jit(partial(free.write, CONFIG, most=4, stop=STOP))
    found = write(params, tokens, last)
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
    assert free.answer_tokens(tokenizer, STOP, "to be or", 5) == [2, 2, 2, STOP]
    assert free.answer_tokens(tokenizer, STOP, "to be or", 3) == [2, 2, 2]


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


def results(matrix, name="LoRA"):
    empty = np.zeros([*matrix.shape[:2], 2, 1])
    return ArmResults(arms.ARMS[name], np.array([1e-3]), 0, matrix, *(empty,) * 5)


def test_rouge_stands_where_answers_were_free(tmp_path):
    (tmp_path / "raw").mkdir()
    pairs = [(arms.ARMS["LoRA"], "sequence"), (arms.ARMS["O-LoRA .1"], "sequence")]
    of = {a.name: results(np.full([1, 2, 3, 2], 0.5), a.name) for a, _ in pairs}
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
        "LoRA": results(matrix),
        "LoRA per task": results(alone.repeat(2, 1), "LoRA per task"),
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
