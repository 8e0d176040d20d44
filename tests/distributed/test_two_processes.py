"""Two processes train together, save and restore together."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("two_processes.py")
sys.path.insert(0, str(SCRIPT.parent))
import two_processes  # noqa: E402

SECONDS = 120  # a hang ends here; a run takes a tenth of it


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_two_processes_equal_one_and_share_a_checkpoint(tmp_path):
    port = free_port()
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(SCRIPT.parents[2]),
    }
    children = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(port), str(i), str(tmp_path / "saved")],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    expected = two_processes.single()
    try:
        reports = [child.communicate(timeout=SECONDS) for child in children]
    finally:
        for child in children:
            child.kill()
    for child, (out, err) in zip(children, reports, strict=True):
        assert child.returncode == 0, err[-4000:]
        word, norm = out.splitlines()[-1].split()  # the transport prints before
        assert word == "done"
        assert float(norm) == pytest.approx(expected, rel=1e-5)
