"""How far the domains of a stream lie apart."""

from collections.abc import Sequence

import numpy as np

from experiments.data._streams import Stream

PREFIX = 300_000  # Bytes of each domain that are compared.


def divergence_matrix(stream: Stream) -> np.ndarray:
    """Jensen-Shannon divergences, in bits, of byte-trigram distributions.

    With p and q the trigram frequencies of two domains, m their mean and H the
    entropy, ``JS = H(m) - (H(p) + H(q)) / 2``: 0 for equal distributions, 1 for
    disjoint ones. The first 300,000 bytes of each domain are compared.

    Args:
      stream: ``n`` domains.

    Returns:
      A symmetric float64 array ``[n, n]`` with zeros on the diagonal.
    """
    texts = [
        np.concatenate([train, heldout])[:PREFIX]
        for train, heldout in zip(stream.train, stream.heldout, strict=True)
    ]
    frequencies = [_trigrams(text) for text in texts]
    n = len(texts)
    result = np.zeros((n, n))
    for i in range(n):
        for j in range(i):
            result[i, j] = result[j, i] = _js(frequencies[i], frequencies[j])
    return result


def divergence_table(names: Sequence[str], divergences: np.ndarray) -> str:
    """The divergences as a Markdown table, with mean and extremes below it."""
    n = len(names)
    head = "| bits | " + " | ".join(names) + " |"
    rows = [
        f"| {names[i]} | " + " | ".join(f"{d:.2f}" for d in divergences[i]) + " |"
        for i in range(n)
    ]
    rule = "|---" * (n + 1) + "|"
    lower = np.tril_indices(n, -1)
    pairs = divergences[lower]

    def pair(index: int) -> str:
        return (
            f"{pairs[index]:.2f} ({names[lower[0][index]]}, {names[lower[1][index]]})"
        )

    least, most = pair(int(pairs.argmin())), pair(int(pairs.argmax()))
    summary = f"Mean {pairs.mean():.2f}, least {least}, most {most}."
    return "\n".join([head, rule, *rows, "", summary])


def _trigrams(text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes of the trigrams that occur, ascending, and their frequencies."""
    wide = text.astype(np.int64)
    codes = wide[:-2] << 16 | wide[1:-1] << 8 | wide[2:]
    found, counts = np.unique(codes, return_counts=True)
    return found, counts / counts.sum()


def _js(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> float:
    _, place = np.unique(np.concatenate([a[0], b[0]]), return_inverse=True)
    mean = np.bincount(place, np.concatenate([a[1], b[1]])) / 2
    return _entropy(mean) - (_entropy(a[1]) + _entropy(b[1])) / 2


def _entropy(p: np.ndarray) -> float:
    return float(-(p * np.log2(p)).sum())
