"""Counting cores where the system has no affinity, as macOS has none."""

import os
from pathlib import Path

import pytest

from experiments import cli, cores, run_folder

ROOT = Path(__file__).parents[2]


@pytest.fixture
def no_affinity(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    monkeypatch.delenv("NPROC", raising=False)
    monkeypatch.delenv("XLA_FLAGS", raising=False)


def test_without_affinity_the_machines_cores_count(no_affinity):
    assert cores.count() == 7


def test_a_machine_that_does_not_know_its_cores_has_one(no_affinity, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cores.count() == 1


def test_affinity_comes_before_the_machines_cores(no_affinity, monkeypatch):
    asked = []
    give = lambda pid: asked.append(pid) or {0, 5}  # noqa: E731
    monkeypatch.setattr(os, "sched_getaffinity", give, raising=False)
    assert cores.count() == 2
    assert asked == [0]  # this process


def test_a_run_starts_and_is_recorded_without_affinity(no_affinity):
    cli.make_devices(None)
    assert run_folder.environment()["threads"] == 7


def test_nobody_else_asks_for_the_affinity():
    files = [
        p for room in ("experiments", "benchmarks") for p in (ROOT / room).rglob("*.py")
    ]
    asking = [p.name for p in files if "sched_getaffinity" in p.read_text()]
    assert asking == ["cores.py"]
