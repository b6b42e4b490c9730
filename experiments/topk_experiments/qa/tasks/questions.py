"""What a question is, whatever file it came from."""

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

    answers        any of them is right; at least one
    choices        the right answer is among them; empty where the answer is free
    passage        text in which to look; empty where there is none
    answer_starts  characters of the passage at which the answers begin; empty where the file does not say
    is_yes_or_no   choices are yes and no, which nobody needs to be told

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
        """Which choice is right, from 0 on."""
        return self.choices.index(self.answers[0])

    @property
    def is_yes_or_no(self) -> bool:
        return self.choices == YES_OR_NO

    @staticmethod
    def from_json(stored: dict[str, object]) -> Question:
        """What `dataclasses.asdict` made, also by way of JSON."""
        return Question(**{name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()})  # type: ignore[arg-type]


@dataclass(frozen=True)
class QuestionSet:
    """Questions and where they came from; `name` holds no folder names above the last."""

    name: str
    questions: tuple[Question, ...]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps([asdict(question) for question in self.questions]).encode()).hexdigest()

    def describe(self) -> dict[str, str | int]:
        """For records: the name, the content's hash, and how many there are."""
        return {"name": self.name, "sha256": self.sha256, "number": len(self.questions)}

    def shuffled(self, seed: int) -> list[Question]:
        """All questions in an order that depends on the seed alone."""
        questions = list(self.questions)
        random.Random(seed).shuffle(questions)
        return questions


def split_by_passage(some: QuestionSet, share: float, seed: int) -> tuple[QuestionSet, QuestionSet]:
    """The set without, and with only, the questions about a share of its passages, drawn at random.

    Questions about one passage stay together: a model must not be trained on what it is asked about later.

    Raises:
        ValueError: share is not between 0 and 1, or one side would be empty.
    """
    if not 0 < share < 1:
        raise ValueError(f"the share to hold out must be between 0 and 1, got {share}")
    passages = list(dict.fromkeys(question.passage for question in some.questions))
    random.Random(seed).shuffle(passages)
    held_out = set(passages[: round(share * len(passages))])
    sides = [
        tuple(q for q in some.questions if (q.passage in held_out) == is_held_out) for is_held_out in (False, True)
    ]
    if not all(sides):
        raise ValueError(f"{some.name} has {len(passages)} passages: a share of {share} leaves one side without any")
    names = (f"{some.name} without {share:g} of its passages", f"{share:g} of the passages of {some.name}")
    return QuestionSet(names[0], sides[0]), QuestionSet(names[1], sides[1])


def examples_for(question: Question, examples: Sequence[Question], number: int) -> tuple[Question, ...]:
    """`number` of the examples, never the question itself.

    examples  twice as many: a question of the first half gets the second half, any other question the first

    >>> one, two, other = (Question(text, ("a",)) for text in ("1?", "2?", "3?"))
    >>> [examples_for(question, [one, two], 1)[0].text for question in (one, two, other)]
    ['2?', '1?', '1?']
    """
    first, second = tuple(examples[:number]), tuple(examples[number : 2 * number])
    return second if question in first else first
