"""``python -m benchmarks``: every row of the speed table, as ratios with spread.

Rows are budgets: a ratio of two compiled programs timed in turn in one process. Beside
it stand XLA's own counts, which do not depend on the machine's mood.
"""

import argparse
import gc
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_cl
from benchmarks import digits, eblora, lora_training, retractions, timing
from benchmarks.timing import Row
from experiments import cores
from experiments.models import byte_lm


def tree_of(shapes: list[tuple[int, ...]], seed: int) -> dict[str, jax.Array]:
    """Normal arrays of the given shapes."""
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return {
        f"layer_{i}": {"kernel": 0.02 * jax.random.normal(k, s)}
        for i, (k, s) in enumerate(zip(keys, shapes, strict=True))
    }


def optimizer_step(tx, params, **extra) -> timing.Step:
    """A step of an optimizer alone: update and apply, gradients given."""
    tx = optax.with_extra_args_support(tx)
    grads = jax.tree.map(lambda p: 0.1 * p + 0.01, params)

    def step(carry, grads, extra):
        params, state = carry
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.array, params)
    return timing.compile_step(step, (params, tx.init(params)), grads, extra)


def with_memory(tx, state, params, seed=0):
    """The state as after a boundary: random orthonormal bases, anchors, curvature."""

    def fill(s):
        bases = jax.tree.map(
            lambda u: jnp.linalg.qr(jax.random.normal(jax.random.key(seed), u.shape))[
                0
            ],
            s.basis,
        )
        ones = lambda t: None if t is None else jax.tree.map(jnp.ones_like, t)  # noqa: E731
        return s._replace(
            basis=bases, energy=ones(s.energy), curvature=ones(s.curvature)
        )

    return optax_cl.map_states(fill, state, optax_cl.routing.ProtectState)


def moment_rows(pairs: int, million: float) -> list[Row]:
    """Rows over one tree of ``million`` parameters (in units of a million)."""
    side = 1024
    n = max(1, round(million * 1e6 / side**2))
    params = tree_of([(side, side)] * n, 0)
    reference = jax.tree.map(lambda p: -p, params)
    adam = lambda: optimizer_step(optax.adam(1e-3), params)  # noqa: E731
    rate = optax.scale_by_learning_rate(1e-3)
    decoupled = optax_cl.scale_by_decoupled_adam
    band = timing.bandwidth()
    rows = []

    # XLA counts reads and writes alike, but on a CPU a write in place hides behind the
    # reads, and XLA gives mu, nu and the parameters a loop each. Per parameter Adam
    # reads 2 + 2 + 3 = 7 times. A-GEM reads 3 for its inner products and 3 for mu; nu
    # reads 2 if it is fed the raw gradient, 3 if the larger of both. EWC reads 5 for mu
    # and 2 or 5 for nu. So with "raw" the limits of memory are 11 / 7 and 10 / 7, with
    # "max" 12 / 7 and 13 / 7, on trees far larger than the cache. One loop for both
    # inner products (a reduction of a pair, or of complex numbers) reads less and takes
    # two to ten times as long: XLA does not vectorise it. Its option for loops with
    # several results gives up the writes in place, and all rows get slower.
    def add(what, budget, reads, tx, **extra):
        step = optimizer_step(tx, params, **extra)
        ratio = timing.compare(step, adam(), pairs=pairs)
        row = _row(f"{what} / optax.adam", ratio, budget, step.counts, band)
        rows.append(row._replace(note=f"{row.note}; {reads} reads a parameter to 7"))

    add("decoupled Adam", 1.05, 7, optax_cl.chain(decoupled(), rate))
    for second, agem_reads, ewc_reads in (("raw", 11, 10), ("max", 12, 13)):
        adam_of = decoupled(second_moment=second)
        add(
            f"A-GEM + decoupled Adam, nu from {second}",
            1.5,
            agem_reads,
            optax_cl.chain(optax_cl.agem(), adam_of, rate),
            reference_updates=reference,
        )
        add(
            f"EWC + decoupled Adam, nu from {second}",
            1.6,
            ewc_reads,
            optax_cl.chain(optax_cl.ewc(1.0), adam_of, rate),
        )
    return rows


def attenuation_row(pairs: int) -> Row:
    """`balance` over constant strength, rank 32, 16 matrices of 1024 x 1024."""
    params = tree_of([(1024, 1024)] * 16, 1)

    def make(rule):
        tx = optax.chain(
            optax_cl.protect(
                32, optax_cl.attenuate(rule), optax_cl.scale_by_decoupled_adam()
            ),
            optax.scale_by_learning_rate(1e-3),
        )
        state = with_memory(tx, tx.init(params), params)
        grads = jax.tree.map(lambda p: 0.1 * p + 0.01, params)

        def step(carry, grads):
            params, state = carry
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        copied = jax.tree.map(jnp.array, params)
        return timing.compile_step(step, (copied, state), grads)

    balance, constant = make(optax_cl.balance()), make(0.5)
    plain = optimizer_step(optax.adam(1e-3), params)
    ratio = timing.compare(balance, constant, pairs=pairs)
    bare = timing.compare(make(0.5), plain, pairs=max(3, pairs // 2))
    row = _row("balance / constant attenuation", ratio, 1.3, balance.counts, None)
    return row._replace(
        note=row.note + f"; constant itself {bare.median:.2f} times bare Adam"
    )


def training_row(pairs: int) -> Row:
    """A whole step of a small transformer over 1,000 tokens."""
    config = byte_lm.ByteLMConfig(
        layers=4, width=256, heads=4, hidden=1024, context=125
    )
    model = byte_lm.byte_lm(config)
    params = model.init(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (8, 126), 0, 256)

    def loss(params, tokens):
        logits = model.apply(params, tokens[:, :-1])
        return byte_lm.next_byte_loss(logits, tokens[:, 1:])

    def make(tx, memory):
        state = tx.init(params)
        if memory:
            state = with_memory(tx, state, params)

        def step(carry, tokens):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params, tokens), state, params)
            return optax.apply_updates(params, updates), state

        copied = jax.tree.map(jnp.array, params)
        return timing.compile_step(step, (copied, state), tokens)

    rate = optax.scale_by_learning_rate(1e-3)
    protected = optax.chain(
        optax_cl.protect(
            32,
            optax_cl.attenuate(),
            optax_cl.scale_by_decoupled_adam(),
            matrices=optax_cl.matrix_views(skip="tokens|positions"),
        ),
        rate,
    )
    plain = optax.chain(optax.scale_by_adam(), rate)
    step = make(protected, True)
    ratio = timing.compare(step, make(plain, False), pairs=pairs)
    return _row(
        "training step with / without attenuation", ratio, 1.15, step.counts, None
    )


def compile_row(repeats: int) -> Row:
    """Time to trace and compile a chain of three methods over 200 leaves."""
    params = tree_of([(16, 16)] * 200, 2)
    reference = params

    def seconds(tx, **extra):
        tx = optax.with_extra_args_support(tx)
        state = tx.init(params)

        def step(grads, state, params, extra):
            updates, state = tx.update(grads, state, params, **extra)
            return optax.apply_updates(params, updates), state

        jax.clear_caches()
        gc.collect()
        # A collection in the middle is an eighth of the shorter of the two times.
        gc.disable()
        start = time.perf_counter()
        jax.jit(step).lower(params, state, params, extra).compile()
        seconds = time.perf_counter() - start
        gc.enable()
        return seconds

    three = optax_cl.decoupled_adamw(
        1e-3, modifiers=[optax_cl.ewc(1.0), optax_cl.agem()], weight_decay=1e-4
    )
    ratios = []
    for _ in range(repeats):
        ours = seconds(three, reference_updates=reference)
        ratios.append(ours / seconds(optax.adamw(1e-3)))
    low, median, high = np.percentile(ratios, [25, 50, 75])
    return Row(
        "compile time, three methods over 200 leaves / optax.adamw",
        f"{median:.2f} [{low:.2f}, {high:.2f}]",
        "<= 2.5",
        bool(median <= 2.5),
        "EWC, A-GEM, decoupled AdamW",
    )


def recompilation_row() -> Row:
    """Compilations of the train step after its first, over 20 tasks."""
    task = optax_cl.classification(lambda w, b: b[0] @ w["w"], lambda b: b[1])
    tx = optax.chain(
        optax_cl.protect(
            4,
            optax_cl.attenuate(),
            optax_cl.ewc(1.0),
            optax_cl.agem(decay=0.5),
            optax_cl.scale_by_decoupled_adam(),
        ),
        optax.scale_by_learning_rate(1e-2),
    )
    params = {"w": jnp.zeros((8, 4))}
    state = tx.init(params)

    @jax.jit
    def step(params, state, batch):
        grads = jax.grad(lambda p: task.loss(p, batch).mean())(params)
        updates, state = tx.update(grads, state, params, reference_updates=grads)
        return optax.apply_updates(params, updates), state

    boundary = jax.jit(optax_cl.end_task)
    for t in range(20):
        key = jax.random.key(t)
        batch = (jax.random.normal(key, (16, 8)), jax.random.randint(key, (16,), 0, 4))
        for _ in range(2):
            params, state = step(params, state, batch)
        stats = optax_cl.collect(state, params, [batch], task=task, key=key)
        state = optax_cl.begin_task(boundary(state, params, stats), params)
    extra = step._cache_size() - 1 + boundary._cache_size() - 1
    return Row(
        "recompilations after the first step, 20 tasks", str(extra), "0", extra == 0, ""
    )


def digits_rows(pairs: int) -> list[Row]:
    """Wall time per step and seed against Avalanche's figures; see ``digits``."""
    rows = []
    plain = digits.task_step("naive")
    each = digits.SEEDS * digits.STEPS
    for method, theirs in digits.AVALANCHE_MS.items():
        times = timing.compare(digits.task_step(method), plain, pairs=pairs)
        ms = times.seconds * 1e3 / each
        ratio, budget = ms / theirs, digits.BUDGET[method]
        rows.append(
            Row(
                f"digits, {method}: ms per step and seed / Avalanche's",
                f"1/{1 / ratio:.0f}",
                f"<= 1/{1 / budget:.0f}",
                ratio <= budget,
                f"{ms:.3f} ms against {theirs} (a constant, measured beforehand)",
            )
        )
    rows += [_evaluation_row(images, plain, pairs) for images in (360, 36)]
    return rows


def _evaluation_row(images: int, plain: timing.Step, pairs: int) -> Row:
    """Accuracy on a fixed set after every step, against training alone."""
    # All 360 test images are work, not overhead: forward passes over eleven times the
    # images of a training step. The tenth of them shows what evaluation itself costs.
    watched = digits.task_step("naive", evaluate=images)
    ratio = timing.compare(watched, plain, pairs=pairs)
    what = f"evaluation on {images} images after every step / without"
    row = _row(what, ratio, 1.3, watched.counts, None)
    more = watched.counts.gflops / plain.counts.gflops
    return row._replace(note=f"{more:.2f} times the FLOPs, by XLA's count")


def retraction_rows(pairs: int) -> list[Row]:
    """Retractions of 60 factors of 576 x 16; ``benchmarks.retractions`` has more."""
    size = {"dimensions": (576,), "ranks": (16,), "batches": (60,)}
    return [
        Row(
            f"retraction {row.method}, memory of {row.memory} / optax.adamw",
            f"{row.times.median:.2f} [{row.times.low:.2f}, {row.times.high:.2f}]",
            "",
            None,
            f"{row.times.seconds * 1e3:.2f} ms; {row.batch} x {row.d} x {row.r}",
        )
        for memory in (0, 64)
        for row in retractions.rows(pairs=pairs, memory=memory, **size)
    ]


def _row(what, ratio, budget, counts, band) -> Row:
    note = (
        f"{ratio.seconds * 1e3:.1f} ms against {ratio.base_seconds * 1e3:.1f}; XLA: "
        f"{counts.gflops:.2f} GFLOP, {counts.gigabytes:.2f} GB, "
        f"{counts.temporary:.0f} MB temporary"
    )
    if band is not None:
        share = counts.gigabytes * 1e9 / ratio.seconds / band
        note += f"; {share:.0%} of the bandwidth of scaling in place"
    return Row(
        what,
        f"{ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]",
        f"<= {budget:g}",
        ratio.median <= budget,
        note,
    )


def main(argv: list[str] | None = None) -> int:
    """Prints the table; the exit code says whether every budget is met."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--pairs", type=int, default=30, help="timed pairs a row")
    parser.add_argument(
        "--million", type=float, default=20.0, help="parameters of the moment rows"
    )
    parser.add_argument("--only", default="", help="rows whose name contains this")
    args = parser.parse_args(argv)
    if args.pairs < 1 or args.million <= 0:
        parser.error("--pairs and --million must be positive")
    suites: list[tuple[str, Callable[[], list[Row]]]] = [
        ("moments", lambda: moment_rows(args.pairs, args.million)),
        ("attenuation", lambda: [attenuation_row(args.pairs)]),
        ("training", lambda: [training_row(args.pairs)]),
        ("eblora", lambda: eblora.rows(args.pairs)),
        ("adapters", lambda: lora_training.rows(max(3, args.pairs // 2))),
        ("retractions", lambda: retraction_rows(max(3, args.pairs // 3))),
        ("digits", lambda: digits_rows(max(3, args.pairs // 3))),
        ("compile", lambda: [compile_row(5)]),
        ("recompilations", lambda: [recompilation_row()]),
    ]
    chosen = {name: run for name, run in suites if args.only in name}
    if not chosen:
        parser.error(f"--only {args.only!r} matches none of {[n for n, _ in suites]}")
    # One device for each core: the digits spread their seeds over them, and everything
    # else runs on the first, which has all the threads either way.
    jax.config.update("jax_num_cpu_devices", cores.count())
    kind, count = jax.devices()[0].device_kind, jax.device_count()
    print(f"jax {jax.__version__}, {kind}, {count} device(s)")
    print(
        "| what | ratio, median [quartiles] | budget | met | |\n|---|---|---|---|---|"
    )
    failed = False
    for run in chosen.values():
        for row in run():
            met = {True: "yes", False: "NO", None: ""}[row.met]
            print(f"| {row.what} | {row.ratio} | {row.budget} | {met} | {row.note} |")
            sys.stdout.flush()
            failed |= row.met is False
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
