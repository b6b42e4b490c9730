r"""A generated reading task: a paragraph of facts in words of a real text, and a question about one fact.

    where is the anchor? \n the anchor of queequeg is in the cabin. the whale of ahab is in the ...	cabin

There are three kinds of question, "what", "where" and "who". A model trained on two of them can be fine-tuned on the
third. To answer, a model must find the right sentence and take a word from it: words carry no hint of each other.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from .questions import Question

KINDS = ("what", "where", "who")
_ASKED = {
    "what": ("what does {holder} have?", "thing"),
    "where": ("where is the {thing}?", "place"),
    "who": ("who has the {thing}?", "holder"),
}
_FACTS = (
    "the {thing} of {holder} is in the {place}.",
    "{holder} keeps the {thing} in the {place}.",
    "in the {place} {holder} has the {thing}.",
)
NUM_FORMS = len(_FACTS)
_WORD = re.compile(r"[a-z]+")
_OWN_WORDS = frozenset(_WORD.findall(" ".join([*_FACTS, *(asked for asked, _ in _ASKED.values())])))
_LEAST_LETTERS = 4
_TRIES = 1000


@dataclass(frozen=True)
class Words:
    """The words that facts are built from."""

    holders: tuple[str, ...]
    things: tuple[str, ...]
    places: tuple[str, ...]

    @staticmethod
    def of(text: str, number: int) -> Words:
        """`number` words of each kind: the most frequent words of a text with at least four letters.

        Raises:
            ValueError: the text has too few.
        """
        counts = Counter(word for word in _WORD.findall(text.lower()) if len(word) >= _LEAST_LETTERS)
        words = [word for word, _ in counts.most_common() if word not in _OWN_WORDS][: 3 * number]
        if len(words) < 3 * number:
            raise ValueError(f"the text must have {3 * number} different words of four letters, got {len(words)}")
        return Words(tuple(words[0::3]), tuple(words[1::3]), tuple(words[2::3]))


def make_questions(
    words: Words,
    number: int,
    *,
    kinds: Sequence[str],
    facts: tuple[int, int],
    forms: int = 1,
    seed: int,
    without: Collection[Question] = (),
) -> list[Question]:
    """Generate questions, each with a paragraph of its own.

    number   of questions
    kinds    of question, in equal parts
    facts    fewest and most facts of a paragraph; no holder, thing or place occurs twice in it
    forms    number of sentence forms, 1 to NUM_FORMS: with several, the words of a fact come in several orders
    without  questions with their paragraphs that must not occur again

    Raises:
        ValueError: kinds, facts or forms do not fit, or nearly every question is among those to leave out.

    >>> words = Words(("ahab", "bildad"), ("whale", "anchor"), ("cabin", "hold"))
    >>> (question,) = make_questions(words, 1, kinds=["where"], facts=(2, 2), forms=3, seed=1)
    >>> print(question.text, question.passage, question.answers[0], sep=" | ")
    where is the whale? | in the hold ahab has the whale. bildad keeps the anchor in the cabin. | hold
    """
    for kind in kinds:
        if kind not in _ASKED:
            raise ValueError(f"kinds must be among {', '.join(KINDS)}, got {kind!r}")
    fewest, most = facts
    least_words = min(map(len, (words.holders, words.things, words.places)))
    if not 1 <= fewest <= most <= least_words:
        raise ValueError(f"facts must be two numbers from 1 to the {least_words} words of a kind, got {facts}")
    if not 1 <= forms <= NUM_FORMS:
        raise ValueError(f"forms must be from 1 to {NUM_FORMS}, got {forms}")
    draw = random.Random(seed)
    seen = frozenset(without)
    questions = []
    for turn in range(number):
        for _ in range(_TRIES):
            question = _question(words, kinds[turn % len(kinds)], draw.randint(fewest, most), forms, draw)
            if question not in seen:
                break
        else:
            raise ValueError(f"facts must be more, got {facts}: nearly every question is among those to leave out")
        questions.append(question)
    return questions


def share_right_at_random(questions: Sequence[Question]) -> float:
    """The share of right answers by picking a random fact of the paragraph, and the right word of that fact.

    >>> share_right_at_random([Question("who?", ("x",), passage=passage) for passage in ("One.", "One. Another.")])
    0.75
    """
    return sum(1 / question.passage.count(".") for question in questions) / len(questions)


def _question(words: Words, kind: str, num_facts: int, forms: int, draw: random.Random) -> Question:
    columns = (draw.sample(kind_of_word, num_facts) for kind_of_word in (words.holders, words.things, words.places))
    facts = [dict(zip(("holder", "thing", "place"), parts, strict=True)) for parts in zip(*columns, strict=True)]
    passage = " ".join(draw.choice(_FACTS[:forms]).format(**fact) for fact in facts)
    text, answer = _ASKED[kind]
    asked_about = draw.choice(facts)
    return Question(text.format(**asked_about), (asked_about[answer],), passage=passage)
