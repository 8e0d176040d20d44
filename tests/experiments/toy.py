"""A toy study for the tests of the engine: noisy sequential regression on lines.

Run as a script it is the real command line with this study registered.
"""

import dataclasses
import os
import sys
import time
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments import cli, engine, run_folder, studies
from experiments.claims import Claim
from experiments.engine import Program
from experiments.studies import field

TASKS, SIZE = 3, 8


@dataclasses.dataclass(frozen=True)
class Config:
    """The toy's settings."""

    seeds: int = field(3, quick=2, minimum=1, help="number of seeds")
    steps: int = field(40, quick=12, minimum=1, help="steps per task")
    chunk_steps: int = field(7, quick=5, minimum=1, help="steps per chunk")
    rate: float = field(0.05, minimum=0.0, help="learning rate (not in %)")
    arms: tuple[str, ...] = field(("plain", "slow"), help="arms to run")
    kind: Literal["map", "vmap"] = field("map", help="how lanes run")
    noisy: bool = field(True, help="add noise to the gradients")
    stream: str = field("lines", help="stream of tasks")

    def __post_init__(self):
        """Checks the arms."""
        for arm in self.arms:
            if arm not in ("plain", "slow"):
                raise ValueError(f"unknown arm {arm!r}; there are: plain, slow")


def check(config):
    """Refuses an unknown stream."""
    if config.stream != "lines":
        raise ValueError(f"unknown stream {config.stream!r}; there are: lines")


def program(name, steps, noisy=True):
    """Momentum on a least-squares problem per task, with noise of lane, task, step."""

    def init(data, lane):
        key = jax.random.fold_in(jax.random.key(0), lane["seed"])
        return {"w": jax.random.normal(key, (SIZE,)), "m": jnp.zeros(SIZE), "key": key}

    def step(data, lane, carry, task, index):
        key = jax.random.fold_in(jax.random.fold_in(carry["key"], task), index)
        grad = carry["w"] - data["targets"][task]
        if noisy:
            grad = grad + jax.random.normal(key, (SIZE,))
        m = 0.9 * carry["m"] + grad
        w = carry["w"] - lane["rate"] * m
        loss = jnp.mean((w - data["targets"][task]) ** 2)
        return {**carry, "w": w, "m": m}, {"loss": loss, "index": index}

    def boundary(data, lane, carry, task):
        return {**carry, "m": jnp.zeros(SIZE)}, {"norm": jnp.linalg.norm(carry["m"])}

    def evaluate(data, lane, carry):
        return {"loss": jnp.mean((carry["w"][None] - data["targets"]) ** 2, axis=1)}

    return Program(name, TASKS, steps, init, step, boundary, evaluate)


def inputs(rates, seeds):
    """Data and lanes: every rate with every seed."""
    targets = np.random.default_rng(0).normal(size=(TASKS, SIZE)).astype(np.float32)
    rates, seed = np.meshgrid(np.float32(rates), np.arange(seeds), indexing="ij")
    lanes = {"rate": rates.ravel(), "seed": seed.ravel().astype(np.int32)}
    return {"targets": targets}, lanes


def run(config, folder, context):
    """One program per arm."""
    per_lane = TASKS * config.steps * config.seeds
    context.progress.plan(per_lane * len(config.arms))
    results = {}
    for arm in config.arms:
        rate = config.rate * (1.0 if arm == "plain" else 0.1)
        data, lanes = inputs([rate], config.seeds)
        out = context.run(
            program(arm, config.steps, config.noisy),
            data,
            lanes,
            chunk_steps=config.chunk_steps,
            vectorize=config.kind,
        )
        results[arm] = {"final": out["evaluate/loss"][:, -1].mean()}
    return results


def make_report(folder: Path):
    """A table, a figure and a claim."""
    # A run that is killed comes to no report, and so needs nothing that draws.
    from experiments import figures, report

    results = run_folder.read_json(folder / "results.json")
    rows = [(arm, r["final"], (1.0, 0.1)) for arm, r in results.items()]
    figure, axes = figures.new()
    loss = run_folder.load_program(folder, next(iter(results)))["step/loss"]
    mean, error = figures.mean_and_error(loss.reshape(len(loss), -1))
    figures.lines(
        axes[0, 0], {"loss": (range(len(mean)), mean, error)}, x="step", y="loss"
    )
    claim = Claim("lines are learned", "nobody", "the toy", 1.0, 0.1, "reproduced")
    return report.Report(
        tables=[report.Table("final", "Final loss", ("arm", "loss", "pair"), rows)],
        figures=[report.Figure("loss", "Loss", figure, "The loss <falls>.")],
        claims=[claim],
        summary="A toy.",
    )


STUDY = studies.Study("toy", "a toy for the tests", Config, run, make_report, check)


def slow_down(seconds):
    """Sleeps after each chunk and saves after each, to be killed at any point."""
    advance = engine.Progress.advance

    def advance_slowly(self, *args):
        advance(self, *args)
        time.sleep(seconds)

    engine.Progress.advance = advance_slowly
    engine._CheckpointClock.due = lambda self: True


def slow_down_if_asked():
    """``slow_down`` by what the environment says, so that a process can be told."""
    if "TOY_PAUSE" in os.environ:
        slow_down(float(os.environ["TOY_PAUSE"]))


if __name__ == "__main__":
    slow_down_if_asked()
    studies.register(STUDY)
    sys.exit(cli.main())
