"""Paired timing: two compiled functions in turn, so that a slow moment hits both."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np


class Row(NamedTuple):
    """One line of the table of speed."""

    what: str
    ratio: str
    budget: str
    met: bool | None
    note: str


class Ratio(NamedTuple):
    """A ratio of times, pair by pair."""

    median: float
    low: float  # lower quartile
    high: float  # upper quartile
    seconds: float  # median time of the numerator
    base_seconds: float  # median time of the denominator


class Counts(NamedTuple):
    """What XLA itself says of a compiled function; no clock is involved."""

    gflops: float
    gigabytes: float  # accessed
    temporary: float  # MB, peak temporary memory


class Step(NamedTuple):
    """A compiled step that carries its own state: ``carry = run(carry)``."""

    run: Callable[[Any], Any]
    carry: Any
    counts: Counts


def compile_step(function: Callable[..., Any], carry: Any, *args: Any) -> Step:
    """Compiles ``function(carry, *args) -> carry``, donating the carry."""
    compiled = jax.jit(function, donate_argnums=0).lower(carry, *args).compile()
    return Step(lambda c: compiled(c, *args), carry, counts(compiled))


def counts(compiled: Any) -> Counts:
    """FLOPs, bytes and temporary memory of a compiled function."""
    cost = compiled.cost_analysis() or {}
    memory = compiled.memory_analysis()
    temporary = getattr(memory, "temp_size_in_bytes", 0)
    return Counts(
        cost.get("flops", float("nan")) / 1e9,
        cost.get("bytes accessed", float("nan")) / 1e9,
        temporary / 1e6,
    )


def compare(step: Step, base: Step, *, pairs: int, warmup: int = 3) -> Ratio:
    """Times two steps in turn.

    Args:
      step: The numerator.
      base: The denominator.
      pairs: How often each is timed.
      warmup: Untimed pairs before.

    Returns:
      The ratio's median and quartiles over pairs.
    """
    times: list[list[float]] = [[], []]
    # Copies: a step may be compared more than once, and donates what it is given.
    carries = [jax.tree.map(jax.numpy.copy, s.carry) for s in (step, base)]
    runs = [step.run, base.run]
    for i in range(warmup + pairs):
        # The order alternates, so that neither always follows the other.
        for which in (0, 1) if i % 2 else (1, 0):
            start = time.perf_counter()
            carries[which] = jax.block_until_ready(runs[which](carries[which]))
            if i >= warmup:
                times[which].append(time.perf_counter() - start)
    ratios = np.array(times[0]) / np.array(times[1])
    low, median, high = np.percentile(ratios, [25, 50, 75])
    return Ratio(
        float(median),
        float(low),
        float(high),
        statistics.median(times[0]),
        statistics.median(times[1]),
    )


def bandwidth(megabytes: int = 256, repeats: int = 7) -> float:
    """Memory bandwidth that scaling an array in place reaches, bytes a second."""
    x = jax.numpy.ones(megabytes * 2**20 // 4, jax.numpy.float32)
    # In place: a fresh result would measure the operating system's page faults.
    scale = jax.jit(lambda x: x * 0.5, donate_argnums=0)
    x = jax.block_until_ready(scale(x))
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        x = jax.block_until_ready(scale(x))
        best = min(best, time.perf_counter() - start)
    return 2 * x.nbytes / best
