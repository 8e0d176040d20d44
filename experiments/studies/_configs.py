"""What the configs of several studies have in common, and what is refused in each.

Seeds have one of two roles: those from ``first_tuning_seed`` on, ``tuning`` of them,
choose settings; those from ``first_seed`` on, ``seeds`` of them, are reported.
"""

import importlib.util
from collections.abc import Iterable, Sequence
from typing import Any

from experiments.flags import nearest


def seeds(config: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tuning and the reporting seeds."""
    tuning = range(config.first_tuning_seed, config.first_tuning_seed + config.tuning)
    reported = range(config.first_seed, config.first_seed + config.seeds)
    return tuple(tuning), tuple(reported)


def check_seeds(config: Any) -> None:
    """Refuses seeds in both roles."""
    if both := sorted(set.intersection(*map(set, seeds(config)))):
        raise ValueError(
            f"the seeds {both} would choose settings and be reported; move "
            "`--first-seed` or `--first-tuning-seed`."
        )


def check_arms(names: Iterable[str], known: Sequence[str]) -> None:
    """Refuses arms that the study doesn't have."""
    for name in names:
        if name not in known:
            raise ValueError(f"`--arms` knows no {name!r}{nearest(name, known)}")


def check_distinct(config: Any, *fields: str) -> None:
    """Refuses a value that a field names twice: its results would count twice."""
    for name in fields:
        values = getattr(config, name)
        if len(set(values)) < len(values):
            flag = name.replace("_", "-")
            raise ValueError(f"`--{flag}` names a value twice: {values}.")


def check_digits(what: str = "the study") -> None:
    """Refuses to go on without scikit-learn, which brings the images."""
    if importlib.util.find_spec("sklearn") is None:
        raise ValueError(
            f"{what} takes its images from scikit-learn, which is not installed: "
            "`pip install scikit-learn`."
        )
