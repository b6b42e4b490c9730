"""SQuAD's exact match and F1, as the official scripts define them; where no word is left, as that of SQuAD 2.0 does."""

import math
import random
import string

import pytest

from topk_experiments.qa.tasks.scores import exact_match, f1, mean_and_error, normalised


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The Panthers", "panthers"),
        ("a  few\tgood\nmen", "few good men"),
        ("an apple", "apple"),
        ("U.S.", "us"),
        ("Theatre", "theatre"),  # articles are whole words
        ("the-the", "thethe"),  # punctuation goes before articles, and leaves no space
        ("6½ sacks", "6½ sacks"),
        ("«Été»", "«été»"),  # ASCII punctuation alone
        ("The", ""),
        ("", ""),
    ],
)
def test_an_answer_is_compared_in_lower_case_without_punctuation_articles_and_extra_spaces(answer, expected):
    assert normalised(answer) == expected


def test_all_of_ascii_punctuation_is_left_out():
    assert normalised(f"x{string.punctuation}y") == "xy"


@pytest.mark.parametrize(
    ("prediction", "answers", "exact", "overlap"),
    [
        # one right answer among several is enough
        ("Denver Broncos", ["Carolina Panthers", "the Denver Broncos!"], 1.0, 1.0),
        # precision 2/4, recall 2/2
        ("gold coins and silver", ["gold silver"], 0.0, 2 * 0.5 / 1.5),
        # repeated words count as often as both sides have them: 2 common of 3 and 2
        ("ping ping ping", ["ping ping"], 0.0, 0.8),
        ("blue", ["red"], 0.0, 0.0),
        # no word left on either side: right if on both
        ("the", ["a"], 1.0, 1.0),
        ("", ["red"], 0.0, 0.0),
        ("red", [""], 0.0, 0.0),
    ],
)
def test_exact_match_and_f1(prediction, answers, exact, overlap):
    assert exact_match(prediction, answers) == exact
    assert f1(prediction, answers) == pytest.approx(overlap)


def test_examples_published_with_the_official_script_come_out_as_published():
    """Those of the `evaluate` library's pages on squad and squad_v2; torchmetrics documents the first."""
    for prediction, published in (("1976", 1.0), ("1999", 0.0)):
        assert exact_match(prediction, ["1976"]) == f1(prediction, ["1976"]) == published
    pairs = [("1976", ["1976"]), ("Beyonce", ["Beyoncé and Bruno Mars"]), ("climate change", ["climate change"])]
    for score in (exact_match, f1):
        assert 100 * mean_and_error([score(*pair) for pair in pairs]).value == pytest.approx(66.66666666666667)


def test_scores_are_those_of_torchmetrics():
    squad = pytest.importorskip("torchmetrics.functional.text").squad
    draw = random.Random(0)
    words = (
        "the The AN a theatre the-the U.S. 1976 red Red hat hats É été «x» ß SS naïve ½ … “q” don't !! (a) a. 日本 _"
    )
    words = [*words.split(), "\N{NO-BREAK SPACE}", "a\N{COMBINING ACUTE ACCENT}", ""]

    def text():
        return draw.choice([" ", "  ", "\t"]).join(draw.choices(words, k=draw.randint(0, 5)))

    seen = set()
    for _ in range(400):
        answers = [text() for _ in range(draw.randint(1, 4))]
        near = draw.choice(answers)
        prediction = draw.choice([text(), near, near.upper(), f"the {near}.", f"{near} hat"])
        target = {"answers": {"answer_start": [0] * len(answers), "text": answers}, "id": "0"}
        theirs = squad([{"prediction_text": prediction, "id": "0"}], [target])
        ours = {"exact_match": 100 * exact_match(prediction, answers), "f1": 100 * f1(prediction, answers)}
        assert ours == pytest.approx({name: score.item() for name, score in theirs.items()}, rel=1e-6)
        seen.add("partly" if 0 < ours["f1"] < 100 else ours["exact_match"])
    assert seen == {0.0, 100.0, "partly"}


def test_the_better_of_two_answers_counts_for_each_score_by_itself():
    assert f1("in March 1776", ["1776", "in March"]) == pytest.approx(0.8)


def test_without_an_answer_there_is_no_score():
    with pytest.raises(ValueError, match="answers must hold at least one answer, got none"):
        exact_match("x", [])


def test_the_error_of_a_share_is_that_of_the_binomial_distribution():
    mean = mean_and_error([1.0] * 30 + [0.0] * 70)
    assert mean.value == pytest.approx(0.3)
    assert mean.error == pytest.approx(math.sqrt(0.3 * 0.7 / 99))


def test_one_question_has_no_error_and_none_no_mean():
    assert math.isnan(mean_and_error([1.0]).error)
    with pytest.raises(ValueError, match="values must hold at least one number, got none"):
        mean_and_error([])
