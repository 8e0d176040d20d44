"""``python -m benchmarks.lora_init``: memory and time of the starts of adapters.

Memory is XLA's own count of the compiled gradient step, so it doesn't depend on the
machine; nothing is allocated for it. Times are of one call after one that compiles.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.models import byte_lm
from optax_cl import lora, matrix_views
from optax_cl.lora import _gradients

# The kernels of one layer of SmolLM2-135M, [in, out].
KERNELS = {
    "q": (576, 576),
    "k": (576, 192),
    "v": (576, 192),
    "o": (576, 576),
    "gate": (576, 1536),
    "up": (576, 1536),
    "down": (1536, 576),
}
RULE = matrix_views(stacked="^layers", embeddings="skip")


def scanned_loss(params: Any, x: jax.Array) -> jax.Array:
    """A residual net with the kernels of a decoder, its layers in one scan."""

    def layer(x, p):
        h = jnp.tanh(x @ p["q"]) + jnp.tile(jnp.tanh(x @ p["k"] * (x @ p["v"])), 3)
        x = x + h @ p["o"]
        return x + (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"], None

    return (jax.lax.scan(layer, x, params["layers"])[0] ** 2).mean(axis=1)


def unrolled(config: byte_lm.ByteLMConfig) -> tuple[Any, Callable[..., jax.Array]]:
    """Abstract parameters of the byte model, and its loss of each example."""
    model = byte_lm.byte_lm(config)

    def loss(params, batch):
        inputs, labels = batch
        each = jax.vmap(byte_lm.next_byte_loss)
        return each(model.apply(params, inputs), labels)

    return jax.eval_shape(model.init, jax.random.key(0)), loss


def gradient_pass(what: str, params: Any, pattern: str, loss: Any, batch: Any) -> str:
    """Peak memory of the reference's pass, while the new task's gradient is kept."""
    chosen = lora.targets(params, {pattern: 16}, alpha=1.0, matrices=RULE)
    sums = jax.eval_shape(lambda p: _gradients._nothing(chosen, p), params)
    weights = jax.ShapeDtypeStruct(jax.tree.leaves(batch)[0].shape[:1], jnp.float32)
    lowered = _gradients._step.lower(loss, chosen, sums, params, batch, weights)
    memory = lowered.compile().memory_analysis()
    size = lambda tree: sum(x.size * 4 for x in jax.tree.leaves(tree))  # noqa: E731
    everything = jax.eval_shape(
        lambda p: _gradients._nothing(
            lora.targets(params, {"": 1}, alpha=1.0, matrices=RULE), p
        ),
        params,
    )
    copy, summed = size(everything.gradients), size(sums.gradients)
    in_place = memory.alias_size_in_bytes >= summed
    copies = (copy + summed + memory.temp_size_in_bytes) / copy
    return (
        f"| {what} | {size(params) / 1e6:.0f} MB | {summed / 1e6:.0f} MB"
        f"{' in place' if in_place else ' COPIED'} | "
        f"{memory.temp_size_in_bytes / 1e6:.0f} MB | {copies:.2f} |"
    )


def memory_table() -> None:
    """Prints what a gradient pass holds beside the parameters."""
    print("Peak beside the parameters, in copies of the kernels' gradients: the kept")
    print(
        "gradient of the new task, the sums of the reference, and what one step needs"
    )
    print("for itself, activations included.\n")
    print("| model and targets | parameters | sums | step's own | copies |")
    print("|---|---|---|---|---|")
    config = byte_lm.ByteLMConfig(
        layers=12, width=384, heads=6, hidden=1536, context=64
    )
    params, loss = unrolled(config)
    tokens = jax.ShapeDtypeStruct((1, 16), jnp.int32)
    args = params, "kernel", loss, (tokens, tokens)
    print(gradient_pass("12 layers, unrolled, all", *args))
    scanned = {
        "layers": {
            name: jax.ShapeDtypeStruct((30, *shape), jnp.float32)
            for name, shape in KERNELS.items()
        }
    }
    batch = jax.ShapeDtypeStruct((16, 576), jnp.float32)
    for what, pattern in [("all", "layers")] + [(k, f"/{k}$") for k in ("q", "down")]:
        args = scanned, pattern, scanned_loss, batch
        print(gradient_pass(f"30 layers, scanned, {what}", *args))


def timed(function: Callable[[], Any]) -> float:
    """Seconds of the second call."""
    jax.block_until_ready(jax.tree.leaves(function()))
    start = time.perf_counter()
    jax.block_until_ready(jax.tree.leaves(function()))
    return time.perf_counter() - start


def time_table(layers: int, rank: int) -> None:
    """Prints how long each start takes on the kernels of SmolLM2-135M."""
    keys = iter(jax.random.split(jax.random.key(0), 3 * len(KERNELS)))

    def draw():
        return {
            name: jax.random.normal(next(keys), (layers, *shape))
            for name, shape in KERNELS.items()
        }

    params = {"layers": draw()}
    chosen = lora.targets(params, {"": rank}, alpha=2.0, matrices=RULE)
    g, r = ({f"layers/{k}": x for k, x in draw().items()} for _ in range(2))
    start = lora.loram_init(chosen, params)
    count = sum(x.size for x in jax.tree.leaves(params)) / 1e6
    print(f"\n{layers} layers, {count:.0f} M parameters in kernels, rank {rank}:\n")
    print("| what | seconds |")
    print("|---|---|")
    rows = {
        "absorb": lambda: lora.absorb(chosen, params, start.adapters),
        "merge": lambda: lora.merge(chosen, start.params, start.adapters),
        "loram_init": lambda: lora.loram_init(chosen, params),
        "lora_init": lambda: lora.lora_init(chosen, params, jax.random.key(0)),
        "slice_init, randomized": lambda: lora.slice_init(
            chosen, params, g, r, svd="randomized"
        ),
        "slice_init, exact": lambda: lora.slice_init(chosen, params, g, r, svd="exact"),
        "pissa_init, randomized": lambda: lora.pissa_init(
            chosen, params, svd="randomized"
        ),
    }
    for what, function in rows.items():
        print(f"| {what} | {timed(function):.2f} |", flush=True)


def main(argv: list[str] | None = None) -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lora_init")
    parser.add_argument("--layers", type=int, default=6, help="layers to time")
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args(argv)
    memory_table()
    if args.layers:
        time_table(args.layers, args.rank)


if __name__ == "__main__":
    main()
