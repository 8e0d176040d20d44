"""Text and a model for the studies, vendored, fetched, or from a folder of texts.

``load_stream`` turns the name of a stream, or a folder with one text file per domain,
into byte arrays; ``get`` fetches what is not vendored; ``model_file`` names the file of
a fetched model; ``divergence_matrix`` says how far the domains of a stream lie apart.
"""

from pathlib import Path

from experiments.data import _fetch, _text_tasks
from experiments.data._divergence import divergence_matrix, divergence_table
from experiments.data._errors import DataError
from experiments.data._fetch import FETCHED, cache_dir
from experiments.data._models import MODELS, get_model, model_file
from experiments.data._published_orders import published_orders
from experiments.data._streams import Stream, load_stream
from experiments.data._task import TextTask
from experiments.data._text_tasks import load_text_tasks

__all__ = [
    "FETCHED",
    "MODELS",
    "DataError",
    "Stream",
    "TextTask",
    "cache_dir",
    "divergence_matrix",
    "divergence_table",
    "get",
    "load_stream",
    "load_text_tasks",
    "model_file",
    "published_orders",
]


def get(name: str) -> Path:
    """Fetches data by name into the cache, unless it is there already.

    Args:
      name: A stream of ``FETCHED``, a model of ``MODELS``, or ``"text6"``; ``"mini8"``
        is vendored and needs no fetching.

    Returns:
      The folder that holds it.

    Raises:
      DataError: If the name is unknown, or the download fails.
    """
    if name in MODELS:
        return get_model(name)
    if name == _text_tasks.NAME:
        return _text_tasks.get()
    if name in ("mini8", *FETCHED):
        return _fetch.get(name)
    known = ", ".join([*FETCHED, _text_tasks.NAME, *MODELS])
    raise DataError(
        f"There are no data {name!r} to fetch; there are {known} (mini8 is vendored "
        "and needs no fetching)."
    )
