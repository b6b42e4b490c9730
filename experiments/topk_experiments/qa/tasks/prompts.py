"""How a decoder model is asked: solved examples, then the question, then each choice as a continuation.

    PASSAGE
    Question: TEXT
    Answer: ANSWER

with an empty line between examples. Choices are never listed: a small model scores their words better than letters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .questions import Question, examples_for

# To be raised with every change of the wording: records of other prompts then count as other runs.
PROMPT_VERSION = 1
_BETWEEN_EXAMPLES = "\n\n"


@dataclass(frozen=True)
class Prompt:
    """Token ids of one question.

    prefix   the examples, shared by many questions; may be empty
    context  the question up to the start of the answer
    choices  the continuations, one entry a choice
    """

    prefix: tuple[int, ...]
    context: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of the longest sequence."""
        return len(self.prefix) + len(self.context) + max(map(len, self.choices))


def question_text(question: Question) -> str:
    """The question up to the start of the answer.

    >>> question_text(Question("Who ate?", ("Bob",), passage="Bob ate."))
    'Bob ate.\\nQuestion: Who ate?\\nAnswer:'
    """
    passage = f"{question.passage.strip()}\n" if question.passage else ""
    return f"{passage}Question: {question.text}\nAnswer:"


def solved_text(question: Question) -> str:
    """The question with its answer, as an example for others."""
    return f"{question_text(question)} {question.answers[0]}"


def choice_prompts(
    questions: Sequence[Question], examples: Sequence[Question], num_shots: int, tokenizer: Any
) -> list[Prompt]:
    """Token ids of all questions, each after `num_shots` of the examples, see `examples_for`.

    A choice's tokens are those that it adds to the tokens of the question.

    Raises:
        ValueError: a question has no choices, there are too few examples, or choices have no tokens of their own.
    """
    if len(examples) < 2 * num_shots:
        raise ValueError(f"examples must be at least {2 * num_shots}, twice the shots, got {len(examples)}")
    prefixes: dict[str, tuple[int, ...]] = {}
    prompts = []
    for question in questions:
        if not question.choices:
            raise ValueError(f"a decoder model is given choices; this question has none: {question.text!r}")
        shown = "".join(solved_text(e) + _BETWEEN_EXAMPLES for e in examples_for(question, examples, num_shots))
        if shown not in prefixes:
            prefixes[shown] = tuple(tokenizer(shown)["input_ids"]) if shown else ()
        # A token that begins every text, such as BOS, belongs to the prefix if there is one.
        settings = {"add_special_tokens": not shown}
        asked = question_text(question)
        context = tokenizer(asked, **settings)["input_ids"]
        whole = tokenizer([f"{asked} {choice}" for choice in question.choices], **settings)["input_ids"]
        if any(ids[: len(context)] != context for ids in whole):
            raise ValueError(
                f"the tokens of a question with a choice must begin with those of the question {asked!r}; this "
                "tokenizer joins the two or ends every text with a token, so that choices have no tokens of their own"
            )
        choices = tuple(tuple(ids[len(context) :]) for ids in whole)
        if not all(choices):
            raise ValueError(f"every choice must add a token to {asked!r}, got {question.choices}")
        prompts.append(Prompt(prefixes[shown], tuple(context), choices))
    return prompts


def share_that_sees_more_keys(prompts: Sequence[Prompt], k: float) -> float:
    """The share of tokens of questions and choices that see more than k keys; for all others attention is full.

    >>> share_that_sees_more_keys([Prompt((7, 7), (1, 2, 3), ((4,), (5,)))], k=4)
    0.6
    """
    total, beyond = 0, 0.0
    for prompt in prompts:
        before, context = len(prompt.prefix), len(prompt.context)
        # (first position, number of tokens): the question is read once, each choice on its own
        for first, number in [(before, context), *((before + context, len(choice)) for choice in prompt.choices)]:
            total += number
            beyond += min(number, max(0, first + number - k))
    return beyond / total
