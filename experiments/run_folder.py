"""The folder of one run: its files, written atomically, and who may write there.

::

    <folder>/config.json      study, config, versions, devices, hash of the config
    <folder>/results.json     what the study measured, as plain numbers
    <folder>/raw/*.npz        every per-step curve and every evaluation matrix
    <folder>/tables/*.md      <folder>/figures/*.{png,svg}      <folder>/report.html
    <folder>/checkpoints/     only while a program is unfinished
    <folder>/lock             held, with the process id inside, while somebody writes

A file appears under its name only when it is whole: it is written beside, flushed to
the disk and renamed. Arrays and JSON are byte-for-byte functions of their content, so
that two runs can be compared with ``cmp``.
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import io
import json
import math
import os
import shutil
import sys
import zipfile
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import cores

_PACKAGES = ("jax", "jaxlib", "optax", "flax", "numpy", "orbax-checkpoint")
_TEMPORARY = ".partial-"


class RunError(Exception):
    """A fault the user can mend; the command line shows it as one line."""


def is_disk_full(error: BaseException) -> bool:
    """Whether an error, however wrapped, comes from a full disk or quota."""
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return True
    text = str(error)
    if "No space left on device" in text or "Disk quota exceeded" in text:
        return True
    cause = error.__cause__ or error.__context__
    return cause is not None and is_disk_full(cause)


def disk_full_error(folder: Path) -> RunError:
    """The error shown when ``folder`` cannot take what should be written."""
    return RunError(
        f"no space left on the disk that holds {folder}: what was written before is "
        "whole and kept; free some space and give the same command again to go on."
    )


def write_atomic(path: Path, content: bytes | str) -> None:
    """Writes a whole file or, on any fault, leaves what was there.

    Raises:
      RunError: if the disk is full.
    """
    path = Path(path)
    content = content.encode() if isinstance(content, str) else content
    partial = path.with_name(f"{_TEMPORARY}{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        if is_disk_full(error):
            raise disk_full_error(path.parent) from error
        raise


def sync_folder(folder: Path) -> None:
    """Makes the names in ``folder`` as durable as the files behind them."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def temporary_name(path: Path) -> Path:
    """A name beside ``path`` that a later start recognises as unfinished."""
    return path.with_name(f"{_TEMPORARY}{os.getpid()}-{path.name}")


def remove_unfinished(folder: Path) -> None:
    """Deletes what an interrupted write left; only for the holder of the lock."""
    for path in sorted(folder.rglob(f"{_TEMPORARY}*")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def plain(value: Any) -> Any:
    """Turns arrays, tuples and dataclasses into JSON's types; non-finite into None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, np.ndarray | jax.Array):
        return plain(np.asarray(value).tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Path):
        return str(value)
    return value


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` as JSON (see ``plain``), atomically."""
    text = json.dumps(plain(value), indent=2, sort_keys=True, allow_nan=False)
    write_atomic(path, text + "\n")


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
      RunError: if it is missing or not JSON.
    """
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise RunError(f"{path} does not exist; is this the folder of a run?") from None
    except (ValueError, OSError) as error:
        raise RunError(f"{path} is damaged or unreadable: {error}") from None


def read_config(folder: Path, config_class: type) -> Any:
    """The config that a run was made with.

    Args:
      folder: the run folder.
      config_class: the study's dataclass; JSON's lists become its tuples.
    """
    saved = read_record(folder)["config"]
    return config_class(
        **{k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}
    )


def read_record(folder: Path) -> dict[str, Any]:
    """The content of a run folder's ``config.json``.

    Raises:
      RunError: if it is missing or does not describe a run.
    """
    path = Path(folder) / "config.json"
    record = read_json(path)
    kinds = {"study": str, "config": dict, "config_hash": str}
    if not isinstance(record, dict) or not all(
        isinstance(record.get(name), kind) for name, kind in kinds.items()
    ):
        raise RunError(f"{path} does not describe a run; start a new one with --out.")
    return record


def arrays_to_bytes(arrays: Mapping[str, np.ndarray]) -> bytes:
    """An ``.npz`` whose bytes depend on the arrays alone (no time stamps)."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(arrays):
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            with archive.open(entry, "w", force_zip64=True) as file:
                array = np.asarray(arrays[name])
                # `ascontiguousarray` would turn a scalar into a vector.
                array = array if array.ndim == 0 else np.ascontiguousarray(array)
                np.lib.format.write_array(file, array, allow_pickle=False)
    return buffer.getvalue()


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays as an ``.npz``, atomically."""
    write_atomic(path, arrays_to_bytes(arrays))


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """Reads an ``.npz``; each entry's checksum is verified on the way.

    Raises:
      RunError: if the file is missing or damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise RunError(f"{path} does not exist; resume the run first.") from None
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise RunError(f"{path} is damaged: {error}") from error


def load_program(folder: Path, name: str) -> dict[str, np.ndarray]:
    """The saved results of one program, for a study's report.

    Args:
      folder: the run folder.
      name: the program's name.

    Returns:
      What ``run_program`` returned.
    """
    arrays = load_arrays(Path(folder) / "raw" / f"{name}.npz")
    return {k: v for k, v in arrays.items() if not k.startswith("_")}


def config_hash(study: str, config: Any) -> str:
    """A short name for a study with all its settings."""
    text = json.dumps({"study": study, "config": plain(config)}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def environment() -> dict[str, Any]:
    """Versions and devices, as recorded in ``config.json``."""
    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "versions": versions,
        # What XLA splits sums by on a CPU: it can move the last bits.
        "threads": int(os.environ.get("NPROC") or cores.count()),
        "platform": jax.default_backend(),
        "device_count": jax.device_count(),
        "device_kind": jax.devices()[0].device_kind,
    }


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds ``folder`` for this process; the system lets go if the process dies.

    Raises:
      RunError: if another process holds it.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        if is_disk_full(error):
            raise disk_full_error(folder) from error
        raise RunError(f"cannot write into {folder}: {error.strerror}") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(handle, 32).decode(errors="replace").strip()
            raise RunError(
                f"{folder} is in use by another process (pid {owner or 'unknown'}); "
                "wait until it ends, or choose another --out."
            ) from None
        # The pid is only for the message above; a full disk must not stop a report.
        with contextlib.suppress(OSError):
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One phrase per setting that is not the same in two configs."""
    missing = "(absent)"
    return [
        f"{name}: {old.get(name, missing)!r} there, {new.get(name, missing)!r} here"
        for name in sorted(set(old) | set(new))
        if old.get(name, missing) != new.get(name, missing)
    ]


def open_run(folder: Path, study: str, config: Any) -> list[str]:
    """Starts a run in ``folder``, or finds that it may go on there.

    Args:
      folder: the run folder, locked by the caller.
      study: the study's name.
      config: its settings, a dataclass.

    Returns:
      Warnings to show (for instance: other package versions than at the start).

    Raises:
      RunError: if the folder belongs to another study, another config or another number
        or kind of devices, or holds files that are not those of a run.
    """
    folder = Path(folder)
    here, settings = environment(), plain(config)
    path = folder / "config.json"
    if not path.exists():
        known = {"lock"}
        foreign = [
            p.name
            for p in folder.iterdir()
            if p.name not in known and not p.name.startswith(_TEMPORARY)
        ]
        if foreign:
            raise RunError(
                f"{folder} holds files but no config.json ({sorted(foreign)[0]}, ...); "
                "choose an empty or a new folder with --out."
            )
        record = {"study": study, "config": settings, **here}
        write_json(path, {**record, "config_hash": config_hash(study, config)})
        return []
    there = read_record(folder)
    if there["study"] != study:
        raise RunError(
            f"{folder} holds a run of the study {there['study']!r}, not of "
            f"{study!r}; choose another --out."
        )
    if there["config_hash"] != config_hash(study, config):
        phrases = differences(there["config"], settings)
        raise RunError(
            f"{folder} holds a run with another config "
            f"({'; '.join(phrases) or 'config.json was edited'}); choose another "
            f"--out, or go on with that run: `resume {folder}`."
        )
    check_devices(folder, there, here)
    old, new = (
        {**x.get("versions", {}), "threads": x.get("threads")} for x in (there, here)
    )
    return [
        f"{phrase}; results may differ in the last bits from an uninterrupted run"
        for phrase in differences(old, new)
    ]


def check_devices(
    folder: Path, there: Mapping[str, Any], here: Mapping[str, Any]
) -> None:
    """Refuses to go on with other devices, which would change the last bits."""
    then = (there.get("device_count"), there.get("platform"))
    now = (here["device_count"], here["platform"])
    if then != now:
        raise RunError(
            f"{folder} was started on {then[0]} {then[1]} device(s), but here are "
            f"{now[0]} {now[1]}: the result would not be that of an uninterrupted run; "
            f"go on with `--devices {then[0]}` (CPU) or start a new folder with --out."
        )
