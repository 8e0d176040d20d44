"""The classic methods side by side, on digits, in three scenarios.

**Question.** Of the methods of the field, each with what it is allowed to keep, which
keep old tasks best, and does what their papers say of each other hold on one bench?

**Setting.** ``_classic_data``: five tasks; all digits under other pixels in each
(``domain``), two digits after two in one head (``class``), the same with the task told
(``task``). A ReLU network 65-64-64-10, 200 Adam steps of 32 images a task.

**Arms.** ``_classic_arms``. Whoever keeps data keeps 40 examples of each past task.
PackNet and progressive columns must be told the task, and have no place in ``class``;
ER-ACE and iCaRL are made for ``class``. ``all data`` draws from all tasks so far.

**Choices.** Every method takes, for each scenario, the learning rate and strength of
the best final accuracy on tuning seeds, which are disjoint from the reporting seeds.

**Controls.** Accuracy right after learning stands beside every final accuracy, for a
strength that stops learning keeps everything. Differences are paired by seed.
"""

import dataclasses
from pathlib import Path
from typing import Literal

from experiments import engine, run_folder
from experiments.studies import Study, field
from experiments.studies import _classic_arms as arms
from experiments.studies import _classic_data as data
from experiments.studies import _classic_program as program
from experiments.studies import _classic_report as reporting
from experiments.studies import _configs as configs

QUICK = ("fine-tuning", "EWC", "GPM", "A-GEM", "replay", "all data")


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the study."""

    scenarios: tuple[Literal["domain", "class", "task"], ...] = field(
        data.SCENARIOS, quick=("domain", "class"), help="which scenarios to run"
    )
    arms: tuple[str, ...] = field((), quick=QUICK, help="names of methods; none: all")
    seeds: int = field(10, quick=3, minimum=2, help="seeds that are reported")
    first_seed: int = field(1000, minimum=0, help="the first of them")
    tuning: int = field(3, quick=2, minimum=1, help="seeds that choose settings")
    first_tuning_seed: int = field(0, minimum=0, help="the first of them")
    rates: tuple[float, ...] = field(
        (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
        quick=(1e-3, 3e-3),
        minimum=1e-9,
        help="learning rates",
    )
    steps: int = field(200, minimum=4, help="steps per task")


def check(config: Config) -> None:
    """Refuses unknown methods, seeds in two roles, and missing images."""
    configs.check_arms(config.arms, list(arms.METHODS))
    configs.check_seeds(config)
    configs.check_distinct(config, "scenarios", "arms", "rates")
    for name in ("scenarios", "rates"):
        if not getattr(config, name):
            raise ValueError(f"`--{name}` must name one at least.")
    if without := sorted(set(config.arms) - set(chosen(config))):
        raise ValueError(
            f"of `--arms` {without} have none of the scenarios "
            f"{list(config.scenarios)}; add one of theirs to `--scenarios`."
        )
    configs.check_digits()


def chosen(config: Config) -> dict[str, tuple[str, ...]]:
    """The methods that are run, each with its scenarios."""
    found = {}
    for name, method in arms.METHODS.items():
        scenarios = tuple(s for s in config.scenarios if s in method.scenarios)
        if scenarios and (not config.arms or name in config.arms):
            found[name] = scenarios
    return found


def run(config: Config, folder: Path, context: engine.Context) -> dict:
    """Runs every method; returns the numbers of ``results.json``."""
    tuning, reported = configs.seeds(config)
    everything = data.make_data(tuning + reported)
    index = {seed: i for i, seed in enumerate(tuning + reported)}
    methods = chosen(config)
    tried = {n: reporting.settings(n, s, config.rates) for n, s in methods.items()}
    number = sum(
        len(tried[n]) * len(tuning) + len(scenarios) * len(reported)
        for n, scenarios in methods.items()
    )
    context.progress.plan(number * data.TASKS * config.steps)

    def play(method, name, settings, own):
        return context.run(
            program.make_program(arms.METHODS[method], name, config.steps),
            everything,
            arms.make_lanes(settings, {seed: index[seed] for seed in own}),
            chunk_steps=config.steps,
        )

    for name, scenarios in methods.items():
        found = play(name, f"{name}, tuning", tried[name], tuning)
        best = reporting.best(found["evaluate/accuracy"], tried[name], scenarios)
        play(name, name, best, reported)
    return reporting.summarize(reporting.load(folder, config, methods))


def report(folder: Path):
    """Tables, figures and claims of a finished run."""
    config = run_folder.read_config(folder, Config)
    return reporting.report(reporting.load(folder, config, chosen(config)), config)


STUDY = Study(
    "classic_digits",
    "the classic methods side by side, three scenarios (minutes)",
    Config,
    run,
    report,
    check,
)
