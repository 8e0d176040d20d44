"""Text for the studies: a vendored stream, fetched streams, any folder of texts.

``load_stream`` turns the name of a stream, or a folder with one text file per domain,
into byte arrays; ``get`` fetches the streams that are not vendored;
``divergence_matrix`` says how far the domains of a stream lie apart.
"""

from experiments.data._divergence import divergence_matrix, divergence_table
from experiments.data._errors import DataError
from experiments.data._fetch import FETCHED, cache_dir, get
from experiments.data._streams import Stream, load_stream

__all__ = [
    "FETCHED",
    "DataError",
    "Stream",
    "cache_dir",
    "divergence_matrix",
    "divergence_table",
    "get",
    "load_stream",
]
