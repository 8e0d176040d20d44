"""Writes rouge.json: what Google's rouge-score computes on made-up pairs.

    python make_rouge.py

Needs `rouge-score`, which brings NLTK and its Porter stemmer; the project uses neither.
The file was made with the versions it names.
"""

import json
import random
from importlib.metadata import version
from pathlib import Path

from nltk.stem import porter
from rouge_score import rouge_scorer

# Words for every rule of the stemmer, and for those that just miss one.
WORDS = """
abilities able ably abruptly accident activate adjustable adjustment adoption agreed
allowance anally angularity animated apologies apology apparently at bled caresses cats
caution cease communism conditional conflated conformably controlling decisiveness
defensible dependent depths derivationally died dies dogs doubly dying electrical
electricity eli electriciti exceed failing falling fanaticism feed feudalism filing
fizzed fly flies formality formalize formative fulfil fully goodness happy hesitancy
hissing homologous hopeful hopefully hopefulness hoping hopping howe ideologically ies
inference innings ion irritant knitting liberties lied logic logical logically matting
meeting motoring news nationally oiling oed operator paste plastered playing ponies
predication probate proceed radically rate rational rationally reality replacement
retied rolled roll sang say sensibility singing sized skies sky studied studies succeed
syllogistically syzygy tanned ties tied to trouble troubling tying valency
vietnamization vilely xylem yes yelled yoyoing y2k 007 a1b 4th formally replaced 1990s
""".split()
PAIRS = [
    ("", "nothing to say"),
    ("?!", "..."),
    ("the cat sat on the mat", "the cat sat on the mat"),
    ("The Cat sat.", "the cats sat on a mat"),
    ("don't stop", "do not stop: don't!"),
    ("Füße naïve İstanbul", "fusse naive istanbul"),
    ("snake_case v2.0, e-mail\n\tme", "snake case v2 0 e mail me"),
    ("b a", "a b"),
    ("a a a a", "a a"),
    ("x", "x x x x x x x x"),
]


def main() -> None:
    """Scores the pairs and writes the file beside this one."""
    draw = random.Random(0)
    pairs = list(PAIRS)
    for _ in range(40):
        # Neighbours: few different words, some of one stem, so that they repeat.
        start = draw.randrange(len(WORDS) - 12)
        pool = WORDS[start : start + 12]
        made = [draw.choices(pool, k=draw.randint(1, 80)) for _ in range(2)]
        pairs.append((" ".join(made[0]), " ".join(made[1])))
    stemmer = porter.PorterStemmer()
    scorers = [rouge_scorer.RougeScorer(["rougeL"], use_stemmer=s) for s in (0, 1)]
    reference = {
        "made_with": {name: version(name) for name in ("rouge-score", "nltk")},
        "stems": {word: stemmer.stem(word) for word in WORDS},
        "scores": [
            [ours, theirs, *(s.score(theirs, ours)["rougeL"].fmeasure for s in scorers)]
            for ours, theirs in pairs
        ],
        "several": _several(scorers[1]),
    }
    out = Path(__file__).with_name("rouge.json")
    out.write_text(json.dumps(reference, ensure_ascii=False) + "\n", encoding="utf-8")


def _several(scorer):
    candidate = "she was looking for her keys"
    references = ["the keys", "She looked for her key.", "looking, she was lost"]
    best = scorer.score_multi(references, candidate)["rougeL"].fmeasure
    return [candidate, references, best]


if __name__ == "__main__":
    main()
