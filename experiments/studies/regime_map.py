"""Which routing and which strength wins where.

Two benchmarks, each with several regimes. **Part A**, sequential linear regression with
knobs for the overlap of tasks and for the agreement of their targets, at several task
lengths and ranks of the protected subspace. **Part B**, four streams of digits.

An arm is a routing (what the modified gradient reaches), a rule and its number; see
``_regime_arms``. Every arm runs in every regime at every learning rate on every seed.
The *matched* results give each arm, plain Adam included, its own learning rate for each
regime: the best on the tuning seeds, which are disjoint from the reporting seeds that
all numbers come from. The *fixed* results use one learning rate for all.

An arm's number is its mean final loss (A) or error rate (B) over plain Adam's. With it
stands the loss right after learning each task, since who learns less forgets less. The
*oracle constant* is a bar and no method: the best fixed strength and placement (and in
the matched results learning rate) of each regime, chosen on the reporting seeds.
"""

import dataclasses
from pathlib import Path
from typing import Literal

from experiments import engine
from experiments.studies import Study, field
from experiments.studies import _configs as configs
from experiments.studies import _regime_arms as arms
from experiments.studies import _regime_digits as digits
from experiments.studies import _regime_program as program
from experiments.studies import _regime_regression as regression
from experiments.studies import _regime_report as reporting
from experiments.studies import _regime_results as results


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the map."""

    parts: tuple[Literal["regression", "digits"], ...] = field(
        ("regression", "digits"), help="which benchmarks to run"
    )
    seeds: int = field(12, quick=3, minimum=2, help="seeds that are reported")
    first_seed: int = field(1000, minimum=0, help="the first of them")
    tuning: int = field(5, quick=2, minimum=1, help="seeds that choose learning rates")
    first_tuning_seed: int = field(0, minimum=0, help="the first of them")
    steps: tuple[int, ...] = field(
        (500, 2500), minimum=1, help="regression: steps per task, one map each"
    )
    ranks: tuple[int, ...] = field(
        (8, 32), minimum=1, maximum=40, help="regression: ranks, one map each"
    )
    rates: tuple[float, ...] = field(
        (4e-5, 1e-4, 4e-4, 1.5e-3, 4e-3, 1e-2),
        quick=(1e-4, 4e-4, 1.5e-3, 4e-3, 1e-2),
        minimum=1e-9,
        help="regression: learning rates",
    )
    fixed_rate: float = field(4e-3, help="regression: the one of the fixed results")
    digit_steps: int = field(200, minimum=1, help="digits: steps per task")
    digit_ranks: tuple[int, ...] = field(
        (12, 4, 32), quick=(12,), minimum=1, maximum=32, help="digits: ranks"
    )
    digit_rates: tuple[float, ...] = field(
        (1e-3, 3e-3, 8e-3), minimum=1e-9, help="digits: learning rates"
    )
    digit_fixed_rate: float = field(3e-3, help="digits: the one of the fixed results")
    side_arms: Literal["core", "all"] = field(
        "all", quick="core", help="arms at other than the first length and rank"
    )
    collect_batches: int = field(32, minimum=1, help="batches for curvature")
    chunk_steps: int = field(250, minimum=1, help="steps between checkpoints, at most")


def check(config: Config) -> None:
    """Refuses seeds in two roles, a fixed rate that is not run, and missing images."""
    configs.check_seeds(config)
    for name, rate, rates in (
        ("fixed_rate", config.fixed_rate, config.rates),
        ("digit_fixed_rate", config.digit_fixed_rate, config.digit_rates),
    ):
        if rate not in rates:
            flag = name.replace("_", "-")
            raise ValueError(f"`--{flag}` must be one of {rates}; got {rate}.")
    configs.check_distinct(
        config, "parts", "steps", "ranks", "rates", "digit_ranks", "digit_rates"
    )
    if "digits" in config.parts:
        configs.check_digits("the part `digits`")


def run(config: Config, folder: Path, context: engine.Context) -> dict:
    """Runs every map; returns the numbers of ``results.json``."""
    tuning, reported = configs.seeds(config)
    maps = results.maps(config)
    count = len(tuning) + len(reported)
    context.progress.plan(sum(len(m.arms) * count * m.tasks * m.steps for m in maps))
    made = {}
    for one in maps:
        bench = regression if one.part == "regression" else digits
        if one.part not in made:
            made = {one.part: bench.make_data(tuning + reported)}
        settings = program.Settings(
            rates=one.rates,
            steps=one.steps,
            rank=one.rank,
            collect_batches=config.collect_batches,
        )
        for routing, members in results.by_routing(one).items():
            context.run(
                program.make_program(
                    f"{one.name}-{routing}", bench.BENCHMARK, routing, settings
                ),
                made[one.part],
                program.make_lanes([arms.ARMS[n] for n in members], tuning + reported),
                chunk_steps=min(config.chunk_steps, one.steps),
            )
    return reporting.summarize(folder, config)


def report(folder: Path):
    """Maps, tables and claims of a finished run."""
    return reporting.report(folder, Config)


STUDY = Study(
    name="regime_map",
    summary="which routing and strength wins where, as heat maps (minutes)",
    Config=Config,
    run=run,
    report=report,
    check=check,
)
