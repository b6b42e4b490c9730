r"""UnifiedQA's text-to-text form (Khashabi et al. 2020): question, choices and passage in lower case, between them a
backslash and an n, and in files a tab and the answer after them.

    which is a fruit? \n (a) apple (b) stone	apple
    who ate it? \n ann had an apple. bob ate it.	bob
"""

from __future__ import annotations

import ast
import json
import re

from .questions import YES_OR_NO, Question

SEPARATOR = r" \n "
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_SPACES = re.compile(r"\s+")


def input_text(question: Question) -> str:
    r"""The input of the model.

    >>> print(input_text(Question("Which is a  fruit?", ("Apple",), choices=("Apple", "Stone"))))
    which is a fruit? \n (a) apple (b) stone
    """
    parts = [question.text]
    if question.choices and not question.is_yes_or_no:
        if len(question.choices) > len(_LETTERS):
            raise ValueError(f"choices must be at most {len(_LETTERS)}, got {len(question.choices)}: {question.text!r}")
        named = zip(_LETTERS, question.choices, strict=False)
        parts.append(" ".join(f"({letter}) {choice}" for letter, choice in named))
    if question.passage:
        parts.append(question.passage)
    return SEPARATOR.join(in_lower_case(part) for part in parts)


def target_text(question: Question) -> str:
    """The target of the model: the first answer in lower case."""
    return in_lower_case(question.answers[0])


def parse_line(line: str) -> Question:
    r"""The question in one line of a file: an input, a tab and an answer. Several answers stand there as a JSON list.

    >>> parse_line('who ate it? \\n bob and ann ate.\t["bob", "ann"]').answers
    ('bob', 'ann')
    """
    source, *targets = line.strip("\r\n").split("\t")
    if targets and all(len(field) > 1 and field[0] == field[-1] == '"' for field in (source, *targets)):
        source, *targets = (field[1:-1].replace('""', '"') for field in (source, *targets))  # quoted as in CSV
    while targets[1:] and not targets[-1].strip():
        targets.pop()  # tabs at the end of a line
    if len(targets) > 1:
        raise ValueError(
            f"a line must hold an input, a tab and an answer, got {len(targets)} tabs in {line[:80]!r}; put a space "
            'for a tab within a text, and write several answers as a list, ["one", "two"]'
        )
    answers = tuple(_answers(targets[0])) if targets else ()
    if not answers:
        raise ValueError(f"a line must hold an input, a tab and an answer, got {line[:80]!r}")
    text, *rest = (part.strip() for part in source.split(r"\n"))
    choices = _choices(rest[0]) if rest else ()
    passage = " ".join(part for part in (rest[1:] if choices else rest) if part)
    if choices and answers[0] not in choices:
        same = [choice for choice in choices if in_lower_case(choice) == in_lower_case(answers[0])]
        answers = (*same[:1], *answers[1:]) if same else answers
    if not choices and set(answers) <= set(YES_OR_NO):
        choices = YES_OR_NO
    return Question(text, answers, choices, passage)


def in_lower_case(text: str) -> str:
    """The text in lower case, with one space for every run of white space."""
    return _SPACES.sub(" ", text.strip()).lower()


def _answers(target: str) -> list[str]:
    if target.startswith("[") and target.endswith("]"):
        listed = _listed(target)
        if isinstance(listed, list) and listed and all(isinstance(answer, str) for answer in listed):
            return listed
    return [target.strip()] if target.strip() else []


def _listed(target: str) -> object:
    """A list as JSON writes it, or as Python does; None where it is neither."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(target)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return None


def _choices(part: str) -> tuple[str, ...]:
    """The choices of a text that begins with "(a) " or "(A) "; empty if it does not, or if there is only one."""
    if not part.lower().startswith("(a) "):
        return ()
    choices, rest = [], part[len("(a) ") :]
    for letter in (_LETTERS if part[1] == "a" else _LETTERS.upper())[1:]:
        choice, found, after = rest.partition(f" ({letter}) ")
        if not found:
            break
        choices.append(choice.strip())
        rest = after
    return (*choices, rest.strip()) if choices else ()
