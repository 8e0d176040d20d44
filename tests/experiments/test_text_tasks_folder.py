"""Tasks in the form of Super-NaturalInstructions, from folders and archives."""

import io
import json
import tarfile

import pytest

from experiments import data
from experiments.data import _published_orders
from experiments.data._instructions import read_tasks

WORDS = (["no", "yes"], ["yes"])
FREE = ([f"answer {i}" for i in range(30)], ["answer 3", ["one", "two"]])


def content(answers, question="Why?\n"):
    rows = [{"input": f"text {i}", "output": a} for i, a in enumerate(answers)]
    return json.dumps({"Definition": [question], "Instances": rows})


def write(folder, **tasks):
    """Folders of tasks; a part that is None is missing."""
    for name, parts in tasks.items():
        (folder / name).mkdir(parents=True)
        for part, answers in zip(("train", "test"), parts, strict=True):
            if answers is not None:
                (folder / name / f"{part}.json").write_text(content(answers))
    return str(folder)


def pack(folder, path):
    with tarfile.open(path, "w:xz") as archive:
        archive.add(folder, "benchmark")
    return str(path)


def test_a_folder_is_a_sequence_of_tasks(tmp_path):
    folder = write(tmp_path, b=WORDS, a=(["x", "y"], [["y"]]))
    first, second = data.load_text_tasks(folder)
    assert (first.name, second.name) == ("a", "b")
    assert second.question == "Why?"
    assert second.answers == ("no", "yes")
    assert second.test == (("text 0", 1),)
    assert first.test == (("text 0", 1),)  # a list of one answer


def test_many_different_answers_are_free_text_and_all_right_ones_are_kept(tmp_path):
    _, free = read_tasks(write(tmp_path, a=WORDS, b=FREE))
    assert free.answers == ()
    assert free.train[4] == ("text 4", ("answer 4",))
    assert free.test[1] == ("text 1", ("one", "two"))


def test_two_right_answers_at_once_are_free_text(tmp_path):
    _, free = read_tasks(write(tmp_path, a=WORDS, b=(["x", "y"], [["x", "y"]])))
    assert free.answers == ()


def test_one_answer_in_two_forms_is_free_text(tmp_path):
    both = [["x", "y"]]
    _, free = read_tasks(write(tmp_path, a=WORDS, b=(both, both)))
    assert free.answers == ()


def test_an_archive_is_read_like_the_folder_in_it(tmp_path):
    folder = write(tmp_path / "tasks", a=WORDS, b=FREE)
    archive = pack(tmp_path / "tasks", tmp_path / "tasks.tar.any")
    assert read_tasks(archive) == read_tasks(folder)


@pytest.mark.parametrize("packed", [False, True])
def test_of_several_sequences_one_must_be_named(tmp_path, packed):
    write(tmp_path / "all" / "first", a=WORDS, b=FREE)
    write(tmp_path / "all" / "second", c=WORDS, d=WORDS)
    root = str(tmp_path / "all")
    if packed:
        root = pack(root, tmp_path / "all.txz")
    with pytest.raises(data.DataError, match=r"first \(2 tasks\), .*second \(2 tasks"):
        read_tasks(root)
    assert [task.name for task in read_tasks(f"{root}/second")] == ["c", "d"]


def test_tasks_are_chosen_by_the_beginning_of_their_names(tmp_path):
    folder = write(tmp_path, task1_a=WORDS, task2_b=WORDS, task21_c=WORDS)
    chosen = read_tasks(folder, only=("task1", "task21"))
    assert [task.name for task in chosen] == ["task1_a", "task21_c"]
    left = read_tasks(folder, leave_out=("task2_b",))
    assert [task.name for task in left] == ["task1_a", "task21_c"]
    with pytest.raises(data.DataError, match="several tasks 'task2'"):
        read_tasks(folder, only=("task1", "task2"))
    with pytest.raises(data.DataError, match="no task 'x'"):
        read_tasks(folder, leave_out=("x",))


@pytest.mark.parametrize("half", [0, 1])
def test_a_task_without_one_part_is_split_and_says_so(tmp_path, half):
    parts: list[list[str] | None] = [None, None]
    parts[half] = ["no", "yes"] * 10
    _, task = read_tasks(write(tmp_path, a=WORDS, b=parts))
    assert (len(task.train), len(task.test)) == (16, 4)
    texts = [text for text, _ in task.train + task.test]
    assert sorted(texts) == sorted(f"text {i}" for i in range(20))
    there, missing = ("train", "test") if half == 0 else ("test", "train")
    assert task.note == f"no {missing}.json: 20% of {there}.json are held out"


def test_a_half_that_is_too_short_to_split_is_refused(tmp_path):
    folder = write(tmp_path, a=WORDS, b=(["no", "yes"], None))
    with pytest.raises(data.DataError, match="too short to hold rows out"):
        read_tasks(folder)


@pytest.mark.parametrize(
    "damage",
    [
        '{"Definition": []}',
        '{"Definition": ["Why?"], "Instances": []}',
        '{"Definition": ["Why?"], "Instances": [{"input": 3, "output": "x"}]}',
        '{"Definition": ["Why?"], "Instances": [{"input": "x", "output": []}]}',
        '{"Definition": ["Why?"], "Inst',
        "[]",
    ],
)
def test_a_damaged_task_is_refused_by_name_unless_it_is_left_out(tmp_path, damage):
    folder = write(tmp_path, a=WORDS, b=WORDS, c=WORDS)
    (tmp_path / "b" / "test.json").write_text(damage)
    with pytest.raises(data.DataError, match=r"b/test\.json is not in the form"):
        read_tasks(folder)
    assert len(read_tasks(folder, leave_out=("b",))) == 2


def test_rows_without_an_answer_are_left_out_and_counted(tmp_path):
    _, task = read_tasks(write(tmp_path, a=WORDS, b=(["no", " ", "yes", []], ["no"])))
    assert task.train == (("text 0", 0), ("text 2", 1))
    assert task.note == "2 rows of train.json have no answer"


def test_a_task_of_one_answer_is_refused(tmp_path):
    folder = write(tmp_path, a=WORDS, b=(["x", "x"], ["x"]))
    with pytest.raises(data.DataError, match="has one answer alone, 'x'"):
        read_tasks(folder)


def test_a_task_without_a_question_is_read(tmp_path):
    folder = write(tmp_path, a=WORDS, b=WORDS)
    rows = json.loads(content(["no", "yes"])) | {"Definition": []}
    for part in ("train", "test"):
        (tmp_path / "b" / f"{part}.json").write_text(json.dumps(rows))
    assert read_tasks(folder)[1].question == ""


def test_a_place_without_tasks_is_refused(tmp_path):
    with pytest.raises(data.DataError, match="holds no tasks"):
        read_tasks(str(tmp_path))
    with pytest.raises(data.DataError, match=r"There is no '.*missing'"):
        read_tasks(str(tmp_path / "missing"))
    with pytest.raises(data.DataError, match="at least two"):
        read_tasks(write(tmp_path, a=WORDS))


def test_a_damaged_archive_is_refused(tmp_path):
    write(tmp_path / "tasks", a=WORDS, b=FREE)
    path = tmp_path / "tasks.txz"
    pack(tmp_path / "tasks", path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(data.DataError, match="no tar archive, or a damaged one"):
        read_tasks(str(path))
    path.write_text("no archive at all")
    with pytest.raises(data.DataError, match="no tar archive"):
        read_tasks(str(path))


def test_what_an_archive_names_outside_itself_is_never_read(tmp_path):
    secret = tmp_path / "secret.json"
    secret.write_text(content(["no", "yes"]))
    path = tmp_path / "links.tar"
    with tarfile.open(path, "w") as archive:
        for name in ("a", "b"):
            link = tarfile.TarInfo(f"{name}/train.json")
            link.type, link.linkname = tarfile.SYMTYPE, str(secret)
            archive.addfile(link)
        file = tarfile.TarInfo("readme.txt")
        archive.addfile(file, io.BytesIO())
    with pytest.raises(data.DataError, match="holds no tasks"):
        read_tasks(str(path))


def test_published_orders_skip_what_is_not_there():
    names = ["task002_quoref", "task073_commonsense", "task1572_samsum"]
    assert data.published_orders(names) == [[2, 0, 1], [1, 2, 0]]
    assert data.published_orders(["cb", "mnli", "wic"])[0] == [1, 0, 2]


@pytest.mark.parametrize("names", [["imdb", "bbc"], ["cb", "task002_quoref"]])
def test_tasks_of_no_published_order_are_refused(names):
    with pytest.raises(data.DataError, match="no published order of these tasks"):
        data.published_orders(names)


def test_every_published_order_is_of_the_same_fifteen_tasks():
    for orders in (_published_orders._SUPERNI, _published_orders._LONG):
        assert len(set(orders[0])) == 15
        assert set(orders[0]) == set(orders[1])
