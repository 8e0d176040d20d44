"""What the pages say of a study stands in the tables that its command printed.

A quoted ``mean ± standard error`` is looked up, rounded as it is quoted and whatever
its sign, since a difference may be told the other way round. A page of a study may
quote its own tables only; other pages quote any study's.
"""

import pathlib
import re
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).parent.parent
STUDIES = sorted((ROOT / "docs/studies").glob("*.md"))
# Of `experiments.md`: a trial on a user's own archive, which no study's page holds.
OTHERS = [
    ROOT / "README.md",
    *(p for p in sorted((ROOT / "docs").glob("*.md")) if p.name != "experiments.md"),
]

QUOTE = re.compile(
    r"(?<![\w.])([+-]?\d*\.?\d+)\s*±\s*(\d*\.?\d+(?:e-?\d+)?)(?P<percent>\s*%)?"
)
CODE = re.compile(r"^```.*?^```$|^    [^\n]*$", re.MULTILINE | re.DOTALL)


class Quote(NamedTuple):
    """A mean with its standard error, and the last digit that is written of each."""

    mean: float
    error: float
    mean_digit: float
    error_digit: float


def quotes(text: str) -> list[Quote]:
    """All means with standard errors in a text."""
    found = []
    for match in QUOTE.finditer(text):
        scale = 0.01 if match["percent"] else 1.0
        numbers = match.group(1, 2)
        values = (scale * float(number) for number in numbers)
        digits = (scale * _last_digit(number) for number in numbers)
        found.append(Quote(*values, *digits))
    return found


def _last_digit(number):
    mantissa, _, exponent = number.partition("e")
    return 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))


def unfounded(quoted: list[Quote], printed: list[Quote]) -> list[Quote]:
    """Quotes that round from nothing that was printed."""

    def rounds(q, p):
        return (
            abs(abs(q.mean) - abs(p.mean)) <= 0.501 * q.mean_digit
            and abs(q.error - p.error) <= 0.501 * q.error_digit
        )

    return [q for q in quoted if not any(rounds(q, p) for p in printed)]


def split(page: pathlib.Path) -> tuple[str, str]:
    """A page's tables, and the rest of it without code and output."""
    lines = CODE.sub("", page.read_text()).splitlines()
    tables = [line for line in lines if line.startswith("|")]
    return "\n".join(tables), "\n".join(ln for ln in lines if not ln.startswith("|"))


@pytest.mark.parametrize("page", STUDIES, ids=lambda page: page.name)
def test_a_study_quotes_its_own_tables(page):
    tables, prose = split(page)
    assert unfounded(quotes(prose), quotes(tables)) == []


@pytest.mark.parametrize("page", OTHERS, ids=lambda page: page.name)
def test_other_pages_quote_what_a_study_printed(page):
    printed = [q for study in STUDIES for q in quotes(split(study)[0])]
    assert unfounded(quotes("\n".join(split(page))), printed) == []


def test_a_quote_may_round_and_turn_and_no_more():
    printed = quotes("| LoRA | 0.4688 ± 0.0048 | -0.0174 ± 2.6e-09 |")
    assert unfounded(quotes(".469 ± .005, +.0174 ± 0 and 47 ± 0 %"), printed) == []
    assert len(unfounded(quotes(".468 ± .005; .469 ± .006"), printed)) == 2
