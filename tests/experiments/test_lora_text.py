"""The adapter study on text: examples as tokens, mined pairs, and a tiny run."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import engine, run_folder
from experiments.data import Stream, TextTask
from experiments.models import llama, smollm2
from experiments.progress import Progress
from experiments.studies import _lora_arms as arms
from experiments.studies import _lora_program as program
from experiments.studies import _lora_results as results
from experiments.studies import _lora_text_data as text
from experiments.studies import _lora_text_materials as materials
from experiments.studies import _lora_text_mining as mining
from experiments.studies import lora_text

PATTERN = r"layers/(q|k|v|o)/kernel"
CONFIG = llama.LlamaConfig.tiny()
PARAMS = jax.jit(llama.init, static_argnums=0)(CONFIG, jax.random.key(0))
LAST = 2


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
    words, train, test = text.encode((task(),), text.Form(tokenizer, 16), 8, 4)
    names = {number: word for word, number in tokenizer.known.items()}
    assert train.inputs.shape == (1, 8, 16)
    assert test.inputs.shape == (1, 4, 16)
    for row, where in zip(train.inputs[0], train.where[0], strict=True):
        read = [names[i] for i in row[: where[0] + 1]]
        assert read[:3] == ["Is", "it", "good?"]
        assert read[3:5] == ["text", "number"]
        assert read[-1] == "Answer:"
    assert [names[i] for i in words[0]] == ["bad", "good"]


def test_the_place_after_the_question_asks_for_the_right_word():
    tasks = (task(), task("topics", ("a", "b", "c")))
    words, train, _ = text.encode(tasks, text.Form(Words(), 16), 6, 6)
    assert train.where.shape == train.target.shape == (2, 6, 1)
    for row, answers, targets in zip(words, train.answer, train.target, strict=True):
        np.testing.assert_array_equal(row[answers], targets[:, 0])


def test_text_of_no_task_asks_for_its_own_next_tokens():
    piece = np.frombuffer(b"a b c d e f g h " * 90, np.uint8)
    stream = Stream(("one", "two"), (piece, piece), (piece, piece))
    general = text.windows(stream, text.Form(Words(), 32), 3)
    assert general.inputs.shape == (3, 32)
    np.testing.assert_array_equal(
        np.take_along_axis(general.inputs, general.where + 1, axis=1), general.target
    )
    assert general.where.min() >= 16 and general.where.max() <= 30


def test_missing_answers_are_marked_and_never_chosen():
    tasks = (task(), task("topics", ("a", "b", "c")))
    words, *_ = text.encode(tasks, text.Form(Words(), 16), 6, 6)
    assert words[0, 2] == -1
    assert (words[1] >= 0).all()


def test_answers_that_start_alike_are_refused():
    with pytest.raises(ValueError, match="start with the same token"):
        text.encode(
            (task(answers=("very bad", "very good")),), text.Form(Words(), 16), 4, 4
        )


def test_a_length_without_room_for_text_is_refused():
    with pytest.raises(ValueError, match="leaves no room for a text"):
        text.encode((task(),), text.Form(Words(), 9), 4, 4)


def test_the_pool_asks_about_every_class_as_often_yes_as_no():
    pool = mining.yes_no_pool((task(), task("topics", ("a", "b", "c"), count=30)))
    assert len(pool) == 5
    for one in pool:
        answers = [answer for _, answer in one.train]
        assert np.mean([answer == 1 for answer in answers]) == 0.5
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
    pairs = mining.conflicting_pairs(cosines, 3)
    np.testing.assert_array_equal(pairs, [[0, 1], [2, 3], [4, 5]])
    with pytest.raises(ValueError, match="`--seeds` asks for 4"):
        mining.conflicting_pairs(cosines, 4)


class FewWords(Words):
    """The same, for a model that knows so many."""

    def encode(self, given):
        ids = super().encode(given).ids
        return types.SimpleNamespace(ids=[i % CONFIG.vocabulary for i in ids])


@pytest.mark.slow
def test_the_pairs_of_least_cosine_are_reported_and_come_last(tmp_path):
    size = {"layers": LAST, "length": 16, "batch": 4, "answer": 4}
    size |= {"warm": 2, "train": 8, "test": 4}
    model = smollm2.SmolLM2(CONFIG, PARAMS, FewWords(), 0)
    made = materials.Materials(model, size, ("q", "k", "v", "o"), tmp_path, str)
    tasks = (task("a", ("p", "q")), task("b", ("x", "y", "z"), count=30))
    settings, arrays = made.mined(tasks, tuning=1, reported=1)

    record = run_folder.read_json(tmp_path / "mined.json")
    assert len(record["names"]) == 5
    pairs = mining.conflicting_pairs(np.array(record["after"]["cosines"]), 2)
    np.testing.assert_array_equal(record["pairs"], pairs[:1])
    np.testing.assert_array_equal(arrays.order, [[0, 1], [2, 3]])
    pool = mining.yes_no_pool(tasks)
    chosen = tuple(pool[i] for i in (*pairs[1], *pairs[0]))
    form = text.Form(model.tokenizer, size["length"], settings.answer)
    _, train, test = text.encode(chosen, form, 8, 4)
    np.testing.assert_array_equal(arrays.train.answer, train.answer)
    np.testing.assert_array_equal(arrays.test.answer, test.answer)
    # The kernels have learnt the format.
    before = text.split(llama.last_layers(CONFIG, PARAMS, LAST)[1], settings.pattern)[1]
    moved = jax.tree.map(
        lambda a, b: float(np.abs(a - b).max()), arrays.adapted, before
    )
    assert min(jax.tree.leaves(moved)) > 0


def test_parameters_are_split_at_the_adapted_kernels_and_joined_again():
    frozen, adapted = text.split(PARAMS, PATTERN)
    assert len(jax.tree.leaves(adapted)) == 4
    assert frozen["layers"]["q"]["kernel"] is None
    jax.tree.map(np.testing.assert_array_equal, text.join(frozen, adapted), PARAMS)


def test_more_rates_than_one_need_tuning_orders():
    with pytest.raises(ValueError, match=r"`--rates` needs `--tuning`"):
        lora_text.check(lora_text.Config(rates=(1e-3, 1e-2), tuning=0))


@pytest.fixture(scope="module")
def tokens():
    """Words, training and test examples of two tasks, and text of none, as tokens."""
    tasks = tuple(task(name, count=32) for name in ("one", "two"))
    words, train, test = text.encode(tasks, text.Form(Words(), 16), 32, 16)
    # Every token must be one of the model's.
    cap = lambda x: np.minimum(x, CONFIG.vocabulary - 1)  # noqa: E731
    train, test = (
        part._replace(inputs=cap(part.inputs), target=cap(part.target))
        for part in (train, test)
    )
    general = text.Examples(
        train.inputs[0, :3],
        np.array([[4, 9]] * 3, np.int32),
        np.array([[1, 2], [3, -1], [-1, -1]], np.int32),
        np.full([3], -1, np.int32),
    )
    return cap(words), train, test, general


@pytest.fixture(scope="module")
def tiny(tokens, tmp_path_factory):
    """Settings and arrays with the last layers adapted."""
    folder = tmp_path_factory.mktemp("trunk")
    words, *parts = tokens
    streams = [
        text.read(CONFIG, PARAMS, part, LAST, folder / f"{i}.npy")
        for i, part in enumerate(parts)
    ]
    config, params = llama.last_layers(CONFIG, PARAMS, LAST)
    frozen, adapted = text.split(params, PATTERN)
    order = np.array([[0, 1], [1, 0]], np.int32)
    settings = text.Settings(config, PATTERN, 2, 4, 2, 8)
    return settings, text.Data(frozen, adapted, words, *streams, order)


@functools.partial(jax.jit, static_argnums=0)
def losses_of(settings, data, examples):
    return text.answer_losses(text.network(settings, data, data.adapted), examples)


@functools.partial(jax.jit, static_argnums=0)
def accuracy_of(settings, data):
    """In the first task."""
    return text._accuracy(data, 0, text.network(settings, data, data.adapted))


REST = jax.jit(llama.rest, static_argnums=0)


def test_streams_take_the_place_of_tokens_and_lose_the_same(tokens, tiny):
    settings, data = tiny
    assert data.train.inputs.shape == (2, 32, 16, CONFIG.width)
    frozen, adapted = text.split(PARAMS, PATTERN)
    words, *parts = tokens
    whole = text.Data(frozen, adapted, words, *parts, data.order)
    first = lambda x: x[0, :5]  # noqa: E731
    losses = [
        losses_of(s, d, jax.tree.map(first, d.train))
        for s, d in ((settings, data), (settings._replace(config=CONFIG), whole))
    ]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_with_all_layers_adapted_the_tokens_stay(tokens, tmp_path):
    train = tokens[1]
    kept = text.read(CONFIG, PARAMS, train, CONFIG.layers, tmp_path / "none.npy")
    assert kept is train
    assert not list(tmp_path.iterdir())


def test_streams_are_read_once(tokens, tmp_path, monkeypatch):
    path = tmp_path / "deep" / "train.npy"
    first = text.read(CONFIG, PARAMS, tokens[1], 1, path)
    monkeypatch.setattr(text, "_streams", None)
    again = text.read(CONFIG, PARAMS, tokens[1], 1, path)
    np.testing.assert_array_equal(first.inputs, again.inputs)


def test_the_loss_is_the_mean_over_what_is_asked(tiny):
    settings, data = tiny
    losses = losses_of(settings, data, data.general)
    whole = text.join(data.frozen, data.adapted)
    hidden = np.asarray(REST(settings.config, whole, data.general.inputs))
    table = np.float64(whole["embed"]["embedding"])

    def nats(window, place, token):
        logits = table @ np.float64(hidden[window, place])
        return np.log(np.exp(logits).sum()) - logits[token]

    expected = [(nats(0, 4, 1) + nats(0, 9, 2)) / 2, nats(1, 4, 3), 0.0]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_accuracy_compares_the_words_of_the_task_only(tiny):
    settings, data = tiny
    right = accuracy_of(settings, data)
    whole = text.join(data.frozen, data.adapted)
    hidden = np.asarray(REST(settings.config, whole, data.test.inputs[0]))
    at = np.take_along_axis(hidden, data.test.where[0][..., None], axis=1)[:, 0]
    scores = at @ np.asarray(whole["embed"]["embedding"])[data.words[0]].T
    np.testing.assert_allclose(right, (scores.argmax(1) == data.test.answer[0]).mean())


@pytest.fixture(scope="module")
def few_texts(tiny):
    """Questions with ten texts each, and the cosines of their gradients on all ten."""
    settings, data = tiny
    few = data._replace(train=jax.tree.map(lambda x: x[:, :10], data.train))
    return few, mining.mine(settings._replace(batch=10), few, 10)


def test_cosines_of_gradients_are_one_with_themselves_and_symmetric(few_texts):
    _, cosines = few_texts
    np.testing.assert_allclose(np.diag(cosines), 1.0, rtol=1e-6)
    np.testing.assert_allclose(cosines, cosines.T)


@pytest.mark.parametrize(
    "examples", [300, *(pytest.param(n, marks=pytest.mark.slow) for n in (8, 30))]
)
def test_questions_with_few_texts_are_compared_on_what_they_have(
    tiny, few_texts, examples
):
    few, whole = few_texts
    cosines = mining.mine(tiny[0]._replace(batch=12), few, examples)
    np.testing.assert_array_equal(cosines, whole)


@pytest.fixture(scope="module")
def warmed(tiny):
    settings, data = tiny
    # A head that can be sure of a word.
    table = 30 * data.frozen["embed"]["embedding"]
    frozen = data.frozen | {"embed": {"embedding": table}}
    settings, data = settings._replace(batch=16), data._replace(frozen=frozen)
    adapted, losses = mining.warm_up(settings, data, 60, 2e-2)
    return settings, data, data._replace(adapted=adapted), losses


def test_after_the_warm_up_yes_and_no_are_even_and_nothing_else_is_said(warmed):
    settings, before, after, losses = warmed
    assert mining.odds(settings, before).mass.max() < 0.2
    odds = mining.odds(settings, after)
    assert odds.mass.min() > 0.95
    np.testing.assert_allclose(odds.yes, 0.5, atol=0.02)
    assert losses[-1] == pytest.approx(np.log(2), abs=0.05)


def test_the_warm_up_learns_nothing_of_what_is_right(warmed):
    """With the right answers turned round it ends at the same kernels."""
    settings, before, after, _ = warmed
    train = before.train._replace(
        target=before.words[:, None, :1] + 0 * before.train.target,
        answer=1 - before.train.answer,
    )
    turned, _ = mining.warm_up(settings, before._replace(train=train), 60, 2e-2)
    jax.tree.map(np.testing.assert_array_equal, turned, after.adapted)


def test_opposite_questions_conflict_after_the_warm_up_and_agree_before(warmed):
    """The two tasks have the same texts; here one has all its answers turned round."""
    settings, before, after, _ = warmed
    answer = before.train.answer.copy()
    answer[1] = 1 - answer[0]
    inputs = before.train.inputs.copy()
    inputs[1] = inputs[0]
    target = np.stack([w[a] for w, a in zip(before.words, answer, strict=True)])
    train = before.train._replace(
        inputs=inputs, answer=answer, target=target[..., None]
    )
    cosines = [
        mining.mine(settings, data._replace(train=train), 32)[0, 1]
        for data in (before, after)
    ]
    assert cosines[0] > 0.5
    assert cosines[1] < -0.8


def _run(tiny, name, folder, chunks=3):
    settings, data = tiny
    arm = arms.ARMS[name]
    made = program.make_program(text.make_bench(settings), arms.FAMILIES[arm.family], 3)
    pairs = [(arm, "sequence")]
    with jax.numpy_rank_promotion("allow"):
        lanes = arms.make_lanes(pairs, text.STREAMS, (1e-2,), (5, 6))
        engine.run_program(
            made,
            data,
            lanes,
            chunk_steps=chunks,
            folder=folder,
            progress=Progress(stream=None),
        )
    return arm, pairs


@pytest.mark.slow
@pytest.mark.parametrize("name", ["EBLoRA", "SLICE 1"])
def test_a_tiny_model_goes_through_its_tasks(name, tiny, tmp_path):
    arm, pairs = _run(tiny, name, tmp_path)
    config = types.SimpleNamespace(rates=(1e-2,), tuning=0)
    arm = results.load(tmp_path, {arm.family: pairs}, config)["sequence"][name]
    assert arm.matrix.shape == (1, 2, 3, 2)
    assert np.isfinite(arm.base).all()
    assert arm.singular.shape == (1, 2, 2, 4 * LAST, 2)
    if name == "EBLoRA":
        flat = arm.singular / arm.singular[..., :1]
        np.testing.assert_allclose(flat, 1.0, rtol=1e-4)
    assert jnp.isfinite(arm.cosine).all()


@pytest.mark.slow
def test_a_run_killed_between_tasks_ends_as_if_it_had_not_been(
    tiny, tmp_path, monkeypatch
):
    """The streams are files, the batches of each step come from the lane's seed."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    _run(tiny, "LoRA", whole)
    save = engine.checkpoints.save

    def save_and_die(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(engine._CheckpointClock, "due", lambda self: True)
    monkeypatch.setattr(engine.checkpoints, "save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        _run(tiny, "LoRA", killed)
    monkeypatch.setattr(engine.checkpoints, "save", save)
    _run(tiny, "LoRA", killed)
    ours, theirs = (
        run_folder.load_arrays(folder / "raw" / "lora.npz")
        for folder in (killed, whole)
    )
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name])
