"""What one text task is."""

from typing import NamedTuple, TypeVar

import numpy as np

TEST_SHARE = 0.2  # where a source comes without a test part
_Row = TypeVar("_Row")


class TextTask(NamedTuple):
    """One task: texts, a question about them, and what answers it.

    Attributes:
      name: What it is called.
      question: The question; may be empty.
      answers: The words that answer it; empty if answers are free text.
      train: Each text with the index of its answer, or with all its right answers as
        strings if they are free.
      test: Likewise.
      note: What a reader of its figures should know.
    """

    name: str
    question: str
    answers: tuple[str, ...]
    train: tuple[tuple[str, int | tuple[str, ...]], ...]
    test: tuple[tuple[str, int | tuple[str, ...]], ...]
    note: str = ""


def held_out(rows: list[_Row]) -> tuple[list[_Row], list[_Row]]:
    """A fixed split into training and test part, for sources without the latter."""
    order = np.random.default_rng(0).permutation(len(rows))
    cut = len(rows) - int(len(rows) * TEST_SHARE)
    shuffled = [rows[i] for i in order]
    return shuffled[:cut], shuffled[cut:]
