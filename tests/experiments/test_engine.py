"""The engine against a plain Python loop; checkpoints whole, damaged and foreign."""

import errno
import functools
import json
import os
import re
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import checkpoints, engine, run_folder
from experiments.progress import Progress

sys.path.insert(0, str(Path(__file__).parent))
import toy

STEPS = 11
PROGRAM = toy.program("toy", STEPS)


@pytest.fixture(scope="module", autouse=True)
def compile_once():
    """Lets the runs of this file share what they compile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "_compile", functools.cache(engine._compile))
        yield


class Recorder(Progress):
    """Keeps what is said, and can stop the run after so many chunks."""

    def __init__(self, stop_after=None):
        super().__init__(stream=None)
        self.lines, self.left = [], stop_after

    def say(self, text):
        self.lines.append(text)

    def advance(self, work, note=""):
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt


def is_due(clock):
    """A checkpoint, always: in place of what the clock says."""
    return True


@pytest.fixture
def save_always(monkeypatch):
    monkeypatch.setattr(engine._CheckpointClock, "due", is_due)


def run(folder, progress=None, *, chunk_steps=4, vectorize="map", program=None):
    data, lanes = toy.inputs([0.05, 0.01], 3)
    return engine.run_program(
        program or PROGRAM,
        data,
        lanes,
        chunk_steps=chunk_steps,
        folder=folder,
        vectorize=vectorize,
        progress=progress,
    )


def interrupt(folder, chunks):
    """Leaves a run behind that was stopped after so many chunks."""
    with pytest.raises(KeyboardInterrupt):
        run(folder, Recorder(stop_after=chunks))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that was stopped after five chunks and had saved after each; to copy."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine._CheckpointClock, "due", is_due)
        interrupt(folder, 5)
    return folder


@pytest.fixture
def copied(stopped, tmp_path):
    return shutil.copytree(stopped, tmp_path / "copied")


def by_hand(program, data, lanes):
    """The same run as nested Python loops over lanes, tasks and steps."""
    lost = {}
    init, evaluate = jax.jit(program.init), jax.jit(program.evaluate)
    step, boundary = jax.jit(program.step), jax.jit(program.boundary)
    for i in range(len(lanes["seed"])):
        lane = {k: v[i] for k, v in lanes.items()}
        carry = init(data, lane)
        rows = {("evaluate", ()): evaluate(data, lane, carry)}
        for task in range(program.num_tasks):
            for s in range(program.steps_per_task):
                carry, out = step(data, lane, carry, jnp.int32(task), jnp.int32(s))
                rows["step", (task, s)] = out
            carry, out = boundary(data, lane, carry, jnp.int32(task))
            rows["boundary", (task,)] = out
            rows["evaluate", (task,)] = evaluate(data, lane, carry)
        for (kind, at), out in rows.items():
            for name, value in out.items():
                lost.setdefault(f"{kind}/{name}", {})[(i, *at)] = np.asarray(value)
    return lost


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("vectorize", ["map", "vmap"])
def test_results_equal_nested_python_loops(tmp_path, vectorize):
    data, lanes = toy.inputs([0.05, 0.01], 3)
    got = run(tmp_path, vectorize=vectorize)
    want = by_hand(PROGRAM, data, lanes)
    assert got["step/loss"].shape == (6, 3, STEPS)
    assert got["boundary/norm"].shape == (6, 3)
    assert got["evaluate/loss"].shape == (6, 4, 3)
    for name, entries in want.items():
        for at, value in entries.items():
            # Row 0 of the evaluations is the start, row t + 1 follows task t.
            if name.startswith("evaluate/"):
                at = (at[0], at[1] + 1 if len(at) > 1 else 0)
            np.testing.assert_allclose(got[name][at], value, rtol=2e-5, err_msg=name)


def test_each_step_sees_its_task_and_its_index(whole):
    np.testing.assert_array_equal(
        whole["step/index"], np.broadcast_to(np.arange(STEPS), (6, 3, STEPS))
    )


def test_lanes_with_one_seed_and_rate_agree_across_places(tmp_path, whole):
    data, lanes = toy.inputs([0.05, 0.01], 3)
    turned = {k: v[::-1].copy() for k, v in lanes.items()}
    got = engine.run_program(PROGRAM, data, turned, chunk_steps=4, folder=tmp_path)
    np.testing.assert_allclose(got["step/loss"][::-1], whole["step/loss"], rtol=1e-6)


def test_chunks_compile_once_for_each_length_and_not_per_task(tmp_path):
    traces = []
    program = PROGRAM

    def step(*args):
        traces.append(1)
        return program.step(*args)

    run(tmp_path, program=program._replace(step=step), chunk_steps=4)
    few = len(traces)  # chunks of 4 and of 3 steps
    traces.clear()
    longer = program._replace(step=step, steps_per_task=5 * STEPS, name="longer")
    run(tmp_path, program=longer, chunk_steps=4)
    assert len(traces) == few


def test_saved_file_holds_what_was_returned_and_has_no_time_in_it(tmp_path, whole):
    got = run(tmp_path / "a")
    assert_same(got, whole)
    assert_same(run_folder.load_program(tmp_path / "a", "toy"), whole)
    run(tmp_path / "b")
    a, b = (tmp_path / x / "raw" / "toy.npz" for x in "ab")
    assert a.read_bytes() == b.read_bytes()
    assert not (tmp_path / "a" / "checkpoints" / "toy").exists()


def test_finished_program_does_not_run_again(tmp_path, whole, copied):
    run(tmp_path)
    # As if it had been killed before it could remove its checkpoints.
    shutil.move(copied / "checkpoints", tmp_path / "checkpoints")

    def never(*_):
        raise AssertionError("ran again")

    again = PROGRAM._replace(init=never, step=never)
    assert_same(run(tmp_path, program=again), whole)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("chunks", [1, 4, 8])
def test_interrupted_run_ends_bit_identical(tmp_path, whole, save_always, chunks):
    interrupt(tmp_path, chunks)
    recorder = Recorder()
    assert_same(run(tmp_path, recorder), whole)
    assert any("goes on from task" in line for line in recorder.lines) == (chunks > 0)


def newest(folder):
    return checkpoints._saved(folder / "checkpoints" / "toy")[0]


def largest_state_file(checkpoint):
    files = [p for p in (checkpoint / "state").rglob("*") if p.is_file()]
    return max(files, key=lambda p: p.stat().st_size)


def truncate(checkpoint):
    path = largest_state_file(checkpoint)
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(checkpoint):
    path = largest_state_file(checkpoint)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def foreign(checkpoint):
    path = checkpoint / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["fingerprint"]["config_hash"] = "of another config"
    path.write_text(json.dumps(manifest))


DAMAGES = {
    "truncated": (truncate, "bytes, not"),
    "bit flipped": (flip_a_bit, "has changed"),
    "file deleted": (lambda c: largest_state_file(c).unlink(), "is missing"),
    "state deleted": (lambda c: shutil.rmtree(c / "state"), "is missing"),
    "metrics deleted": (lambda c: (c / "metrics.npz").unlink(), "is missing"),
    "manifest deleted": (lambda c: (c / "manifest.json").unlink(), "manifest is miss"),
    "manifest empty": (lambda c: (c / "manifest.json").write_text(""), "damaged"),
    "manifest odd": (lambda c: (c / "manifest.json").write_text("[1]"), "damaged"),
    "foreign": (foreign, "belongs to another run .*config_hash"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_named_and_the_one_before_used(whole, copied, damage):
    hurt, message = DAMAGES[damage]
    bad = newest(copied)
    hurt(bad)
    recorder = Recorder()
    assert_same(run(copied, recorder), whole)
    text = "\n".join(recorder.lines)
    assert f"warning: checkpoint {bad} is not used" in text
    assert re.search(message, text)
    assert "goes on from task" in text


def test_all_checkpoints_damaged_starts_from_the_beginning(whole, copied, save_always):
    for checkpoint in checkpoints._saved(copied / "checkpoints" / "toy"):
        truncate(checkpoint)
    recorder = Recorder()
    assert_same(run(copied, recorder), whole)
    assert sum("is not used" in line for line in recorder.lines) == checkpoints.KEPT
    assert not any("goes on" in line for line in recorder.lines)


def test_checkpoint_of_other_lanes_is_not_used(copied):
    data, lanes = toy.inputs([0.05, 0.02], 3)
    recorder = Recorder()
    engine.run_program(
        PROGRAM,
        data,
        lanes,
        chunk_steps=4,
        folder=copied,
        progress=recorder,
    )
    assert any("another run (lanes:" in line for line in recorder.lines)


def test_damaged_results_are_named_and_made_again(tmp_path, whole):
    run(tmp_path)
    path = tmp_path / "raw" / "toy.npz"
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)
    recorder = Recorder()
    assert_same(run(tmp_path, recorder), whole)
    assert any("toy.npz is damaged" in line for line in recorder.lines)


def test_only_the_newest_two_checkpoints_are_kept(tmp_path, save_always):
    interrupt(tmp_path, 7)
    assert len(checkpoints._saved(tmp_path / "checkpoints" / "toy")) == 2


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["state", "files"])
def test_full_disk_names_the_folder_and_loses_nothing(
    whole, copied, save_always, monkeypatch, where
):
    before = newest(copied)
    with monkeypatch.context() as patch:
        if where == "state":
            # Orbax wraps what the operating system says.
            def wrapped(*_):
                raise ValueError("RESOURCE_EXHAUSTED: No space left on device")

            patch.setattr(checkpoints.orbax(), "save", wrapped)
        else:
            patch.setattr(os, "fsync", full_disk)
        with pytest.raises(run_folder.RunError, match="no space left") as error:
            run(copied)
    assert str(copied) in str(error.value)
    assert newest(copied) == before
    assert not list(copied.rglob(".partial-*"))
    recorder = Recorder()
    assert_same(run(copied, recorder), whole)
    assert not any("is not used" in line for line in recorder.lines)


def test_failed_write_keeps_the_file_that_was_there(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    run_folder.write_atomic(path, "old")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(run_folder.RunError, match="no space left"):
        run_folder.write_atomic(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["results.json"]


def test_checkpoints_take_a_small_share_of_the_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(engine.time, "monotonic", lambda: now[0])
    clock = engine._CheckpointClock()
    saving = 0.0
    while now[0] < 1000.0:
        now[0] += 0.3
        if clock.due():
            with clock:
                now[0] += 0.5
                saving += 0.5
    assert 0.02 < saving / now[0] < 0.05


def test_divergence_is_told(tmp_path):
    data, lanes = toy.inputs([0.05, 1e30], 1)
    recorder = Recorder()
    engine.run_program(
        PROGRAM,
        data,
        lanes,
        chunk_steps=4,
        folder=tmp_path,
        progress=recorder,
    )
    text = "warning: toy: evaluate/loss is not finite in lane(s) 1"
    assert text in recorder.lines


def test_carry_may_hold_keys_half_precision_and_nothing(tmp_path, save_always):
    def init(data, lane):
        return {"x": lane["x"], "same": lane["x"], "key": lane["key"], "none": None}

    def step(data, lane, carry, task, index):
        noise = jax.random.normal(jax.random.fold_in(carry["key"], index), (4,))
        x = carry["x"] + noise.astype(jnp.bfloat16)
        return {**carry, "x": x}, {"x": x}

    program = engine.Program(
        "keys",
        2,
        3,
        init,
        step,
        lambda data, lane, carry, task: (carry, {}),
        lambda data, lane, carry: {},
    )
    lanes = {
        "x": np.ones((3, 4), jnp.bfloat16),
        "key": jax.random.split(jax.random.key(0), 3),
    }
    for folder, stop in (("a", None), ("b", 2), ("b", None)):
        try:
            got = engine.run_program(
                program,
                jnp.zeros(()),
                lanes,
                chunk_steps=2,
                folder=tmp_path / folder,
                progress=Recorder(stop),
            )
        except KeyboardInterrupt:
            assert stop
    assert got.keys() == {"step/x"}
    assert got["step/x"].shape == (3, 2, 3, 4)
    assert got["step/x"].dtype == np.float32
    a, b = (tmp_path / x / "raw" / "keys.npz" for x in "ab")
    assert a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk_steps": 0}, "`chunk_steps` must be a positive integer; got 0"),
        ({"vectorize": "pmap"}, "`vectorize` must be 'map' or 'vmap'; got 'pmap'"),
        ({"program": toy.program("a/b", 3)}, "must be a plain file name; got 'a/b'"),
        ({"program": toy.program("toy", 0)}, "`steps_per_task` must be a positive"),
        ({"lanes": {"a": np.ones(2), "b": np.ones(3)}}, "same leading axis"),
        ({"lanes": {"a": np.ones(())}}, "same leading axis"),
        ({"lanes": {}}, "same leading axis"),
        ({"lanes": {"a": np.ones((0, 2))}}, "same leading axis"),
    ],
)
def test_bad_arguments_are_named(tmp_path, change, message):
    data, lanes = toy.inputs([0.05], 1)
    arguments = {"program": toy.program("toy", 3), "lanes": lanes, "chunk_steps": 2}
    arguments |= change
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        engine.run_program(
            arguments.pop("program"),
            data,
            arguments.pop("lanes"),
            folder=tmp_path,
            **arguments,
        )
    assert not list(tmp_path.iterdir())
