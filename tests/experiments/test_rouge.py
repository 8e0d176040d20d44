"""Rouge-L: frozen figures of rouge-score, hand-computed ones, and properties."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments import porter, rouge

REFERENCE = json.loads(
    Path(__file__).with_name("reference").joinpath("rouge.json").read_text("utf-8")
)
TEXTS = st.lists(st.sampled_from("abcd"), max_size=80)


def test_stems_are_those_of_nltk():
    stems = REFERENCE["stems"]
    assert {word: porter.stem(word) for word in stems} == stems


@pytest.mark.parametrize("stem", [False, True])
def test_scores_are_those_of_rouge_score(stem):
    for ours, theirs, *expected in REFERENCE["scores"]:
        score = rouge.rouge_l(ours, [theirs], stem=stem)
        np.testing.assert_allclose(score, expected[stem], atol=1e-12, err_msg=ours)


def test_the_frozen_scores_tell_stems_from_words():
    plain, stemmed = np.array([row[2:] for row in REFERENCE["scores"]]).T
    assert (stemmed > plain).sum() > 10


def test_the_best_of_several_references_counts():
    candidate, references, expected = REFERENCE["several"]
    np.testing.assert_allclose(rouge.rouge_l(candidate, references), expected)
    assert rouge.rouge_l(candidate, references[:1]) < expected


def test_a_score_by_hand():
    # Common: "the", "sat", "mat"; 3 of 4 words here, 3 of 6 there.
    score = rouge.rouge_l("the sat mat the", ["the cat sat on a mat"])
    np.testing.assert_allclose(score, 2 * 0.75 * 0.5 / (0.75 + 0.5))


def test_a_word_of_three_letters_keeps_its_ending():
    assert rouge.words("ties bus gas") == ["tie", "bus", "gas"]


@given(TEXTS, TEXTS)
def test_the_common_length_is_that_of_the_table(first, second):
    table = np.zeros([len(first) + 1, len(second) + 1], int)
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            longer = max(table[i, j + 1], table[i + 1, j])
            table[i + 1, j + 1] = table[i, j] + 1 if a == b else longer
    assert rouge.common_length(first, second) == table[-1, -1]


@given(TEXTS, TEXTS)
def test_a_score_does_not_depend_on_which_text_is_the_reference(first, second):
    a, b = " ".join(first), " ".join(second)
    assert rouge.rouge_l(a, [b]) == rouge.rouge_l(b, [a])
    assert rouge.rouge_l(a, [a]) == (1.0 if first else 0.0)


def test_no_references_are_refused():
    with pytest.raises(ValueError, match="`references` is empty"):
        rouge.rouge_l("a", [])


def test_one_string_is_not_a_list_of_references():
    with pytest.raises(TypeError, match="got one string"):
        rouge.rouge_l("a", "a b")
