"""The adapter study on text: examples as tokens, mined pairs, and a tiny run."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import engine
from experiments.data import TextTask
from experiments.models import llama
from experiments.progress import Progress
from experiments.studies import _lora_arms as arms
from experiments.studies import _lora_program as program
from experiments.studies import _lora_results as results
from experiments.studies import _lora_text_data as text
from experiments.studies import lora_text

PATTERN = r"layers/(q|k|v|o)/kernel"


class Words:
    """A tokenizer that gives every new word the next number."""

    def __init__(self):
        self.known = {}

    def encode(self, given):
        ids = [self.known.setdefault(w, len(self.known)) for w in given.split()]
        return types.SimpleNamespace(ids=ids)


def task(name="films", answers=("bad", "good"), count=20, question="Is it good?"):
    rows = tuple((f"text number {i} " * 30, i % len(answers)) for i in range(count))
    return TextTask(name, question, answers, rows, rows)


def test_an_example_is_question_cut_text_and_the_place_of_its_answer():
    tokenizer = Words()
    words, train, test = text.encode((task(),), tokenizer, 16, 8, 4)
    names = {number: word for word, number in tokenizer.known.items()}
    assert train.tokens.shape == (1, 8, 16)
    assert test.tokens.shape == (1, 4, 16)
    for row, last in zip(train.tokens[0], train.last[0], strict=True):
        read = [names[i] for i in row[: last + 1]]
        assert read[:3] == ["Is", "it", "good?"]
        assert read[3:5] == ["text", "number"]
        assert read[-1] == "Answer:"
    assert [names[i] for i in words[0]] == ["bad", "good"]


def test_missing_answers_are_marked_and_never_chosen():
    tasks = (task(), task("topics", ("a", "b", "c")))
    words, *_ = text.encode(tasks, Words(), 16, 6, 6)
    assert words[0, 2] == -1
    assert (words[1] >= 0).all()


def test_answers_that_start_alike_are_refused():
    with pytest.raises(ValueError, match="start with the same token"):
        text.encode((task(answers=("very bad", "very good")),), Words(), 16, 4, 4)


def test_a_length_without_room_for_text_is_refused():
    with pytest.raises(ValueError, match="leaves no room for a text"):
        text.encode((task(),), Words(), 9, 4, 4)


def test_the_pool_asks_about_every_class_as_often_yes_as_no():
    pool = text.yes_no_pool((task(), task("topics", ("a", "b", "c"), count=30)))
    assert len(pool) == 5
    for one in pool:
        answers = [answer for _, answer in one.train]
        assert np.mean(answers) == 0.5
        assert one.answers == ("no", "yes")
    about_b = next(one for one in pool if one.name == "topics: b")
    rows = dict(task("topics", ("a", "b", "c"), count=30).train)
    assert all((rows[t] == 1) == bool(answer) for t, answer in about_b.train)


def test_mined_pairs_have_the_lowest_cosines_and_share_no_task():
    cosines = np.ones([6, 6])
    for (i, j), value in {
        (0, 1): -0.9,
        (1, 2): -0.8,
        (2, 3): -0.1,
        (4, 5): 0.2,
    }.items():
        cosines[i, j] = cosines[j, i] = value
    pairs = text.conflicting_pairs(cosines, 3)
    np.testing.assert_array_equal(pairs, [[0, 1], [2, 3], [4, 5]])
    with pytest.raises(ValueError, match="`--seeds` asks for 4"):
        text.conflicting_pairs(cosines, 4)


def test_parameters_are_split_at_the_adapted_kernels_and_joined_again():
    params = llama.init(llama.LlamaConfig.tiny(), jax.random.key(0))
    frozen, adapted = text.split(params, PATTERN)
    assert len(jax.tree.leaves(adapted)) == 4
    assert frozen["layers"]["q"]["kernel"] is None
    jax.tree.map(np.testing.assert_array_equal, text.join(frozen, adapted), params)


def test_more_rates_than_one_need_tuning_orders():
    with pytest.raises(ValueError, match=r"`--rates` needs `--tuning`"):
        lora_text.check(lora_text.Config(rates=(1e-3, 1e-2)))


def _tiny():
    tasks = tuple(task(name, count=32) for name in ("one", "two"))
    words, train, test = text.encode(tasks, Words(), 16, 32, 16)
    config = llama.LlamaConfig.tiny()
    params = llama.init(config, jax.random.key(0))
    # Every token must be one of the model's.
    cap = lambda x: np.minimum(x, config.vocabulary - 1)  # noqa: E731
    frozen, adapted = text.split(params, PATTERN)
    settings = text.Settings(config, PATTERN, 2, 4, 2, 8)
    data = text.Data(
        frozen,
        adapted,
        cap(words),
        train._replace(tokens=cap(train.tokens)),
        test._replace(tokens=cap(test.tokens)),
        np.zeros([2, 16], np.int32),
        np.array([[0, 1], [1, 0]], np.int32),
    )
    return settings, data


def test_cosines_of_gradients_are_one_with_themselves_and_symmetric():
    settings, data = _tiny()
    cosines = text.mine(settings, data, 8)
    np.testing.assert_allclose(np.diag(cosines), 1.0, rtol=1e-6)
    np.testing.assert_allclose(cosines, cosines.T)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["EBLoRA", "SLICE 1"])
def test_a_tiny_model_goes_through_its_tasks(name, tmp_path):
    settings, data = _tiny()
    arm = arms.ARMS[name]
    made = program.make_program(text.make_bench(settings), arms.FAMILIES[arm.family], 3)
    pairs = [(arm, "sequence")]
    with jax.numpy_rank_promotion("allow"):
        engine.run_program(
            made,
            data,
            arms.make_lanes(pairs, text.STREAMS, (1e-2,), (5, 6)),
            chunk_steps=3,
            folder=tmp_path,
            progress=Progress(stream=None),
        )
    config = types.SimpleNamespace(rates=(1e-2,), tuning=0)
    arm = results.load(tmp_path, {arm.family: pairs}, config)["sequence"][name]
    assert arm.matrix.shape == (1, 2, 3, 2)
    assert np.isfinite(arm.base).all()
    assert arm.singular.shape == (1, 2, 2, 4 * settings.config.layers, 2)
    if name == "EBLoRA":
        flat = arm.singular / arm.singular[..., :1]
        np.testing.assert_allclose(flat, 1.0, rtol=1e-4)
    assert jnp.isfinite(arm.cosine).all()
