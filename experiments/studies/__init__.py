"""The studies: one file each, which reads like the methods section of a paper.

A module of this folder that defines ``STUDY`` is found by the command line::

    @dataclasses.dataclass(frozen=True)
    class Config:
        seeds: int = field(5, quick=2, minimum=1, help="number of seeds")

    def run(config, folder, context) -> dict: ...      # -> results.json
    def report(folder) -> Report: ...                  # tables, figures, claims

    STUDY = Study("my_study", "what it asks", Config, run, report)
"""

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Study(NamedTuple):
    """A study, as the command line sees it.

    All that is random in ``run`` must derive from the config, and what it returns must
    not hold times or paths: a resumed run has to give the very same bytes.
    """

    name: str
    # One line for the list of studies.
    summary: str
    # Frozen dataclass of plain fields, made with `field`; each becomes a flag.
    Config: type
    # (config, folder: Path, context: engine.Context) -> dict of plain values or arrays,
    # written to results.json.
    run: Callable[[Any, Path, Any], dict]
    # (folder: Path) -> report.Report
    report: Callable[[Path], Any]
    # (config) -> None; raises ValueError for what single fields cannot tell (an unknown
    # stream, an unknown arm) before anything is written.
    check: Callable[[Any], None] | None = None


def field(
    default: Any,
    *,
    help: str,
    quick: Any = dataclasses.MISSING,
    minimum: float | None = None,
    maximum: float | None = None,
) -> Any:
    """A field of a study's config, and so a flag.

    Args:
      default: its value; the type annotation may be int, float, str, bool, a Literal or
        a ``tuple[X, ...]`` of these.
      help: one line for ``--help``.
      quick: its value under ``--quick``, if another.
      minimum: least legal value (of each entry, for tuples).
      maximum: greatest legal value.
    """
    metadata = {"help": help, "minimum": minimum, "maximum": maximum}
    if quick is not dataclasses.MISSING:
        metadata["quick"] = quick
    return dataclasses.field(default=default, metadata=metadata)


_REGISTERED: dict[str, Study] = {}


def register(study: Study) -> Study:
    """Adds a study that lives outside this folder."""
    _REGISTERED[study.name] = study
    return study


def names() -> list[str]:
    """The names of all studies."""
    modules = (m.name for m in pkgutil.iter_modules(__path__))
    return sorted({m for m in modules if not m.startswith("_")} | set(_REGISTERED))


def get(name: str) -> Study:
    """The study of that name (its module's name).

    Raises:
      KeyError: if there is none.
    """
    if name in _REGISTERED:
        return _REGISTERED[name]
    if name not in names():
        raise KeyError(name)
    return importlib.import_module(f"{__name__}.{name}").STUDY
