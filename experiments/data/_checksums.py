"""SHA-256 of files and texts, and folders whose files are all checksummed."""

import hashlib
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from experiments.data._errors import DataError

SUMS = "SHA256SUMS"


def sha256(data: bytes) -> str:
    """Hexadecimal SHA-256 of ``data``."""
    return hashlib.sha256(data).hexdigest()


def read_sums(folder: Path) -> dict[str, str]:
    """Reads ``folder/SHA256SUMS``: file name to checksum, in the file's order."""
    lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    pairs = [line.split(maxsplit=1) for line in lines if line.strip()]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise DataError(
            f"{folder / SUMS} is damaged: it lists no checksums. Delete or restore the "
            "folder."
        )
    return {name: digest for digest, name in pairs}


def check_sum(name: str, data: bytes, expected: str, remedy: str) -> None:
    """Raises unless ``data`` has the checksum ``expected``."""
    found = sha256(data)
    if found != expected:
        raise DataError(
            f"{name} is damaged: its SHA-256 is {found[:16]}..., expected "
            f"{expected[:16]}... {remedy}"
        )


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes ``files`` and their checksums; the folder appears whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".part-") as temporary:
        whole = Path(temporary) / folder.name
        whole.mkdir()
        for name, data in files.items():
            (whole / name).write_bytes(data)
        sums = "".join(f"{sha256(data)}  {name}\n" for name, data in files.items())
        (whole / SUMS).write_text(sums, encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        whole.replace(folder)
