"""Orders in which others have learnt the tasks of a benchmark.

References:
  Zhao et al., `SAPT: A Shared Attention Framework for Parameter-Efficient Continual
  Learning of Large Language Models <https://arxiv.org/abs/2401.08295>`_, 2024; orders 1
  and 2 (SuperNI), 3 and 4 (Long Sequence), from the scripts of its authors
"""

from collections.abc import Sequence

from experiments.data._errors import DataError

# Tasks by the beginning of their names.
_SUPERNI = tuple(
    tuple(f"task{number}_" for number in numbers.split())
    for numbers in (
        "1572 363 1290 181 002 1510 639 1729 073 1590 748 511 591 1687 875",
        "748 073 1590 639 1572 1687 591 363 1510 1729 181 511 002 1290 875",
    )
)
_LONG = tuple(
    tuple(names.split())
    for names in (
        "mnli cb wic copa qqp boolq rte imdb yelp amazon sst2 dbpedia agnews multirc "
        "yahoo",
        "yelp amazon mnli cb copa qqp rte imdb sst2 dbpedia agnews yahoo multirc boolq "
        "wic",
    )
)


def published_orders(names: Sequence[str]) -> list[list[int]]:
    """Indices of the tasks in each published order; what is not there is skipped.

    Args:
      names: The tasks there are.

    Raises:
      DataError: If one of them is in no published order, or they are of two benchmarks.
    """
    for orders in (_SUPERNI, _LONG):
        found = [_places(order, names) for order in orders]
        if all(len(order) == len(names) for order in found):
            return found
    raise DataError(
        "there is no published order of these tasks; published are those of SuperNI "
        f"({len(_SUPERNI[0])} tasks) and Long_Sequence ({len(_LONG[0])}). Got "
        f"{', '.join(names)}."
    )


def _places(order, names):
    def fits(name, start):
        return name.startswith(start) if start.endswith("_") else name == start

    return [i for start in order for i, name in enumerate(names) if fits(name, start)]
