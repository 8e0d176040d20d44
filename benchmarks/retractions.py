"""Retractions side by side, and as the last part of an optimizer step.

Each is timed in turn with ``optax.adamw`` on the same stack of tall factors, so that
the rows can be compared with each other and with a step's budget.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks import timing
from optax_cl.lora import stiefel

DIMENSIONS = (576, 2048)
RANKS = (4, 16, 64)
BATCHES = (1, 30, 60)


class RetractionRow(NamedTuple):
    """One retraction on a stack of ``[batch, d, r]``, float32."""

    method: str
    batch: int
    d: int
    r: int
    memory: int  # columns of the memory basis
    times: timing.Ratio  # against `optax.adamw` on the same leaves


def rows(
    *,
    pairs: int = 10,
    dimensions: tuple[int, ...] = DIMENSIONS,
    ranks: tuple[int, ...] = RANKS,
    batches: tuple[int, ...] = BATCHES,
    memory: int = 0,
) -> list[RetractionRow]:
    """Times a small tangent step with every retraction, over sizes.

    Args:
      pairs: How often each is timed.
      dimensions: Lengths d of the columns.
      ranks: Numbers r of columns.
      batches: How many factors are stacked.
      memory: Columns of a memory basis; 0 for none.

    Returns:
      One row for each size and method.
    """
    return [
        RetractionRow(method, batch, d, r, memory, times)
        for d in dimensions
        for r in ranks
        for batch in batches
        for method, times in _compared(batch, d, r, memory, pairs)
    ]


def _compared(batch, d, r, memory, pairs):
    keys = jax.random.split(jax.random.key(0), 3)
    basis = stiefel.random(keys[0], (d, memory)) if memory else None
    x = stiefel.random(keys[1], (batch, d, r), memory=basis)
    direction = 1e-3 * jax.random.normal(keys[2], x.shape)
    xi = stiefel.tangent_project(x, direction, memory=basis)
    adamw = optax.adamw(1e-3)

    def base(carry, grads):
        params, state = carry
        updates, state = adamw.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    plain = timing.compile_step(base, (jnp.array(x), adamw.init(x)), direction)

    def retract(method):
        if method == "svd":  # the polar map as the papers' code computes it
            return lambda x, xi, memory: stiefel.polar(
                x + xi, method="svd", memory=memory
            )
        return lambda x, xi, memory: stiefel.retract(
            x, xi, method=method, memory=memory
        )

    for method in (*stiefel.RETRACTIONS, "svd"):
        step = timing.compile_step(retract(method), jnp.array(x), xi, basis)
        yield method, timing.compare(step, plain, pairs=pairs)


def main() -> None:
    """Prints the table."""
    print("| retraction | batch | d | r | memory | ms | adamw ms | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for row in [*rows(), *rows(dimensions=(576,), ranks=(16,), memory=64)]:
        times = row.times
        print(
            f"| {row.method} | {row.batch} | {row.d} | {row.r} | {row.memory} | "
            f"{times.seconds * 1e3:.3f} | {times.base_seconds * 1e3:.3f} | "
            f"{times.median:.2f} [{times.low:.2f}, {times.high:.2f}] |"
        )


if __name__ == "__main__":
    main()
