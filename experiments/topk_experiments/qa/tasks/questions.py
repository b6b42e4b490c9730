"""A question and a set of questions, whatever file they were read from."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass

YES_OR_NO = ("yes", "no")


@dataclass(frozen=True)
class Question:
    """One question with its right answers.

    answers        right answers; at least one
    choices        what to choose from, the right answer among them; empty for a free answer
    passage        text that holds the answer; empty if there is none
    answer_starts  characters of the passage at which the answers begin; empty if the file does not say
    is_yes_or_no   whether the choices are yes and no; such choices are not listed in a prompt

    >>> Question("what?", ("a",), choices=("b", "c"))
    Traceback (most recent call last):
    ValueError: the answer 'a' is not among the choices 'b', 'c' of 'what?'
    """

    text: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()
    passage: str = ""
    answer_starts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.answers:
            raise ValueError(f"a question needs at least one answer: {self.text!r}")
        if self.choices and self.answers[0] not in self.choices:
            choices = ", ".join(map(repr, self.choices))
            raise ValueError(f"the answer {self.answers[0]!r} is not among the choices {choices} of {self.text!r}")
        if len(self.answer_starts) not in (0, len(self.answers)):
            raise ValueError(f"answer_starts must be one for each of {len(self.answers)} answers of {self.text!r}")

    @property
    def correct(self) -> int:
        """The number of the right choice, from 0."""
        return self.choices.index(self.answers[0])

    @property
    def is_yes_or_no(self) -> bool:
        return self.choices == YES_OR_NO

    @staticmethod
    def from_json(stored: dict[str, object]) -> Question:
        """A question from its `dataclasses.asdict`, also after a round trip through JSON."""
        return Question(**{name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()})  # type: ignore[arg-type]


@dataclass(frozen=True)
class QuestionSet:
    """Questions and the name of their source: file and folder, no folders above."""

    name: str
    questions: tuple[Question, ...]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps([asdict(question) for question in self.questions]).encode()).hexdigest()

    def describe(self) -> dict[str, str | int]:
        """For records: the name, the hash of the content and the number of questions."""
        return {"name": self.name, "sha256": self.sha256, "number": len(self.questions)}

    def shuffled(self, seed: int) -> list[Question]:
        """All questions in an order that depends on the seed alone."""
        questions = list(self.questions)
        random.Random(seed).shuffle(questions)
        return questions


def split_by_passage(questions: QuestionSet, share: float, seed: int) -> tuple[QuestionSet, QuestionSet]:
    """Split a set by its passages: without a share of them, drawn at random, and with only these.

    All questions about a passage stay together, so that no model is asked about a passage that it was trained on.

    Raises:
        ValueError: share is not between 0 and 1, or one side would be empty.
    """
    if not 0 < share < 1:
        raise ValueError(f"the share to hold out must be between 0 and 1, got {share}")
    passages = list(dict.fromkeys(question.passage for question in questions.questions))
    random.Random(seed).shuffle(passages)
    held_out = set(passages[: round(share * len(passages))])
    sides = [
        tuple(q for q in questions.questions if (q.passage in held_out) == is_held_out) for is_held_out in (False, True)
    ]
    if not all(sides):
        raise ValueError(
            f"{questions.name} has {len(passages)} passages: a share of {share} leaves one side without any"
        )
    names = (f"{questions.name} without {share:g} of its passages", f"{share:g} of the passages of {questions.name}")
    return QuestionSet(names[0], sides[0]), QuestionSet(names[1], sides[1])


def examples_for(question: Question, examples: Sequence[Question], number: int) -> tuple[Question, ...]:
    """`number` of the examples, without the question itself.

    examples  twice as many: a question of the first half gets the second half, any other question the first

    >>> one, two, other = (Question(text, ("a",)) for text in ("1?", "2?", "3?"))
    >>> [examples_for(question, [one, two], 1)[0].text for question in (one, two, other)]
    ['2?', '1?', '1?']
    """
    first, second = tuple(examples[:number]), tuple(examples[number : 2 * number])
    return second if question in first else first
