"""Data for the two tasks of this folder, from files that --metadata names."""

from __future__ import annotations

import re
from pathlib import Path

from datasets import Dataset

NUM_EXAMPLES = 50


def load_questions(questions: str, **_: object) -> dict[str, Dataset]:
    """A file of lines `question \\n (a) one (b) other<TAB>other`; its last 50 questions serve as examples."""
    documents = []
    for line in Path(questions).read_text(encoding="utf-8").splitlines():
        asked, answer = line.split("\t")[:2]
        stem, _, listed = asked.partition(" \\n ")
        choices = [choice.strip() for choice in re.split(r"\([a-z]\) ", listed)[1:]]
        if answer.strip() in choices:
            documents.append({"question": stem, "choices": choices, "answer": choices.index(answer.strip())})
    return {
        "test": Dataset.from_list(documents[:-NUM_EXAMPLES]),
        "examples": Dataset.from_list(documents[-NUM_EXAMPLES:]),
    }


def load_text(text: str, start: int = 0, characters: int | None = None, **_: object) -> dict[str, Dataset]:
    """A UTF-8 text file, or so many characters of it, as one document."""
    content = Path(text).read_text(encoding="utf-8")[start:]
    return {"test": Dataset.from_list([{"text": content[:characters]}])}
