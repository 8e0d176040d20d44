"""The one engine of the studies: lanes of (arm, seed) through tasks, resumable.

A study hands over a ``Program``, pure functions for one lane, and the lanes. The engine

- shards the lanes over all devices and runs them side by side, one compilation for all;
- runs the steps in jitted scans of ``chunk_steps``, so that chunks end where the config
  says and never where a kill happened to fall;
- calls ``boundary`` after each task and ``evaluate`` at the start and after each
  boundary;
- writes checkpoints, goes on from the newest sound one, and leaves finished programs
  alone.

Resumed results equal those of an uninterrupted run bit for bit, provided that all that
is random in the functions derives from the lane, the task and the step (with
``jax.random.fold_in``), never from a Python-side generator.
"""

import hashlib
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from experiments import checkpoints, run_folder
from experiments.progress import Progress

_AXIS = "lanes"
# The share of the time that checkpoints may take, at most.
_CHECKPOINT_SHARE = 0.04


class Program(NamedTuple):
    """What one compilation runs: all arms of one family and all seeds are its lanes.

    A lane is a pytree of arrays; the functions see it without its lane axis. A carry is
    any pytree of arrays whose shapes and dtypes never change.
    """

    # Family name, unique in a study; names the file of results.
    name: str
    num_tasks: int
    steps_per_task: int
    # (data, lane) -> carry
    init: Callable[[Any, Any], Any]
    # (data, lane, carry, task_index int32, step int32)
    #     -> (carry, per_step: dict[str, scalar or small array])
    step: Callable[[Any, Any, Any, jax.Array, jax.Array], tuple[Any, dict]]
    # (data, lane, carry, task_index) -> (carry, dict[str, array])
    # after the last step of each task
    boundary: Callable[[Any, Any, Any, jax.Array], tuple[Any, dict]]
    # (data, lane, carry) -> dict[str, array], e.g. {"loss": [num_tasks]}
    # at the start (row 0) and after each task's boundary
    evaluate: Callable[[Any, Any, Any], dict]


class Context(NamedTuple):
    """What a study's ``run`` gets beside its config and its folder."""

    folder: Path
    progress: Progress

    def run(
        self,
        program: Program,
        data: Any,
        lanes: Any,
        *,
        chunk_steps: int,
        vectorize: Literal["map", "vmap"] = "map",
    ) -> dict[str, np.ndarray]:
        """``run_program`` in this run's folder, with its progress."""
        return run_program(
            program,
            data,
            lanes,
            chunk_steps=chunk_steps,
            folder=self.folder,
            vectorize=vectorize,
            progress=self.progress,
        )


def run_program(
    program: Program,
    data: Any,
    lanes: Any,
    *,
    chunk_steps: int,
    folder: str | Path,
    vectorize: Literal["map", "vmap"] = "map",
    progress: Progress | None = None,
) -> dict[str, np.ndarray]:
    """Runs a program to its end, from a checkpoint if there is one.

    Args:
      program: the functions to run.
      data: pytree of arrays that every lane sees (copied to each device).
      lanes: pytree of arrays with leading axis ``L`` = arms x seeds.
      chunk_steps: steps per jitted scan; belongs into the study's config.
      folder: the run folder; results go to ``<folder>/raw/<program.name>.npz``.
      vectorize: how a device runs its lanes, one after another with ``jax.lax.map`` or
        at once with ``jax.vmap``.
      progress: where to tell how far it is; None says nothing.

    Returns:
      ``"step/<name>"`` ``[L, T, S, ...]``, ``"boundary/<name>"`` ``[L, T, ...]`` and
      ``"evaluate/<name>"`` ``[L, T + 1, ...]`` for every entry of the dicts that the
      program's functions return, with T tasks of S steps.

    Raises:
      ValueError: if the program, the lanes or the settings don't fit together.
      run_folder.RunError: if the disk is full.
    """
    folder = Path(folder)
    progress = progress or Progress(stream=None)
    num_lanes = _check(program, lanes, chunk_steps, vectorize)
    path = folder / "raw" / f"{program.name}.npz"
    root = folder / "checkpoints" / program.name
    fingerprint = _fingerprint(program, lanes, chunk_steps, folder, vectorize)
    work = num_lanes * program.num_tasks * program.steps_per_task

    finished = _finished(path, fingerprint, progress)
    if finished is not None:
        checkpoints.drop(root)  # a kill may have come between the two
        progress.start(program.name, work, done=work)
        return finished

    parts = _compile(program, vectorize)
    devices = len(jax.devices())
    data = jax.device_put(data, parts.replicated)
    padded = jax.device_put(_pad(lanes, num_lanes, devices), parts.sharded)
    target = jax.tree.map(
        partial(_like, sharding=parts.sharded),
        jax.eval_shape(parts.init, data, padded),
    )
    snapshot = checkpoints.restore(root, target, fingerprint, progress.warn)
    log = _Log(num_lanes, snapshot.metrics if snapshot else {})
    checkpoints.orbax()  # so that the first checkpoint does not pay for the import
    if snapshot is None:
        task, step, carry = 0, 0, parts.init(data, padded)
        log.add("evaluate", parts.evaluate(data, padded, carry), row=True)
    else:
        task, step, carry = snapshot.task, snapshot.step, snapshot.carry
        progress.say(f"{program.name}: goes on from task {task + 1}, step {step}")
    done = num_lanes * (task * program.steps_per_task + step)
    progress.start(program.name, work, done=done)

    clock = _CheckpointClock()
    tasks, steps = program.num_tasks, program.steps_per_task
    while task < tasks:
        count = min(chunk_steps, steps - step)
        carry, recorded = parts.chunk(
            data, padded, carry, jnp.int32(task), jnp.int32(step), count=count
        )
        log.add("step", recorded)
        step += count
        if step == steps:
            carry, recorded = parts.boundary(data, padded, carry, jnp.int32(task))
            log.add("boundary", recorded, row=True)
            log.add("evaluate", parts.evaluate(data, padded, carry), row=True)
            task, step = task + 1, 0
        progress.advance(num_lanes * count, f"task {min(task + 1, tasks)}/{tasks}")
        if task < tasks and clock.due():
            with clock:
                position = task * steps + step
                state = checkpoints.Snapshot(task, step, carry, log.arrays())
                checkpoints.save(root, position, state, fingerprint)

    results = {
        name: array.reshape(num_lanes, tasks, steps, *array.shape[2:])
        if name.startswith("step/")
        else array
        for name, array in log.arrays().items()
    }
    _warn_of_divergence(program.name, results, progress)
    # A checksum of the run stands in the file itself: one rename makes it finished.
    mark = np.array(_digest(fingerprint))
    run_folder.save_arrays(path, {**results, "_fingerprint": mark})
    checkpoints.drop(root)
    return results


def _warn_of_divergence(
    name: str, results: dict[str, np.ndarray], progress: Progress
) -> None:
    for entry, array in results.items():
        if entry.startswith("evaluate/") and not np.isfinite(array).all():
            bad = ~np.isfinite(array).reshape(len(array), -1).all(1)
            lanes = ", ".join(map(str, np.flatnonzero(bad)))
            progress.warn(f"{name}: {entry} is not finite in lane(s) {lanes}")


class _Parts(NamedTuple):
    init: Callable
    chunk: Callable
    boundary: Callable
    evaluate: Callable
    sharded: NamedSharding
    replicated: NamedSharding


def _compile(program: Program, vectorize: str) -> _Parts:
    """The program's functions over all lanes: sharded, and jitted."""
    mesh = jax.make_mesh((len(jax.devices()),), (_AXIS,), axis_types=(AxisType.Auto,))
    over, whole = PartitionSpec(_AXIS), PartitionSpec()

    def spread(function: Callable, num_shared: int) -> Callable:
        """``function(data, lane, carry?, *shared)`` on each device's lanes."""

        def local(data, per_lane, *shared):
            one = lambda pair: function(data, *pair, *shared)  # noqa: E731
            if vectorize == "vmap":
                return jax.vmap(one)(per_lane)
            return jax.lax.map(one, per_lane)

        # Lanes never talk to each other, so there is nothing for the check of varying
        # values to protect; it would only forbid constants as initial scan carries.
        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(whole, over, *[whole] * num_shared),
            out_specs=over,
            check_vma=False,
        )

    def chunk(data, lanes, carry, task, step, count):
        def steps(data, lane, carry, task, first):
            def body(carry, index):
                return program.step(data, lane, carry, task, index)

            return jax.lax.scan(body, carry, first + jnp.arange(count, dtype=jnp.int32))

        return spread(steps, 2)(data, (lanes, carry), task, step)

    def boundary(data, lanes, carry, task):
        return spread(program.boundary, 1)(data, (lanes, carry), task)

    return _Parts(
        init=jax.jit(lambda data, lanes: spread(program.init, 0)(data, (lanes,))),
        chunk=jax.jit(chunk, static_argnames="count", donate_argnames="carry"),
        boundary=jax.jit(boundary, donate_argnames="carry"),
        evaluate=jax.jit(
            lambda data, lanes, carry: spread(program.evaluate, 0)(data, (lanes, carry))
        ),
        sharded=NamedSharding(mesh, over),
        replicated=NamedSharding(mesh, whole),
    )


def _like(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _pad(lanes: Any, num_lanes: int, devices: int) -> Any:
    """Repeats lane 0 until every device has the same number of lanes."""
    index = np.arange(-(-num_lanes // devices) * devices)
    index = np.where(index < num_lanes, index, 0)
    return jax.tree.map(lambda x: jnp.asarray(x)[index], lanes)


class _Log:
    """What the program recorded, as pieces along axis 1 until somebody asks."""

    def __init__(self, num_lanes: int, saved: dict[str, np.ndarray]):
        self._lanes = num_lanes
        self._pieces = {name: [array] for name, array in saved.items()}

    def add(self, kind: str, recorded: dict[str, jax.Array], row: bool = False) -> None:
        for name, value in recorded.items():
            array = np.asarray(value)[: self._lanes]
            if array.dtype.kind == "V":  # bfloat16 and the like, unknown to NumPy
                array = array.astype(np.float32)
            array = array[:, None] if row else array
            self._pieces.setdefault(f"{kind}/{name}", []).append(array)

    def arrays(self) -> dict[str, np.ndarray]:
        for name, pieces in self._pieces.items():
            if len(pieces) > 1:
                self._pieces[name] = [np.concatenate(pieces, axis=1)]
        return {name: pieces[0] for name, pieces in self._pieces.items()}


class _CheckpointClock:
    """Says when a checkpoint is due: as often as a small share of the time allows."""

    def __init__(self):
        self._end = time.monotonic()
        self._cost = 0.0

    def due(self) -> bool:
        elapsed = time.monotonic() - self._end
        return elapsed * _CHECKPOINT_SHARE >= self._cost

    def __enter__(self) -> None:
        self._begin = time.monotonic()

    def __exit__(self, *_) -> None:
        self._end = time.monotonic()
        self._cost = self._end - self._begin


def _check(program: Program, lanes: Any, chunk_steps: int, vectorize: str) -> int:
    """The number of lanes, after the checks that need no tracing."""
    sizes = {
        "num_tasks": program.num_tasks,
        "steps_per_task": program.steps_per_task,
        "chunk_steps": chunk_steps,
    }
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"`{name}` must be a positive integer; got {size!r}.")
    if vectorize not in ("map", "vmap"):
        raise ValueError(f"`vectorize` must be 'map' or 'vmap'; got {vectorize!r}.")
    if not program.name or set(program.name) & set("/\\\0") or program.name[0] in "._":
        raise ValueError(
            f"`program.name` names a file, so it must be a plain file name; got "
            f"{program.name!r}."
        )
    leaves = jax.tree_util.tree_leaves_with_path(lanes)
    counts = {jax.tree_util.keystr(p): np.shape(x)[:1] for p, x in leaves}
    if (
        len(set(counts.values())) != 1
        or () in counts.values()
        or (0,) in set(counts.values())
    ):
        raise ValueError(
            "`lanes` must be a pytree of arrays with the same leading axis of at least "
            f"one lane; got leading sizes {counts}."
        )
    return next(iter(counts.values()))[0]


def _fingerprint(
    program: Program, lanes: Any, chunk_steps: int, folder: Path, vectorize: str
) -> dict[str, Any]:
    """All that must agree for a checkpoint to be continued."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(lanes):
        if jnp.issubdtype(getattr(leaf, "dtype", np.float32), jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        digest.update(
            f"{jax.tree_util.keystr(path)}{array.shape}{array.dtype}".encode()
        )
        digest.update(array.tobytes())
    # A program may run without the command line, and so without a recorded config.
    recorded = (folder / "config.json").exists()
    return {
        "config_hash": run_folder.read_record(folder)["config_hash"]
        if recorded
        else "",
        "program": program.name,
        "num_tasks": program.num_tasks,
        "steps_per_task": program.steps_per_task,
        "chunk_steps": chunk_steps,
        "lanes": digest.hexdigest()[:16],
        "vectorize": vectorize,
        "devices": f"{len(jax.devices())} {jax.default_backend()}",
    }


def _digest(fingerprint: dict[str, Any]) -> str:
    return hashlib.sha256(repr(sorted(fingerprint.items())).encode()).hexdigest()


def _finished(
    path: Path, fingerprint: dict[str, Any], progress: Progress
) -> dict[str, np.ndarray] | None:
    """The results of a program that has run to its end, if they are sound and ours."""
    if not path.exists():
        return None
    try:
        arrays = run_folder.load_arrays(path)
    except run_folder.RunError as error:
        progress.warn(f"{error}; the program {fingerprint['program']} runs again")
        return None
    mark = arrays.pop("_fingerprint", None)
    if mark is None or str(mark) != _digest(fingerprint):
        progress.warn(f"{path} belongs to another run; it will be replaced")
        return None
    return arrays
