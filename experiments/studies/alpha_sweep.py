"""How much Adam gives back of what an attenuation takes away.

A modifier scales the part of the gradient inside a protected subspace U down to 1 - a
of itself, g~ = g - a U U^T g. If both moments of Adam read g~ (*shared* routing), the
denominator shrinks with it, and the gain of the protected directions grows by

    R = mean_k (u_k^T D_shared^-1 u_k) / (u_k^T D_raw^-1 u_k),   D = sqrt(nu_hat) + eps,

against an Adam whose second moment reads the raw gradient. This study measures R with
gradients drawn from a known law, and holds it against four formulas:

- the **naive law** R = 1 / (1 - a), exact if U is spanned by coordinate axes;
- the **refined law** R = [1 - a (2 - a) s]^(-1/2) for a rotated U. Adam's denominator
  is per coordinate; if the share s of the gradient's energy that lies in U is spread
  evenly, the mean square of each coordinate shrinks by (1 - s) + s (1 - a)^2;
- **eps**: R = (v^1/2 + eps) / ((1 - a) v^1/2 + eps), between 1 / (1 - a) and 1;
- the **transient** after a task switch that keeps Adam's state, t steps on, with q the
  old raw second moment over the new one:
  R(t)^2 = [b2^t q + 1 - b2^t] / [b2^t q + (1 - b2^t) (1 - a)^2].

Gradients do not depend on the parameters, so every routing sees the same ones. Task 0
runs without the modifier, task 1 with it. A lane is one strength, one kind of basis,
one overlap, one eps and one seed, and runs all routings side by side.
"""

from pathlib import Path
from typing import Any

import numpy as np

from experiments import figures
from experiments.studies import Study
from experiments.studies._sweep_cases import (
    ROUTINGS,
    Config,
    cases,
    lanes,
    rotated_bases,
)
from experiments.studies._sweep_program import program
from experiments.studies._sweep_report import make_report


def run(config: Config, folder: Path, context: Any) -> dict[str, Any]:
    """Runs the sweep and reads it, case by case.

    Args:
      config: the settings.
      folder: the run folder.
      context: the engine's context.

    Returns:
      For each case its values, and what was measured as ``[mean, standard error]``.
    """
    del folder
    raw = context.run(
        program(config),
        rotated_bases(config),
        lanes(config),
        chunk_steps=config.chunk_steps,
        vectorize="vmap",
    )
    table = cases(config)

    def measured(values):
        """``[lanes, ...]`` -> per case ``[mean, standard error]`` over its seeds."""
        values = values.reshape(len(table), config.seeds, *values.shape[1:])
        return [np.stack(figures.mean_and_error(v)) for v in values]

    gain = raw["step/gain"][:, 1]
    settled = measured(gain[:, config.settled :].astype(np.float64).mean(1))
    overlap = measured(raw["boundary/overlap"][:, 1])
    # Relative to vanilla, lane by lane: both see the same gradients.
    moved = raw["boundary/moved"][:, 1].astype(np.float64)
    moved = measured(moved / moved[:, :1])
    leak = measured(raw["boundary/leak"][:, 1])
    times = np.unique(np.geomspace(1, config.steps, 300).round().astype(int))
    transient = measured(gain[:, times - 1])
    results = []
    for i, case in enumerate(table):
        entry = {**case, "gain": settled[i], "measured_overlap": overlap[i]}
        if case["part"] in ("aligned", "leak"):
            entry |= {"moved": moved[i], "leak": leak[i]}
        if case["part"] == "switch":
            entry |= {"times": times, "transient": transient[i]}
        results.append(entry)
    return {"cases": results, "routings": list(ROUTINGS)}


STUDY = Study(
    name="alpha_sweep",
    summary="how much Adam gives back of an attenuation, against closed formulas "
    "(seconds)",
    Config=Config,
    run=run,
    report=make_report,
)
