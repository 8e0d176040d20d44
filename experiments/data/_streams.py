"""Streams of text domains as byte arrays."""

import lzma
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.data import _checksums, _fetch
from experiments.data._errors import DataError

MINI8 = Path(__file__).parent / "mini8"
HELD_OUT = 0.1  # The last tenth of every domain.
MIN_BYTES = 10_000  # Below this the held-out tenth says nothing.


class Stream(NamedTuple):
    """Text domains, in a fixed order that a study may permute.

    Attributes:
      names: One name per domain.
      train: One uint8 array per domain, the first nine tenths of its bytes.
      heldout: One uint8 array per domain, the last tenth.
    """

    names: tuple[str, ...]
    train: tuple[np.ndarray, ...]
    heldout: tuple[np.ndarray, ...]


def load_stream(name_or_dir: str | os.PathLike) -> Stream:
    """Loads a stream by its name, or a folder of text files, one per domain.

    Args:
      name_or_dir: ``"mini8"`` (vendored), ``"aws16"`` or ``"ng16"`` (to be fetched
        with ``get`` first), or the path of a folder. Hidden files in the folder are
        skipped; every other file is a domain named after the file's stem, and domains
        are in alphabetical order.

    Returns:
      The domains, with the last tenth of each held out.

    Raises:
      DataError: If the stream is unknown, has not been fetched, or is damaged; if the
        folder holds fewer than two files, or one that is empty, too short, or not
        text.

    Example:
      >>> stream = load_stream("mini8")
      >>> stream.names[:3]
      ('cloud_docs', 'detective', 'history')
      >>> len(stream.train[0]), len(stream.heldout[0])
      (270000, 30000)
    """
    name = os.fspath(name_or_dir)
    if name == "mini8":
        texts = _read_mini8(MINI8)
    elif name in _fetch.FETCHED:
        texts = read_fetched(name)
    elif Path(name).is_dir():
        texts = _read_folder(Path(name))
    else:
        known = ", ".join(["mini8", *_fetch.FETCHED])
        raise DataError(
            f"There is no stream {name!r}, and no folder of that name. Name one of "
            f"{known}, or a folder that holds one text file per domain."
        )
    return _split(texts)


def _read_mini8(folder: Path) -> dict[str, bytes]:
    remedy = "Restore the file from the repository."
    texts = {}
    for name, expected in _checksums.read_sums(folder).items():
        path = folder / f"{name}.xz"
        try:
            text = lzma.decompress(path.read_bytes())
        except (OSError, lzma.LZMAError) as error:
            raise DataError(f"{path} cannot be read ({error}). {remedy}") from error
        _checksums.check_sum(str(path), text, expected, remedy)
        texts[Path(name).stem] = text
    return texts


def read_fetched(name: str) -> dict[str, bytes]:
    """The checked files of fetched data, by file stem."""
    folder = _fetch.cache_dir() / name
    fetch = f"`python -m experiments data get {name}`"
    if not (folder / _checksums.SUMS).is_file():
        raise DataError(
            f"The data {name!r} have not been fetched (looked in {folder}). Run "
            f"{fetch}."
        )
    remedy = f"Delete {folder} and run {fetch}."
    texts = {}
    for file, expected in _checksums.read_sums(folder).items():
        try:
            text = (folder / file).read_bytes()
        except OSError as error:
            raise DataError(
                f"{folder / file} cannot be read ({error}). {remedy}"
            ) from error
        _checksums.check_sum(str(folder / file), text, expected, remedy)
        texts[Path(file).stem] = text
    return texts


def _read_folder(folder: Path) -> dict[str, bytes]:
    files = sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and not path.name.startswith(".")
    )
    if len(files) < 2:
        raise DataError(
            f"A stream needs at least two domains; the folder {folder} holds "
            f"{len(files)} file(s). Put one text file per domain there."
        )
    texts = {}
    for path in files:
        try:
            text = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error}).") from error
        _check_text(path, text)
        if path.stem in texts:
            raise DataError(
                f"Two files in {folder} have the stem {path.stem!r}, which would name "
                "two domains. Rename one of them."
            )
        texts[path.stem] = text
    return texts


def _check_text(path: Path, text: bytes) -> None:
    if not text:
        raise DataError(f"{path} is empty. Fill it or take it out of the folder.")
    if b"\0" in text:
        raise DataError(
            f"{path} is not text: it holds zero bytes. A stream takes plain text files "
            "(convert UTF-16 to UTF-8; unpack archives)."
        )
    if len(text) < MIN_BYTES:
        raise DataError(
            f"{path} is too short: {len(text)} bytes, at least {MIN_BYTES} are needed "
            "for a training part and a held-out part."
        )


def _split(texts: dict[str, bytes]) -> Stream:
    arrays = [np.frombuffer(text, np.uint8) for text in texts.values()]
    cuts = [len(array) - int(len(array) * HELD_OUT) for array in arrays]
    return Stream(
        names=tuple(texts),
        train=tuple(a[:cut] for a, cut in zip(arrays, cuts, strict=True)),
        heldout=tuple(a[cut:] for a, cut in zip(arrays, cuts, strict=True)),
    )
