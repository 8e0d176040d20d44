"""What the sweep runs: its settings, cases, lanes and bases."""

import dataclasses
from typing import Any

import numpy as np

from experiments.studies import field

# Routing -> what feeds the first and the second moment. Under "post" the modifier acts
# on Adam's update; "vanilla" is Adam without it.
ROUTINGS = {
    "vanilla": ("raw", "raw"),
    "shared": ("routed", "routed"),
    "decoupled (raw)": ("routed", "raw"),
    "decoupled (max)": ("routed", "max"),
    "denominator only": ("raw", "routed"),
    "post": ("raw", "raw"),
}
EPS_RATIOS = (1e-8, 1e-3, 1e-2, 1e-1, 1.0)  # eps over the root mean square gradient
FEW_STRENGTHS = (0.2, 0.5, 0.8)
SWITCH_RATIOS = (1.0, 4.0)  # q: old second moment over new


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the sweep."""

    seeds: int = field(20, quick=5, minimum=2, help="number of seeds")
    strengths: tuple[float, ...] = field(
        (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
        minimum=0.01,
        maximum=0.99,
        help="strengths a of the law",
    )
    overlaps: tuple[float, ...] = field(
        (0.3, 0.6, 0.9),
        minimum=0.01,
        maximum=0.99,
        help="shares s of the gradient's energy inside the subspace",
    )
    dim: int = field(64, minimum=4, help="number of parameters")
    rank: int = field(8, minimum=1, help="dimension of the protected subspace")
    b2: float = field(0.99, minimum=0.0, maximum=0.9999, help="Adam's b2")
    steps: int = field(1000, quick=600, minimum=2, help="steps per task")
    chunk_steps: int = field(200, minimum=1, help="steps per compiled scan")

    def __post_init__(self):
        """Checks what single fields cannot tell."""
        if self.rank >= self.dim:
            raise ValueError(
                f"--rank {self.rank} must be smaller than --dim {self.dim}: a subspace "
                "that is everything leaves nothing to compare with."
            )
        if self.steps <= self.settled:
            raise ValueError(
                f"--steps {self.steps} is too short for --b2 {self.b2}: the second "
                f"moment takes 5 / (1 - b2) = {self.settled} steps to settle."
            )

    @property
    def settled(self) -> int:
        """Steps after which what the second moment started from has faded."""
        return round(5 / (1 - self.b2))


def cases(config: Config) -> list[dict[str, Any]]:
    """Every lane but for its seed.

    Args:
      config: the settings.

    Returns:
      One dict per case: the ``part`` of the study it belongs to, and its values.
    """
    usual = {
        "aligned": False,  # U spanned by coordinate axes
        "overlap": 0.6,
        "eps": 1e-8,
        "spread": 0.0,  # decades between the coordinates' scales and their middle
        "old_scale": 1.0,  # root of q
        "reset": True,  # start task 1 with fresh moments
    }
    strengths = config.strengths
    law = [
        {"part": "rotated", "strength": a, "overlap": s}
        for s in config.overlaps
        for a in strengths
    ]
    aligned = [{"part": "aligned", "strength": a, "aligned": True} for a in strengths]
    eps = [
        # The root mean square of a protected coordinate is (s dim / rank)^1/2.
        {
            "part": "eps",
            "strength": a,
            "aligned": True,
            "eps": ratio * (usual["overlap"] * config.dim / config.rank) ** 0.5,
            "ratio": ratio,
        }
        for a in FEW_STRENGTHS
        for ratio in EPS_RATIOS
    ]
    switch = [
        {
            "part": "switch",
            "strength": a,
            "aligned": True,
            "old_scale": q**0.5,
            "q": q,
            "reset": False,
        }
        for q in SWITCH_RATIOS
        for a in FEW_STRENGTHS
    ]
    leak = [
        {"part": "leak", "strength": 1.0, "overlap": s, "spread": 0.5}
        for s in config.overlaps
    ]
    return [{**usual, **case} for case in [*law, *aligned, *eps, *switch, *leak]]


def lanes(config: Config) -> dict[str, np.ndarray]:
    """The cases crossed with the seeds, case by case."""
    table, seeds = cases(config), np.arange(config.seeds, dtype=np.int32)
    types = {"aligned": bool, "reset": bool}
    names = ("strength", "aligned", "overlap", "eps", "spread", "old_scale", "reset")
    columns = {
        name: np.repeat(
            np.array([case[name] for case in table], types.get(name, np.float32)),
            len(seeds),
        )
        for name in names
    }
    return {**columns, "seed": np.tile(seeds, len(table))}


def rotated_bases(config: Config) -> np.ndarray:
    """An orthonormal basis for each seed, ``[seeds, dim, rank]``."""
    generators = (np.random.default_rng(seed) for seed in range(config.seeds))
    shape = (config.dim, config.rank)
    bases = [np.linalg.qr(g.normal(size=shape))[0] for g in generators]
    return np.stack(bases).astype(np.float32)
