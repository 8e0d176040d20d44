"""One of two processes that train together; run by ``test_two_processes.py``.

    python two_processes.py PORT PROCESS FOLDER

Each process has two devices and half of every batch. Prints ``done`` and the norm of
the parameters if everything held.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_cl
from optax_cl._core.sharding import state_sharding

ROWS = 8
TASK = optax_cl.classification(
    lambda params, batch: batch["x"] @ params["w"] + params["b"][None],
    lambda batch: batch["y"],
)


def make_tx():
    links = (
        optax_cl.agem(),
        optax_cl.ewc(2.0),
        optax_cl.attenuate(0.5),
        optax_cl.scale_by_decoupled_adam(),
    )
    return optax.chain(optax_cl.protect(2, *links), optax.scale(-0.05))


def make_params():
    w = np.random.default_rng(0).normal(size=(4, 3))
    return {"w": jnp.asarray(w, jnp.float32), "b": jnp.zeros(3)}


def make_batch(seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(ROWS, 4)).astype(np.float32)
    return {"x": x, "y": rng.integers(0, 3, ROWS)}


def step(tx, params, state, batch, memory):
    def gradient(data):
        return jax.grad(lambda p: TASK.loss(p, data).mean())(params)

    updates, state = tx.update(
        gradient(batch), state, params, reference_updates=gradient(memory)
    )
    return optax.apply_updates(params, updates), state


def train(tx, step, end, params, state, seeds, put=lambda batch: batch):
    for seed in seeds:
        params, state = step(params, state, put(make_batch(seed)), put(make_batch(9)))
        if seed == 1:
            # Every process reads the same batches: the statistics are equal.
            statistics = optax_cl.collect(
                state,
                params,
                [put(make_batch(5)), put(make_batch(6))],
                task=TASK,
                key=jax.random.key(0),
            )
            state = end(state, params, statistics)
    return params, state


def single():
    """What one device computes, as the norm of the parameters."""
    tx = make_tx()
    jitted = jax.jit(lambda *args: step(tx, *args))
    params = make_params()
    end = jax.jit(optax_cl.end_task)
    params, _ = train(tx, jitted, end, params, tx.init(params), range(4))
    return float(optax.tree.norm(params))


def main(port, process, folder):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=process)
    assert jax.process_count() == 2 and jax.device_count() == 4
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, P("data"))
    tx, params = make_tx(), make_params()
    # The kernel is sharded over all devices of both processes, the bias replicated.
    places = {"w": split, "b": NamedSharding(mesh, P())}
    states = state_sharding(tx, params, places)
    init = jax.jit(tx.init, out_shardings=states)

    def put(batch):
        rows = slice(process * ROWS // 2, (process + 1) * ROWS // 2)
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(split, x[rows]), batch
        )

    jitted = jax.jit(
        lambda *args: step(tx, *args),
        in_shardings=(places, states, split, split),
        out_shardings=(places, states),
        donate_argnums=(0, 1),
    )
    end = jax.jit(optax_cl.end_task, out_shardings=states)
    params = jax.jit(lambda: make_params(), out_shardings=places)()
    params, state = train(tx, jitted, end, params, init(params), range(3), put)

    saved = {"params": params, "state": state}
    with ocp.CheckpointManager(folder, item_names=("train",)) as manager:
        manager.save(3, args=ocp.args.Composite(train=ocp.args.StandardSave(saved)))
        manager.wait_until_finished()
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
            saved,
        )
        back = manager.restore(
            3, args=ocp.args.Composite(train=ocp.args.StandardRestore(abstract))
        )["train"]
    assert jax.tree.structure(back) == jax.tree.structure(saved)
    jax.tree.map(assert_same_shards, back, saved)

    params, _ = train(tx, jitted, end, back["params"], back["state"], [3], put)
    whole = multihost_utils.process_allgather(params, tiled=True)
    multihost_utils.assert_equal(whole, "the processes disagree about the parameters")
    print("done", float(optax.tree.norm(whole)), flush=True)
    jax.distributed.shutdown()


def assert_same_shards(a, b):
    assert a.sharding == b.sharding
    for mine, other in zip(a.addressable_shards, b.addressable_shards, strict=True):
        np.testing.assert_array_equal(mine.data, other.data)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
