"""Five tasks of two digits each, ten seeds at once: wall time per step and seed.

The protocol of a well-known PyTorch library on the same data and network: images of
8 x 8, MLP 64-256-256-10, batch 32, Adam, tasks (0, 1) to (8, 9), 92 steps a task. Its
own times are constants here, measured with Avalanche on two cores of the same kind, in
milliseconds a step: means over the five tasks, and for GEM, whose steps get longer with
every task, the median of the last, which is the one that is timed.

Seeds are spread over the devices there are, one for each core.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import optax_cl
from benchmarks import timing

SEEDS = 10
STEPS = 92
TASKS = 5
KEPT = 40  # images of each past task
AVALANCHE_MS = {"naive": 3.72, "A-GEM": 6.20, "EWC": 8.04, "GEM": 14.5}
BUDGET = {"naive": 1 / 12, "A-GEM": 1 / 12, "EWC": 1 / 20, "GEM": 1 / 15}
LINKS = {
    "naive": [],
    "A-GEM": [optax_cl.agem()],
    "EWC": [optax_cl.ewc(100.0)],
    "GEM": [optax_cl.gem(margin=0.5)],
}


def _init(key):
    sizes = (64, 256, 256, 10)
    keys = jax.random.split(key, 3)
    return [
        {"kernel": jax.random.normal(k, (a, b)) * a**-0.5, "bias": jnp.zeros(b)}
        for k, a, b in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def _logits(params, x):
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return x @ params[-1]["kernel"] + params[-1]["bias"]


def _loss(params, x, y):
    losses = optax.softmax_cross_entropy_with_integer_labels(_logits(params, x), y)
    return losses.mean()


def task_step(method: str, *, evaluate: int = 0) -> timing.Step:
    """The last task's training for all seeds, as one compiled step.

    Args:
      method: A key of ``AVALANCHE_MS``.
      evaluate: On how many images accuracy is measured after every step.

    Returns:
      A step of all seeds through ``STEPS`` batches.
    """
    images, labels = load_digits(return_X_y=True)
    images, labels = np.float32(images / 16), np.int32(labels)
    now, old = labels >= 8, labels < 8
    x, y = jnp.array(images[now]), jnp.array(labels[now])
    memory = np.concatenate(
        [np.flatnonzero(old & (labels // 2 == t))[:KEPT] for t in range(TASKS - 1)]
    )
    mx, my = jnp.array(images[memory]), jnp.array(labels[memory])
    tx = optax_cl.chain(
        *LINKS[method],
        optax_cl.scale_by_decoupled_adam(),
        optax.scale_by_learning_rate(1e-3),
    )

    def one_seed(carry):
        def step(carry, i):
            params, state, key = carry
            draw, again = jax.random.split(jax.random.fold_in(key, i))
            rows = jax.random.randint(draw, (32,), 0, x.shape[0])
            extra = {}
            if method == "A-GEM":
                kept = jax.random.randint(again, (64,), 0, mx.shape[0])
                extra["reference_updates"] = jax.grad(_loss)(params, mx[kept], my[kept])
            if method == "GEM":
                tasks = (mx.reshape(TASKS - 1, KEPT, -1), my.reshape(TASKS - 1, KEPT))
                extra["memory_updates"] = jax.vmap(jax.grad(_loss), (None, 0, 0))(
                    params, *tasks
                )
                extra["memory_mask"] = jnp.ones(TASKS - 1, bool)
            grads = jax.grad(_loss)(params, x[rows], y[rows])
            updates, state = tx.update(grads, state, params, **extra)
            params = optax.apply_updates(params, updates)
            seen = 0.0
            if evaluate:
                guess = _logits(params, images[:evaluate]).argmax(1)
                seen = (guess == labels[:evaluate]).mean()
            return (params, state, key), seen

        (params, state, key), seen = jax.lax.scan(step, carry[:3], jnp.arange(STEPS))
        return params, state, key, jnp.sum(jnp.asarray(seen, jnp.float32))

    # Each device takes the same number of seeds.
    devices = jax.devices()[: math.gcd(SEEDS, jax.device_count())]
    mesh = jax.make_mesh((len(devices),), ("seeds",), devices=devices)
    over = jax.sharding.PartitionSpec("seeds")

    def all_seeds(carry):
        # Seeds never talk to each other: the check would only forbid constants.
        local = lambda carry: jax.lax.map(one_seed, carry)  # noqa: E731
        return jax.shard_map(
            local, mesh=mesh, in_specs=over, out_specs=over, check_vma=False
        )(carry)

    keys = jax.random.split(jax.random.key(0), SEEDS)
    params = jax.vmap(_init)(keys)
    state = jax.vmap(tx.init)(params)
    carry = jax.device_put(
        (params, state, keys, jnp.zeros(SEEDS)), jax.sharding.NamedSharding(mesh, over)
    )
    return timing.compile_step(all_seeds, carry)
