"""Porter's stemmer for English words, with the additions of NLTK.

With ``c`` a consonant and ``v`` a vowel, every word has the shape ``[c](vc)^m[v]``, in
which a letter stands for a run of it; m is its *measure*. Five steps take endings off,
as long as what is left has measure enough to be a stem.

References:
  Porter, `An algorithm for suffix stripping
  <https://doi.org/10.1108/eb046814>`_, 1980

  Bird et al., `Natural Language Processing with Python <https://www.nltk.org>`_, 2009
"""

from collections.abc import Callable
from functools import lru_cache

_IRREGULAR = {
    form: stem
    for stem, forms in {
        "sky": "sky skies",
        "die": "dying",
        "lie": "lying",
        "tie": "tying",
        "news": "news",
        "inning": "innings inning",
        "outing": "outings outing",
        "canning": "cannings canning",
        "howe": "howe",
        "proceed": "proceed",
        "exceed": "exceed",
        "succeed": "succeed",
    }.items()
    for form in forms.split()
}
_SECOND = {
    "ational": "ate",
    "tional": "tion",
    "enci": "ence",
    "anci": "ance",
    "izer": "ize",
    "bli": "ble",
    "alli": "al",
    "entli": "ent",
    "eli": "e",
    "ousli": "ous",
    "ization": "ize",
    "ation": "ate",
    "ator": "ate",
    "alism": "al",
    "iveness": "ive",
    "fulness": "ful",
    "ousness": "ous",
    "aliti": "al",
    "iviti": "ive",
    "biliti": "ble",
    "fulli": "ful",
}
_THIRD = {
    "icate": "ic",
    "ative": "",
    "alize": "al",
    "iciti": "ic",
    "ical": "ic",
    "ful": "",
    "ness": "",
}
_FOURTH: dict[str, str] = dict.fromkeys(
    "al ance ence er ic able ible ant ement ment ent ion ou ism ate iti ous ive "
    "ize".split(),
    "",
)


@lru_cache(maxsize=1 << 16)
def stem(word: str) -> str:
    """The stem of a word of small letters; those of one or two letters are their own.

    Example:
      >>> [stem(word) for word in ("relational", "hopping", "flies", "sky")]
      ['relat', 'hop', 'fli', 'sky']
    """
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if len(word) <= 2:
        return word
    for step in (_plural, _past, _last_y, _second, _third, _fourth, _last_e, _last_l):
        word = step(word)
    return word


def _shape(word: str) -> str:
    """``c`` or ``v`` for each letter; y is a vowel behind a consonant."""
    shape = ""
    for letter in word:
        vowel = letter in "aeiou" or (letter == "y" and shape.endswith("c"))
        shape += "v" if vowel else "c"
    return shape


def _measure(word: str) -> int:
    return _shape(word).count("vc")


def _is_short(word: str) -> bool:
    """Ends like "hop", or is like "at": an e behind it belongs to it."""
    shape = _shape(word)
    return (shape.endswith("cvc") and word[-1] not in "wxy") or shape == "vc"


def _replace(
    word: str, endings: dict[str, str], fits: Callable[[str, str], bool]
) -> str:
    """The longest ending that the word has goes, if the rest and it fit."""
    found = [ending for ending in endings if word.endswith(ending)]
    if not found:
        return word
    ending = max(found, key=len)
    rest = word.removesuffix(ending)
    return rest + endings[ending] if fits(rest, ending) else word


def _plural(word):
    if word.endswith("ies"):
        return word[:-1] if len(word) == 4 else word[:-2]
    if word.endswith("sses"):
        return word[:-2]
    return word if word.endswith("ss") else word.removesuffix("s")


def _past(word):
    if word.endswith("ied"):
        return word[:-1] if len(word) == 4 else word[:-2]
    if word.endswith("eed"):
        return word[:-1] if _measure(word[:-3]) > 0 else word
    for ending in ("ed", "ing"):
        rest = word.removesuffix(ending)
        if rest != word and "v" in _shape(rest):
            return _whole_again(rest)
    return word


def _whole_again(word):
    """What "-ed" or "-ing" left: "hopp" is "hop", "fil" is "file"."""
    if word.endswith(("at", "bl", "iz")):
        return word + "e"
    if word[-2:-1] == word[-1] and _shape(word)[-1] == "c":
        return word if word[-1] in "lsz" else word[:-1]
    return word + "e" if _measure(word) == 1 and _is_short(word) else word


def _last_y(word):
    rest = word.removesuffix("y")
    behind = len(rest) > 1 and _shape(rest).endswith("c")
    return rest + "i" if rest != word and behind else word


def _second(word):
    if word.endswith("logi"):
        return word[:-1] if _measure(word[:-3]) > 0 else word
    shorter = _replace(word, _SECOND, lambda rest, _: _measure(rest) > 0)
    # "-ationally" has lost "-ly" now, and is an "-ational".
    return _second(shorter) if shorter != word and word.endswith("alli") else shorter


def _third(word):
    return _replace(word, _THIRD, lambda rest, _: _measure(rest) > 0)


def _fourth(word):
    def fits(rest, ending):
        behind = ending != "ion" or rest.endswith(("s", "t"))
        return _measure(rest) > 1 and behind

    return _replace(word, _FOURTH, fits)


def _last_e(word):
    rest = word.removesuffix("e")
    measure = _measure(rest)
    goes = measure > 1 or (measure == 1 and not _is_short(rest))
    return rest if goes else word


def _last_l(word):
    return word[:-1] if word.endswith("ll") and _measure(word[:-1]) > 1 else word
