import re

import pytest

from topk_experiments.qa.tasks import QuestionSet
from topk_experiments.qa.tasks.questions import split_by_passage
from topk_experiments.qa.tasks.reading_task import KINDS, Words, make_questions

WORDS = Words(*(tuple(f"{kind}{letter}" for letter in "abcdefgh") for kind in ("who", "thing", "place")))


def fact_about(question):
    """The one sentence that the question's own word stands in."""
    word = re.search(r"(who|thing|place)[a-h]", question.text).group()
    (fact,) = [sentence for sentence in question.passage.split(".") if word in sentence.split()]
    return fact


@pytest.mark.parametrize(("kind", "answer"), [("what", "thing"), ("where", "place"), ("who", "who")])
def test_the_answer_stands_in_the_one_fact_that_is_asked_about(kind, answer):
    for question in make_questions(WORDS, 40, kinds=[kind], facts=(3, 6), forms=3, seed=1):
        assert question.answers[0].startswith(answer)
        assert question.answers[0] in fact_about(question).split()
        assert question.answers[0] not in question.text
        assert 3 <= question.passage.count(".") <= 6


@pytest.mark.parametrize("forms", [1, 2, 3])
def test_facts_are_stated_in_as_many_forms_as_asked_for(forms):
    questions = make_questions(WORDS, 40, kinds=KINDS, facts=(2, 4), forms=forms, seed=1)
    facts = {fact for question in questions for fact in question.passage.split(".")[:-1]}
    assert len({re.sub(r"(who|thing|place)[a-h]", r"\1", fact).strip() for fact in facts}) == forms


def test_questions_depend_on_the_seed_alone_and_kinds_take_turns():
    settings = {"kinds": KINDS, "facts": (2, 4)}
    questions = make_questions(WORDS, 6, **settings, seed=1)
    assert questions == make_questions(WORDS, 6, **settings, seed=1) != make_questions(WORDS, 6, **settings, seed=2)
    assert [question.text.split()[0] for question in questions] == ["what", "where", "who"] * 2


def test_questions_to_leave_out_are_not_asked_again():
    settings = {"kinds": ["who"], "facts": (1, 2)}
    first = make_questions(WORDS, 300, **settings, seed=1)
    assert set(first) & set(make_questions(WORDS, 300, **settings, seed=2))
    others = make_questions(WORDS, 300, **settings, seed=2, without=first)
    assert len(others) == 300
    assert not set(first) & set(others)
    every = make_questions(WORDS, 20_000, kinds=["who"], facts=(1, 1), seed=1)
    with pytest.raises(ValueError, match=r"facts must be more, got \(1, 1\): nearly every question is among those"):
        make_questions(WORDS, 1, kinds=["who"], facts=(1, 1), seed=2, without=every)


def test_words_are_the_most_frequent_long_ones_and_none_of_the_templates():
    text = "whale whale whale Anchor anchor has have keeps keeps the sea Harbor"
    assert Words.of(text, 1) == Words(("whale",), ("anchor",), ("harbor",))
    with pytest.raises(ValueError, match="the text must have 6 different words of four letters, got 3"):
        Words.of(text, 2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kinds": ["why"]}, "kinds must be among what, where, who, got 'why'"),
        ({"facts": (3, 9)}, r"facts must be two numbers from 1 to the 8 words of a kind, got \(3, 9\)"),
        ({"forms": 0}, "forms must be from 1 to 3, got 0"),
        ({"forms": 4}, "forms must be from 1 to 3, got 4"),
    ],
)
def test_a_task_that_cannot_be_made_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        make_questions(WORDS, 1, **{"kinds": KINDS, "facts": (2, 4), "seed": 0} | change)


def test_held_out_passages_are_held_out_with_all_their_questions():
    pairs = [make_questions(WORDS, 2, kinds=["who"], facts=(2, 2), seed=seed) for seed in range(10)]
    questions = [q for pair in pairs for q in (pair[0], type(pair[0])("again?", ("x",), passage=pair[0].passage))]
    kept, held_out = split_by_passage(QuestionSet("set", tuple(questions)), 0.3, seed=0)
    assert (len(kept.questions), len(held_out.questions)) == (14, 6)
    assert not {q.passage for q in kept.questions} & {q.passage for q in held_out.questions}
    assert split_by_passage(QuestionSet("set", tuple(questions)), 0.3, seed=0)[1] == held_out
    for share, words in ((1.0, "must be between 0 and 1, got 1.0"), (0.01, "leaves one side without any")):
        with pytest.raises(ValueError, match=words):
            split_by_passage(QuestionSet("set", tuple(questions)), share, seed=0)
