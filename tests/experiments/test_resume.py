"""A real process, killed at random moments: the end is the same, bit for bit."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import run_folder
from tests.experiments import tiny_stream, toy

ROOT = Path(__file__).parents[2]
PAUSE = 0.1  # after each chunk of the toy, where it is to be killed


def start(script, folder, flags, pause=None):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if pause is not None:
        environment["TOY_PAUSE"] = str(pause)
    words = [script.__file__, "run", *flags.split(), "--out", str(folder)]
    return subprocess.Popen(
        [sys.executable, *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return err


def content(folder):
    """What must not depend on kills: all but the lock."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "lock"
    }


def kill(script, folder, flags, pause, patience, until=lambda: True):
    """Starts the run and kills it; returns whether it was still at work."""
    process = start(script, folder, flags, pause)
    # Importing takes most of a run's life; the moments that matter come after it.
    process.stderr.readline()
    while process.poll() is None and not until():
        time.sleep(pause / 5)
    time.sleep(patience)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL


def has_something_to_go_on_from(folder):
    # A folder under another name is one that the kill left half written.
    manifests = [m for m in folder.rglob("manifest.json") if "partial" not in str(m)]
    return bool(manifests) or any(folder.rglob("raw/*.npz"))


def check_kills(script, flags, folder, *, chunks, kills, pause):
    """Kills a run of ``chunks`` chunks so often, lets it end, and compares the end."""
    whole, folder = folder / "whole", folder / "killed"
    uninterrupted = start(script, whole, flags)  # beside the others
    # Every chunk takes a pause, so no kill finds the run at its end; three chunks are
    # for what a kill waits for beside its patience.
    longest = (chunks / kills - 3) * pause
    assert longest > 0
    chance = random.Random(kills)
    # On a busy machine all but the last may come before the first checkpoint.
    reasons = [lambda: True] * (kills - 1)
    reasons += [lambda: has_something_to_go_on_from(folder)]
    killed = [
        kill(script, folder, flags, pause, chance.uniform(0.0, longest), until)
        for until in reasons
    ]
    assert killed == [True] * kills
    err = finish(start(script, folder, flags))
    finish(uninterrupted)
    assert content(folder) == content(whole)
    assert "goes on from task" in err or "done before" in err


@pytest.mark.parametrize(
    ("kills", "chunk_steps", "arms"),
    [(3, 6, "plain"), pytest.param(20, 1, "plain,slow", marks=pytest.mark.slow)],
    ids=["3", "20"],
)
def test_killed_run_ends_bit_identical(tmp_path, kills, chunk_steps, arms):
    steps, programs = 60, len(arms.split(","))
    chunks = programs * toy.TASKS * -(-steps // chunk_steps)
    flags = f"toy --arms {arms} --steps {steps} --chunk-steps {chunk_steps} --devices 2"
    check_kills(toy, flags, tmp_path, chunks=chunks, kills=kills, pause=PAUSE)


@pytest.mark.slow
def test_killed_study_ends_bit_identical(tmp_path):
    """The domain stream: memories, a buffer, meters and the moments of Adam."""
    texts = tiny_stream.write_texts(tmp_path / "texts")
    arms = ("vanilla", "balance-max", "ewc-raw", "agem-shared", "replay-shared")
    domains, per_domain = 3, tiny_stream.STEPS  # chunks of one step
    flags = (
        f"domain_stream --quick --stream {texts} --domains {domains} "
        f"--arms {','.join(arms)} --devices 2"
    )
    chunks = len(arms) * domains * per_domain
    check_kills(tiny_stream, flags, tmp_path, chunks=chunks, kills=1, pause=0.3)


def test_killed_run_holds_no_lock(tmp_path):
    folder, flags = tmp_path / "toy", "toy --steps 60 --devices 2"
    process = start(toy, folder, flags, PAUSE)
    process.stderr.readline()
    in_use = rf"in use by another process \(pid {process.pid}\)"
    with pytest.raises(run_folder.RunError, match=in_use), run_folder.locked(folder):
        pass
    process.kill()
    process.communicate()
    with run_folder.locked(folder):
        pass
