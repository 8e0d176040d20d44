"""Checkpoints of a program: Orbax for the carry, a manifest against damage.

::

    <root>/00000123/state/         the carry, saved by Orbax
    <root>/00000123/metrics.npz    everything recorded so far
    <root>/00000123/manifest.json  fingerprint of the run; size and SHA-256 of each file

A checkpoint is built under a temporary name and renamed, so a kill leaves either all of
it or nothing. On restore every file is held against the manifest; the newest checkpoint
that is whole and belongs to this very run is used.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import run_folder

KEPT = 2


class Snapshot(NamedTuple):
    """A program between two chunks of steps."""

    task: int  # the task being learned
    step: int  # steps of it already taken
    carry: Any  # leaves with a leading (padded) lane axis
    metrics: dict[str, np.ndarray]  # everything recorded so far


def orbax():
    """Orbax, imported where used: listing the studies does not need it."""
    from orbax.checkpoint import v1

    # Its notices would drown the progress line, and it logs the tracebacks of errors
    # that it also raises.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    return v1


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def _saved(root: Path) -> list[Path]:
    """Checkpoints under ``root``, newest first."""
    if not root.is_dir():
        return []
    return sorted((p for p in root.iterdir() if p.name.isdigit()), reverse=True)


def save(
    root: Path, position: int, snapshot: Snapshot, fingerprint: Mapping[str, Any]
) -> None:
    """Writes one checkpoint and drops all but the newest two.

    Args:
      root: folder of this program's checkpoints.
      position: a number that grows with progress; names the checkpoint.
      snapshot: what to save.
      fingerprint: plain values that identify the run; compared on restore.

    Raises:
      run_folder.RunError: if the disk is full; the checkpoints before stay.
    """
    final = root / f"{position:08d}"
    building = run_folder.temporary_name(final)
    try:
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        orbax().save(str((building / "state").absolute()), snapshot.carry)
        run_folder.save_arrays(building / "metrics.npz", snapshot.metrics)
        files = {
            str(p.relative_to(building)): [p.stat().st_size, _digest(p)]
            for p in _files(building)
        }
        manifest = {
            "fingerprint": fingerprint,
            "task": snapshot.task,
            "step": snapshot.step,
            "files": files,
        }
        for path in _files(building):
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        run_folder.write_json(building / "manifest.json", manifest)
        if final.exists():  # a damaged one that was passed over
            shutil.rmtree(final)
        os.replace(building, final)
        run_folder.sync_folder(root)
    except Exception as error:
        shutil.rmtree(building, ignore_errors=True)
        if run_folder.is_disk_full(error):
            raise run_folder.disk_full_error(root) from error
        raise
    for old in _saved(root)[KEPT:]:
        shutil.rmtree(old, ignore_errors=True)


def _fault(folder: Path, fingerprint: Mapping[str, Any]) -> str | None:
    """Why a checkpoint cannot be used, or None."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        there, files = manifest["fingerprint"], manifest["files"]
        int(manifest["task"]), int(manifest["step"])
        different = run_folder.differences(there, run_folder.plain(fingerprint))
    except FileNotFoundError:
        return "its manifest is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "its manifest is damaged"
    if different:
        return f"it belongs to another run ({'; '.join(different)})"
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file():
            return f"its file {name} is missing"
        if path.stat().st_size != size:
            return f"its file {name} has {path.stat().st_size} bytes, not {size}"
        if _digest(path) != digest:
            return f"the content of its file {name} has changed"
    return None


def restore(
    root: Path,
    target: Any,
    fingerprint: Mapping[str, Any],
    warn: Callable[[str], None],
) -> Snapshot | None:
    """The newest checkpoint that is whole and belongs to this run.

    Args:
      root: folder of this program's checkpoints.
      target: tree of ``jax.ShapeDtypeStruct`` with shardings, as the carry has them.
      fingerprint: as given to ``save``.
      warn: called with one line for each checkpoint that is passed over.

    Returns:
      The snapshot, or None if there is none to use.
    """
    for folder in _saved(root):
        fault = _fault(folder, fingerprint)
        if fault is None:
            # Whatever the reader stumbles over, an older checkpoint may be sound.
            try:
                carry = orbax().load(str((folder / "state").absolute()), target)
                metrics = run_folder.load_arrays(folder / "metrics.npz")
            except Exception as error:
                fault = f"it cannot be read ({type(error).__name__}: {error})"
            else:
                manifest = json.loads((folder / "manifest.json").read_text())
                return Snapshot(manifest["task"], manifest["step"], carry, metrics)
        warn(f"checkpoint {folder} is not used: {fault}; trying the one before it")
    return None


def drop(root: Path) -> None:
    """Removes a finished program's checkpoints."""
    shutil.rmtree(root, ignore_errors=True)
    with contextlib.suppress(OSError):  # other programs' are still in it
        root.parent.rmdir()
