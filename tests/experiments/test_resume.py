"""A real process, killed at random moments: the end is the same, bit for bit."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import toy

ROOT = Path(__file__).parents[2]
FLAGS = ["--seeds", "3", "--steps", "60", "--devices", "2"]


def start(folder, pause):
    return subprocess.Popen(
        [sys.executable, toy.__file__, "run", "toy", "--out", str(folder), *FLAGS],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TOY_PAUSE": str(pause)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(folder):
    process = start(folder, 0)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out, err


def content(folder):
    names = ["results.json", "report.html", "raw/plain.npz", "raw/slow.npz"]
    return {name: (folder / name).read_bytes() for name in names}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "toy"
    finish(folder)
    return content(folder)


def kill_at_random(folder, chance, patience=2.5):
    """Starts the run and kills it; returns whether it was still at work."""
    process = start(folder, 0.15)
    deadline = time.monotonic() + 120
    # Importing takes most of a run's life; the moments that matter come after it.
    while process.poll() is None and time.monotonic() < deadline:
        if process.stderr.readline():
            break
    time.sleep(chance.uniform(0.0, patience))
    at_work = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return at_work


def has_something_to_go_on_from(folder):
    # A folder under another name is one that the kill left half written.
    manifests = [m for m in folder.rglob("manifest.json") if "partial" not in str(m)]
    return bool(manifests) or any(folder.rglob("raw/*.npz"))


@pytest.mark.parametrize(
    "kills", [3, pytest.param(20, marks=pytest.mark.slow)], ids=str
)
def test_killed_run_ends_bit_identical(tmp_path, uninterrupted, kills):
    folder, chance = tmp_path / "toy", random.Random(kills)
    killed = sum(kill_at_random(folder, chance) for _ in range(kills))
    assert killed >= min(kills, 3)
    # On a busy machine every kill may have come before the first checkpoint.
    for patience in range(5, 60, 5):
        if has_something_to_go_on_from(folder):
            break
        kill_at_random(folder, chance, patience)
    _, err = finish(folder)
    assert content(folder) == uninterrupted
    assert not list(folder.rglob(".partial-*"))
    assert "goes on from task" in err or "done before" in err


def test_killed_run_holds_no_lock(tmp_path):
    folder = tmp_path / "toy"
    process = start(folder, 0.15)
    process.stderr.readline()
    second = start(folder, 0)
    _, err = second.communicate(timeout=120)
    process.kill()
    process.communicate()
    assert second.returncode == 2
    assert f"in use by another process (pid {process.pid})" in err
    process = start(folder, 0.15)
    assert "error" not in process.stderr.readline()
    process.kill()
    process.communicate()
