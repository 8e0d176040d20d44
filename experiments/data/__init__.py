"""Text for the studies: a vendored stream, fetched streams, any folder of texts.

``load_stream`` turns the name of a stream, or a folder with one text file per domain,
into byte arrays; ``get`` fetches the streams that are not vendored;
``divergence_matrix`` says how far the domains of a stream lie apart.
"""

from pathlib import Path

from experiments.data import _fetch, _text_tasks
from experiments.data._divergence import divergence_matrix, divergence_table
from experiments.data._errors import DataError
from experiments.data._fetch import FETCHED, cache_dir
from experiments.data._streams import Stream, load_stream
from experiments.data._text_tasks import TextTask, load_text_tasks

__all__ = [
    "FETCHED",
    "DataError",
    "Stream",
    "TextTask",
    "cache_dir",
    "divergence_matrix",
    "divergence_table",
    "get",
    "load_stream",
    "load_text_tasks",
]


def get(name: str) -> Path:
    """Fetches data by name into the cache, unless it is there already.

    Args:
      name: A stream of ``FETCHED``, or ``"text6"``; ``"mini8"`` is vendored and needs
        no fetching.

    Returns:
      The folder that holds it.

    Raises:
      DataError: If the name is unknown, or the download fails.
    """
    return _text_tasks.get() if name == _text_tasks.NAME else _fetch.get(name)
