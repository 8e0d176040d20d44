"""The four formulas, and how far what was measured lies from them."""

from typing import Any

import numpy as np


def naive_law(a: Any) -> Any:
    """R of an axis-aligned subspace."""
    return 1 / (1 - np.asarray(a))


def refined_law(a: Any, s: Any) -> Any:
    """R of a rotated subspace that holds the share s of the energy."""
    a = np.asarray(a)
    return (1 - a * (2 - a) * np.asarray(s)) ** -0.5


def eps_law(a: Any, ratio: Any) -> Any:
    """R with eps, as a multiple of the root mean square gradient."""
    return (1 + np.asarray(ratio)) / (1 - np.asarray(a) + ratio)


def switch_law(a: float, q: float, b2: float, t: np.ndarray) -> np.ndarray:
    """R, t steps after a switch that keeps the second moment."""
    old = b2**t
    return np.sqrt((old * q + 1 - old) / (old * q + (1 - old) * (1 - a) ** 2))


def law_of(case: dict) -> float:
    """The naive law where it is exact, else the refined one at the measured s."""
    if case["part"] == "aligned":
        return float(naive_law(case["strength"]))
    return float(refined_law(case["strength"], case["measured_overlap"][0]))


def error(case: dict, law: float) -> tuple[float, float]:
    """Relative error of a law, and its standard error."""
    mean, se = case["gain"]
    return law / mean - 1, law * se / mean**2


def worst(errors: list[tuple[float, float]]) -> tuple[float, float]:
    """The largest error, without its sign, and its standard error."""
    mean, se = max(errors, key=lambda e: abs(e[0]))
    return abs(mean), se


def eps_of(case: dict) -> float:
    """The eps law at the strength and ratio of a case."""
    return float(eps_law(case["strength"], case["ratio"]))


def switch_curve(case: dict, b2: float) -> tuple[np.ndarray, ...]:
    """Times, mean and standard error of R after a switch, and its formula."""
    times = np.array(case["times"])
    mean, se = (np.array(x) for x in case["transient"])
    return times, mean, se, switch_law(case["strength"], case["q"], b2, times)
