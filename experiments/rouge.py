"""Rouge-L, how much of a text stands in another in the same order.

References:
  Lin, `ROUGE: A Package for Automatic Evaluation of Summaries
  <https://aclanthology.org/W04-1013>`_, 2004
"""

import re
from collections.abc import Sequence

from experiments import porter

_OTHER = re.compile("[^a-z0-9]+")
_SHORT = 3  # words of so few letters keep their ending


def rouge_l(candidate: str, references: Sequence[str], *, stem: bool = True) -> float:
    """Rouge-L F-measure of a text, against the reference that it matches best.

    With L the length of the longest common subsequence of the words of candidate c and
    reference r, precision is L / |c|, recall L / |r|, and

        F = 2 L / (|c| + |r|)

    their harmonic mean. Time is linear in |c|, for references of one machine word or a
    few.

    Args:
      candidate: The text to score.
      references: Right texts, at least one.
      stem: Whether words of four letters and more count as their stems, as the
        published scores of Super-NaturalInstructions have it.

    Returns:
      The best F, from 0 to 1; zero where either text has no words.

    Raises:
      ValueError: If there are no references.
      TypeError: If they are one string and not a sequence of strings.

    Example:
      >>> rouge_l("The cat sat.", ["the cats sat on a mat", "a dog"])
      0.6666666666666666
      >>> rouge_l("The cat sat.", ["the cats sat on a mat"], stem=False)
      0.4444444444444444
    """
    if isinstance(references, str):
        raise TypeError(
            "`references` must be a sequence of texts; got one string. Give [text]."
        )
    if not references:
        raise ValueError(
            "`references` is empty; a text is scored against at least one."
        )
    ours = words(candidate, stem=stem)
    return max(_f_measure(ours, words(text, stem=stem)) for text in references)


def words(text: str, *, stem: bool = True) -> list[str]:
    """The words of a text: runs of a-z and 0-9 once it is in small letters.

    Args:
      text: Any text; letters with accents and of other scripts part words.
      stem: Whether words of four letters and more are cut to their stems.
    """
    found = [word for word in _OTHER.split(text.lower()) if word]
    if not stem:
        return found
    return [porter.stem(word) if len(word) > _SHORT else word for word in found]


def common_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence.

    Bit j of ``opened`` is set as long as the second text's word j adds nothing to what
    the words of the first so far have in common with the second's beginning. A word of
    the first closes, in each run of open bits that ends with a match, the lowest match:
    one addition carries through all runs at once.
    """
    places: dict[str, int] = {}
    for index, word in enumerate(second):
        places[word] = places.get(word, 0) | 1 << index
    everything = (1 << len(second)) - 1
    opened = everything
    for word in first:
        hits = opened & places.get(word, 0)
        opened = (opened + hits | opened - hits) & everything
    return len(second) - opened.bit_count()


def _f_measure(ours: list[str], theirs: list[str]) -> float:
    if not ours or not theirs:
        return 0.0
    return 2 * common_length(ours, theirs) / (len(ours) + len(theirs))
