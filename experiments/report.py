"""Reports: tables as Markdown, figures as files, and one page that holds all of it."""

import html
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure as MatplotlibFigure

from experiments import claims as claims_table
from experiments import figures as drawing
from experiments import run_folder


class Table(NamedTuple):
    """A table of a report; cells that are numbers are formatted and set flush right."""

    name: str  # file name, without suffix
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""


class Figure(NamedTuple):
    """A figure of a report."""

    name: str  # file name, without suffix
    title: str
    figure: MatplotlibFigure
    caption: str = ""


class Report(NamedTuple):
    """What a study makes of a finished run."""

    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    claims: Sequence[claims_table.Claim] = ()
    # What was asked and what came out, as paragraphs of plain text.
    summary: str = ""


def cell_text(cell: Any) -> str:
    """A cell as text; a pair ``(mean, standard error)`` becomes ``mean ± error``."""
    if cell is None:
        return "-"
    if isinstance(cell, tuple) and len(cell) == 2:
        return claims_table.format_number(float(cell[0]), float(cell[1]))
    if isinstance(cell, bool | int | str):
        return str(cell)
    try:
        return claims_table.format_number(float(cell))
    except (TypeError, ValueError):
        return str(cell)


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table in Markdown; pipes and line ends in cells are made harmless."""

    def line(cells: Iterable[Any]) -> str:
        texts = (cell_text(c).replace("|", "\\|").replace("\n", " ") for c in cells)
        return "| " + " | ".join(texts) + " |\n"

    rows = [tuple(row) for row in rows]
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(
                f"a row has {len(row)} cells where the table has {len(columns)} "
                f"columns ({', '.join(columns)}): {row}."
            )
    rule = "|" + "|".join(" --- " for _ in columns) + "|\n"
    return line(columns) + rule + "".join(line(row) for row in rows)


def write(folder: Path, report: Report) -> Path:
    """Writes tables, figures, claims and the page into a run folder.

    Args:
      folder: the run folder.
      report: what to write.

    Returns:
      The path of ``report.html``.
    """
    folder = Path(folder)
    for name, text in _markdown_tables(report).items():
        run_folder.write_atomic(folder / "tables" / f"{name}.md", text)
    pictures = {}
    for figure in report.figures:
        svg = drawing.to_svg(figure.figure)
        pictures[figure.name] = svg.decode()
        path = folder / "figures" / figure.name
        run_folder.write_atomic(path.with_name(f"{figure.name}.svg"), svg)
        png = drawing.to_png(figure.figure)
        run_folder.write_atomic(path.with_name(f"{figure.name}.png"), png)
    config = run_folder.read_record(folder)
    page = folder / "report.html"
    run_folder.write_atomic(page, to_html(report, pictures, config))
    return page


def _markdown_tables(report: Report) -> dict[str, str]:
    texts = {}
    for table in report.tables:
        text = f"# {table.title}\n\n{markdown_table(table.columns, table.rows)}"
        texts[table.name] = text + (f"\n{table.note}\n" if table.note else "")
    if report.claims:
        texts["claims"] = f"# Claims\n\n{claims_table.to_markdown(report.claims)}"
    return texts


def to_markdown(report: Report) -> str:
    """The summary and all tables, for a terminal."""
    parts = [report.summary, *_markdown_tables(report).values()]
    return "\n".join(part for part in parts if part)


def to_html(report: Report, pictures: dict[str, str], config: dict[str, Any]) -> str:
    """The whole report as one page that needs nothing else.

    Args:
      report: what to show.
      pictures: name of each figure -> its SVG.
      config: the content of ``config.json``.

    Returns:
      The page.
    """
    study = html.escape(str(config.get("study", "")))
    parts = [f"<h1>{study}</h1>"]
    parts += [
        f"<p>{html.escape(paragraph)}</p>"
        for paragraph in report.summary.split("\n\n")
        if paragraph.strip()
    ]
    if report.claims:
        parts.append("<h2>Claims</h2>")
        parts.append(f'<div class="wide">{claims_table.to_html(report.claims)}</div>')
    if report.figures:
        parts.append("<h2>Figures</h2>")
    for figure in report.figures:
        parts.append(
            f"<figure>{_inline_svg(pictures[figure.name], figure.name, figure.title)}"
            f"<figcaption><b>{html.escape(figure.title)}.</b> "
            f"{html.escape(figure.caption)}</figcaption></figure>"
        )
    if report.tables:
        parts.append("<h2>Tables</h2>")
    for table in report.tables:
        parts.append(f"<h3>{html.escape(table.title)}</h3>")
        parts.append(f'<div class="wide">{_html_table(table)}</div>')
        if table.note:
            parts.append(f"<p>{html.escape(table.note)}</p>")
    parts.append("<h2>How it was run</h2>")
    parts.append(f'<div class="wide">{_html_settings(config)}</div>')
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{study}</title><style>{_CSS}</style></head><body><main>\n"
        + "\n".join(parts)
        + "\n</main></body></html>\n"
    )


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(str(c))}</th>" for c in table.columns)
    body = ""
    for row in table.rows:
        cells = ""
        for cell in row:
            kind = "" if isinstance(cell, str) or cell is None else ' class="number"'
            cells += f"<td{kind}>{html.escape(cell_text(cell))}</td>"
        body += f"<tr>{cells}</tr>"
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _html_settings(config: dict[str, Any]) -> str:
    settings = {
        **config.get("config", {}),
        "devices": f"{config.get('device_count')} x {config.get('device_kind')}",
        **config.get("versions", {}),
        "config hash": config.get("config_hash"),
    }
    rows = [(k, _setting_text(v)) for k, v in settings.items()]
    return _html_table(Table("config", "", ("setting", "value"), rows))


def _setting_text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _inline_svg(svg: str, name: str, title: str) -> str:
    """An SVG fit to stand inside a page: no prolog, ids of its own, a name to read."""
    svg = svg[svg.index("<svg") :]
    # Metadata names schemas by URL; nothing would fetch them, but nothing needs them.
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Matplotlib numbers its ids anew in each figure; on one page they would collide.
    prefix = re.sub(r"\W", "-", name)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(xlink:href="|url\()#', rf"\g<1>#{prefix}-", svg)
    label = html.escape(title, quote=True)
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


_CSS = """
:root { color-scheme: light dark; --ink: #1d1d1f; --paper: #ffffff; --soft: #6b6b70;
  --line: #dcdce0; --band: #f5f5f7; --good: #00694c; --bad: #a33f00; }
@media (prefers-color-scheme: dark) { :root { --ink: #ececef; --paper: #17171a;
  --soft: #a2a2a8; --line: #3a3a40; --band: #212126;
  --good: #4fd0a5; --bad: #ff9a5c; } }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; margin: 0 0 1rem; } h2 { margin: 2.5rem 0 .75rem; }
h3 { margin: 1.75rem 0 .5rem; font-size: 1.05rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .7rem; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; border-bottom-width: 2px; }
tbody tr:nth-child(even) { background: var(--band); }
td.number { text-align: right; white-space: nowrap; }
table.claims td { min-width: 5.5rem; }
table.claims td:first-child { min-width: 10rem; }
table.claims td:nth-child(4) { min-width: 8.5rem; }
table.claims td:last-child { min-width: 12rem; }
td.verdict { font-weight: 600; white-space: nowrap; }
td.reproduced { color: var(--good); } td.not-reproduced { color: var(--bad); }
td.not-testable-here { color: var(--soft); }
figure { margin: 1.5rem 0; }
figure svg { max-width: 100%; height: auto; background: #ffffff; border-radius: 6px; }
figcaption { color: var(--soft); font-size: .9rem; margin-top: .4rem; }
""".strip()
