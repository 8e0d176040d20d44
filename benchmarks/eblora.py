"""EBLoRA's optimizer step alone, on the factors of a small language model.

60 factors of 576 x 16 in float32, as 30 adapted kernels or as one stack of 30: the step
against ``optax.adamw`` on the same arrays, without a memory and with one of several
widths; and against the Riemannian Adam of geoopt, where it is installed.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_cl
from benchmarks import timing
from benchmarks.timing import Row
from optax_cl import lora

LAYERS, WIDTH, RANK = 30, 576, 16
BUDGET = 6.0  # without a memory
FASTER = 20.0  # than geoopt
# By geoopt's manifold; geoopt 0.5.1 with torch 2.15 on two quiet cores, for where it is
# not installed. Its default retraction is a QR decomposition.
GEOOPT_MS = {"EuclideanStiefel": 10.0, "CanonicalStiefel": 113.0}


def rows(pairs: int) -> list[Row]:
    """Rows over both layouts and several memories.

    Args:
      pairs: How often each step is timed, in turn with ``optax.adamw``.

    Returns:
      The rows, in the form of the speed table.
    """
    found = []
    best = float("inf")
    for stacked in (False, True):
        targets, adapters = _adapters(stacked)
        layout = "one stack" if stacked else "60 leaves"
        base = _step(optax.adamw(1e-4), adapters)
        for width in (0, 64, 256):
            tx = lora.eblora(
                optax.adamw(1e-4),
                optax.adam(1e-4),
                targets=targets,
                memory_rank=width or None,
            )
            ratio = timing.compare(_step(tx, adapters), base, pairs=pairs)
            memory = f"memory of {width}" if width else "no memory"
            if not width:
                best = min(best, ratio.seconds * 1e3)
            found.append(
                Row(
                    f"EBLoRA, {layout}, {memory} / optax.adamw",
                    f"{ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]",
                    "" if width else f"<= {BUDGET:g}",
                    None if width else ratio.median <= BUDGET,
                    f"{ratio.seconds * 1e3:.1f} ms against "
                    f"{ratio.base_seconds * 1e3:.1f}",
                )
            )
    for manifold, constant in GEOOPT_MS.items():
        theirs = geoopt_ms(manifold, pairs)
        source = "measured beside it" if theirs else "a constant, measured beforehand"
        theirs = theirs or constant
        found.append(
            Row(
                f"EBLoRA, no memory / geoopt's RiemannianAdam on {manifold}",
                f"1/{theirs / best:.0f}",
                f"<= 1/{FASTER:g}",
                theirs / best >= FASTER,
                f"{best:.1f} ms against {theirs:.0f} ({source})",
            )
        )
    return found


def geoopt_ms(name: str, repeats: int) -> float | None:
    """Milliseconds of a step of geoopt's Riemannian Adam; None if not installed."""
    try:
        import geoopt
        import torch
    except ImportError:
        return None
    manifold = getattr(geoopt, name)()
    factors = [
        geoopt.ManifoldParameter(manifold.random(WIDTH, RANK), manifold=manifold)
        for _ in range(2 * LAYERS)
    ]
    optimizer = geoopt.optim.RiemannianAdam(factors, lr=1e-4)
    for factor in factors:
        factor.grad = 0.1 * torch.randn(WIDTH, RANK)
    times = []
    for _ in range(max(3, repeats // 3)):
        start = time.perf_counter()
        optimizer.step()
        times.append(time.perf_counter() - start)
    return 1e3 * float(np.median(times))


def _adapters(stacked):
    stack = (LAYERS,) if stacked else ()
    names = ["layers"] if stacked else [f"layers/{i}" for i in range(LAYERS)]
    params = {name: {"kernel": jnp.zeros((*stack, WIDTH, WIDTH))} for name in names}
    views = optax_cl.matrix_views(stacked="kernel" if stacked else None)
    targets = lora.targets(params, {"kernel": RANK}, alpha=32.0, matrices=views)
    keys = jax.random.split(jax.random.key(0), 2 * len(names)).reshape(-1, 2)
    shape = (*stack, WIDTH, RANK)
    adapters = {
        path: lora.Spectral(
            s=jnp.full(stack, -0.02),
            u=lora.stiefel.random(k[0], shape),
            v=lora.stiefel.random(k[1], shape),
        )
        for path, k in zip(targets, keys, strict=True)
    }
    return targets, adapters


def _step(tx, params):
    grads = jax.tree.map(lambda p: 0.1 * p + 0.01, params)

    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.array, params)
    return timing.compile_step(step, (params, tx.init(params)), grads)
