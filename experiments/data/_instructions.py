"""Tasks in the form of Super-NaturalInstructions, from a folder or an archive.

Every task is a folder with ``train.json`` and ``test.json``::

    {"Definition": [question], "Instances": [{"input": text, "output": answer}]}

where an output is one string or a list of right ones; other entries are ignored.

References:
  Wang et al., `Super-NaturalInstructions: Generalization via Declarative Instructions
  on 1600+ NLP Tasks <https://arxiv.org/abs/2204.07705>`_, 2022
"""

import json
import lzma
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from experiments.data._errors import DataError
from experiments.data._task import TEST_SHARE, TextTask, held_out

MOST_ANSWERS = 20  # different ones, of a task that is answered by one of its words
_PARTS = ("train.json", "test.json")
_DEPTH = 3  # folders between the one given and a task
# Damage of an archive, of its compression, or of the disk.
_UNREADABLE = (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError)

_Files = dict[str, bytes]  # of one task, by name
_Sequence = dict[str, _Files]  # tasks by name
_Row = tuple[str, tuple[str, ...]]  # text, right answers


def read_tasks(
    source: str, only: Sequence[str] = (), leave_out: Sequence[str] = ()
) -> tuple[TextTask, ...]:
    """The tasks of one sequence, by name.

    A task with up to ``MOST_ANSWERS`` different answers, and never two of them right at
    once, is answered by one of these words; the answers of any other are free text. Of
    a task that lacks one of its parts, the other is split.

    Args:
      source: A folder, or a tar archive with any compression; behind it the path of a
        sequence inside, or its end, where there are several: ``sapt.txz/SuperNI``.
      only: Names of the tasks to read, or the beginning of a name that no other shares;
        empty: all.
      leave_out: The same for tasks to leave out; they are not looked into.

    Raises:
      DataError: If the source or the choice does not tell which tasks are meant, fewer
        than two are left, or one of them is damaged.
    """
    place, sequence = _chosen_sequence(source)
    names = selected(sorted(sequence), only, leave_out, place)
    if len(names) < 2:
        raise DataError(f"{place} has the tasks {names}; at least two are wanted.")
    return tuple(_task(f"{place}/{name}", name, sequence[name]) for name in names)


def _chosen_sequence(source: str) -> tuple[str, _Sequence]:
    path = Path(source).expanduser()
    root = next((p for p in (path, *path.parents) if p.exists()), path)
    inner = path.relative_to(root).parts
    if (root.is_dir() and inner) or not root.exists():
        raise DataError(
            f"There is no {source!r}: a folder or a tar archive of tasks is wanted."
        )
    found = _from_folder(root) if root.is_dir() else _from_archive(root)
    sequences: dict[PurePosixPath, _Sequence] = {}
    for file, content in found.items():
        tasks = sequences.setdefault(file.parent.parent, {})
        tasks.setdefault(file.parent.name, {})[file.name] = content
    named = PurePosixPath(*inner)
    fit = [s for s in sequences if not inner or s.parts[-len(inner) :] == inner]
    fit = [named] if named in sequences else fit
    if len(fit) == 1:
        return str(root / fit[0]), sequences[fit[0]]
    if not sequences:
        raise DataError(
            f"{root} holds no tasks: folders with train.json and test.json are wanted, "
            f"at most {_DEPTH} folders deep."
        )
    there = ", ".join(f"{root / s} ({len(sequences[s])} tasks)" for s in sequences)
    raise DataError(
        f"{source!r} does not tell which tasks are meant. There are {there}."
    )


def _from_folder(root: Path) -> dict[PurePosixPath, bytes]:
    return {
        PurePosixPath(path.relative_to(root).as_posix()): path.read_bytes()
        for depth in range(1, _DEPTH + 1)
        for path in sorted(root.glob("*/" * depth + "*.json"))
        if path.name in _PARTS
    }


def _from_archive(root: Path) -> dict[PurePosixPath, bytes]:
    """Reads the archive once from its beginning to its end; nothing is unpacked."""
    found = {}
    try:
        with tarfile.open(root) as archive:
            for member in archive:
                path = PurePosixPath(member.name)
                content = archive.extractfile(member) if member.isfile() else None
                if content and path.name in _PARTS and len(path.parts) > 1:
                    found[path] = content.read()
    except _UNREADABLE as error:
        raise DataError(
            f"{root} is no tar archive, or a damaged one "
            f"({type(error).__name__}: {error})."
        ) from error
    return found


def selected(
    names: list[str], only: Sequence[str], leave_out: Sequence[str], place: str
) -> list[str]:
    """Those of the names that are asked for, in their order."""

    def full(given):
        starts = [name for name in names if name.startswith(given)]
        fit = [given] if given in names else starts
        if len(fit) == 1:
            return fit[0]
        what = f"several tasks {given!r}: {fit}" if fit else f"no task {given!r}"
        raise DataError(f"{place} has {what}. Its tasks are {', '.join(names)}.")

    wanted = {full(given) for given in only} or set(names)
    refused = {full(given) for given in leave_out}
    return [name for name in names if name in wanted - refused]


def _task(place: str, name: str, files: _Files) -> TextTask:
    parts, notes = {}, []
    question = ""
    for part, content in files.items():
        question, parts[part], empty = _part(f"{place}/{part}", content)
        notes += [f"{empty} rows of {part} have no answer"] if empty else []
    if len(parts) == 1:
        (there,) = parts
        missing = next(part for part in _PARTS if part != there)
        parts = dict(zip(_PARTS, held_out(parts[there]), strict=True))
        notes.append(f"no {missing}: {TEST_SHARE:.0%} of {there} are held out")
        if not parts["test.json"]:
            raise DataError(
                f"{place} has no {missing}, and {there} is too short to hold rows out. "
                "Leave the task out."
            )
    train, test = (parts[part] for part in _PARTS)
    given = {answers for _, answers in train + test}
    words = tuple(sorted({word for answers in given for word in answers}))
    note = "; ".join(notes)
    if len(words) < 2:
        raise DataError(f"{place} has one answer alone, {words[0]!r}. Leave it out.")
    if len(words) > MOST_ANSWERS or any(len(answers) > 1 for answers in given):
        return TextTask(name, question, (), tuple(train), tuple(test), note)
    index = {word: i for i, word in enumerate(words)}
    train, test = (
        tuple((text, index[answers[0]]) for text, answers in part)
        for part in (train, test)
    )
    return TextTask(name, question, words, train, test, note)


def _part(place: str, content: bytes) -> tuple[str, list[_Row], int]:
    """The question, the rows and how many without an answer were left out."""
    try:
        read = json.loads(content)
        definition = read["Definition"]
        question = (
            definition if isinstance(definition, str) else "".join(definition[:1])
        )
        every = [(row["input"], _answers(row["output"])) for row in read["Instances"]]
        rows = [(text, answers) for text, answers in every if answers]
        if not rows or not all(isinstance(text, str) for text, _ in rows):
            raise ValueError("no instances with an answer, or an input that is no text")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise DataError(
            f"{place} is not in the form of Super-NaturalInstructions "
            f"({type(error).__name__}: {error}). Leave the task out, or repair it."
        ) from error
    return question.strip(), rows, len(every) - len(rows)


def _answers(output: str | list[str]) -> tuple[str, ...]:
    """The different answers that have any text."""
    answers = (output,) if isinstance(output, str) else tuple(output)
    stripped = dict.fromkeys(answer.strip() for answer in answers)
    return tuple(answer for answer in stripped if answer)
