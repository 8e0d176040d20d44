"""The claims table: what somebody says, what was run, what came out."""

import html
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

Verdict = Literal["reproduced", "not reproduced", "not testable here"]
COLUMNS = ("claim", "source", "what was run", "measured", "verdict", "note")


class Claim(NamedTuple):
    """One row of a claims table; a control that could explain a gain is a row too."""

    claim: str
    source: str
    ran: str
    # Mean over seeds, or words where one number does not say it, or None.
    measured: float | str | None
    # Standard error of the mean over seeds, or None.
    se: float | None
    verdict: Verdict
    note: str = ""


def format_number(value: float, se: float | None = None) -> str:
    """A number with the digits its standard error supports, or four.

    Example:
      >>> format_number(1.23456), format_number(1.23456, 0.0213), format_number(2e7)
      ('1.235', '1.235 ± 0.021', '2e+07')
    """
    if not math.isfinite(value):
        return str(value)
    if se is None or not math.isfinite(se):
        return f"{value:.4g}"
    if se == 0:
        return f"{value:.4g} ± 0"
    # Two significant digits of the error, however large or small.
    digits = 1 - math.floor(math.log10(abs(se)))
    if -1 <= digits <= 6:
        digits = max(digits, 0)
        return f"{value:.{digits}f} ± {se:.{digits}f}"
    return f"{value:.4g} ± {se:.2g}"


def check(claims: Sequence[Claim]) -> None:
    """Refuses a row that says nothing.

    Raises:
      ValueError: for an unknown verdict, or a verdict without a measurement.
    """
    for claim in claims:
        if claim.verdict not in get_args(Verdict):
            raise ValueError(
                f"the claim {claim.claim!r} has the verdict {claim.verdict!r}; "
                f"expected one of {get_args(Verdict)}."
            )
        if claim.measured is None and claim.verdict != "not testable here":
            raise ValueError(
                f"the claim {claim.claim!r} is {claim.verdict!r} without a measurement."
            )


def rows(claims: Sequence[Claim]) -> list[tuple[str, ...]]:
    """The table's cells as text, in the order of ``COLUMNS``."""
    check(claims)
    table: list[tuple[str, ...]] = []
    for claim in claims:
        measured = claim.measured
        if measured is None:
            measured = "-"
        elif not isinstance(measured, str):
            measured = format_number(measured, claim.se)
        table.append(
            (claim.claim, claim.source, claim.ran, measured, claim.verdict, claim.note)
        )
    return table


def to_markdown(claims: Sequence[Claim]) -> str:
    """The claims table as Markdown."""
    from experiments.report import markdown_table

    return markdown_table(COLUMNS, rows(claims))


def to_html(claims: Sequence[Claim]) -> str:
    """The claims table as HTML; each row carries its verdict as a class."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in COLUMNS)
    body = []
    for row in rows(claims):
        verdict = row[4].replace(" ", "-")
        cells = [f"<td>{html.escape(cell)}</td>" for cell in row]
        cells[4] = f'<td class="verdict {verdict}">{html.escape(row[4])}</td>'
        body.append(f"<tr>{''.join(cells)}</tr>")
    return (
        '<table class="claims"><thead><tr>'
        f"{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    )
