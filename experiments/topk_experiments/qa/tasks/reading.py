"""Questions from files in the published forms of question-answering sets, or from the Hugging Face hub.

The content decides the form, never the name:

- UnifiedQA's lines, see `unifiedqa`;
- JSON or JSON lines of rows as the hub has them: ARC, OpenBookQA and CommonsenseQA (choices with labels and an
  answerKey), BoolQ (question, passage, answer), SQuAD (question, context, answers), and rows as `Question` has them;
- the same where "stem" and choices lie inside "question", as CommonsenseQA and ARC are published by their authors;
- instructions with "Answer1: ... Answer2: ..." and "answer2", as ARC and OpenBookQA come in instruction sets;
- SQuAD's own nested JSON;
- MCTest's lines, whose answers stand in a second file that ends in .ans.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .questions import YES_OR_NO, Question, QuestionSet
from .unifiedqa import parse_line

_DATA_SUFFIXES = (".json", ".jsonl", ".tsv")
_UNIFIEDQA = ".unifiedqa.tsv"
_NUMBERED_ANSWER = re.compile(r"\s*Answer(\d+): ")
_MCTEST_ESCAPES = ((r"\newline", "\n"), (r"\tab", "\t"))


def read_questions(source: str | Path) -> QuestionSet:
    """All questions of a file, of the only data file in a folder, or of "ID:CONFIGURATION:SPLIT" on the hub.

    A file in UnifiedQA's form is read only if the folder holds no other: it has lost its capitals.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: a folder without or with several data files, a file in none of the forms above, or an id while the
            package datasets is not installed.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        path = _only_file(path)
    if path.is_file():
        return QuestionSet(_name(path), tuple(_from_file(path)))
    if _is_hub_id(str(source)):
        return _from_hub(str(source))
    raise FileNotFoundError(f"question file not found: {source}")


def _only_file(folder: Path) -> Path:
    files = sorted(file for file in folder.iterdir() if file.suffix in _DATA_SUFFIXES)
    files = [file for file in files if not file.name.endswith(_UNIFIEDQA)] or files
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise ValueError(f"{folder} must hold one data file ({', '.join(_DATA_SUFFIXES)}), got {names}: name the file")
    return files[0]


def _name(path: Path) -> str:
    return f"{path.resolve().parent.name}/{path.name}"


def _from_file(path: Path) -> Iterator[Question]:
    content = path.read_text(encoding="utf-8")
    start = content.lstrip()[:1]
    try:
        if start == "[" or (start == "{" and path.suffix == ".json"):
            yield from _from_json(json.loads(content))
        elif start == "{":
            yield from _from_json([json.loads(line) for line in content.splitlines() if line.strip()])
        elif path.with_suffix(".ans").is_file():
            yield from _from_mctest(content, path.with_suffix(".ans").read_text(encoding="utf-8"))
        else:
            yield from map(parse_line, filter(str.strip, content.split("\n")))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} has none of the known forms of question files: {error}") from error


def _from_json(content: Any) -> Iterator[Question]:
    if isinstance(content, dict):
        if "data" not in content:
            raise ValueError(f"a JSON object must have SQuAD's data, got {', '.join(list(content)[:8])}")
        yield from _from_squad(content["data"])
        return
    for row in content:
        yield _from_row(row)


def _from_row(row: dict[str, Any]) -> Question:
    for wanted, convert in _ROWS:
        if wanted <= set(row):
            return convert(row)
    raise ValueError(f"a row has none of the known sets of fields, got {', '.join(list(row)[:8])}")


def _own_row(row: dict[str, Any]) -> Question:
    return Question.from_json({name: row[name] for name in Question.__dataclass_fields__ if name in row})


def _instruction_row(row: dict[str, Any]) -> Question:
    """Question, blank line, numbered answers from 1, blank line, the format of the answer."""
    body, found, _ = row["instruction"].rpartition("\n\nAnswer format:")
    before, numbered, listed = body.partition("\n\nAnswer1: ")
    if not found or not numbered:
        raise ValueError(f'an instruction must list "Answer1: ...", got {row["instruction"][:80]!r}')
    text = before.partition(": ")[2]
    choices = tuple(choice.strip() for choice in _NUMBERED_ANSWER.split("Answer1: " + listed)[2::2])
    return Question(text.strip(), (choices[int(row["answer"].removeprefix("answer")) - 1],), choices)


def _labelled_row(row: dict[str, Any]) -> Question:
    """Choices with labels, in either of two notations, and the label of the right one."""
    asked: Any = row.get("question_stem") or row["question"]
    choices: Any = row.get("choices")
    if isinstance(asked, dict):
        asked, choices = asked["stem"], asked["choices"]
    if isinstance(choices, list):
        choices = {name: [choice[name] for choice in choices] for name in ("label", "text")}
    texts = tuple(text.strip() for text in choices["text"])
    return Question(asked.strip(), (texts[choices["label"].index(row["answerKey"])],), texts)


def _boolq_row(row: dict[str, Any]) -> Question:
    text = row["question"].strip()
    answer = row["answer"]
    if not isinstance(answer, bool):
        raise ValueError(f"answer must be true or false, got {answer!r}")
    return Question(text if text.endswith("?") else f"{text}?", ("yes" if answer else "no",), YES_OR_NO, row["passage"])


def _squad_row(row: dict[str, Any]) -> Question:
    answers, starts = row["answers"]["text"], row["answers"]["answer_start"]
    # Unanswerable questions of SQuAD 2 have no answer; UnifiedQA expects these words.
    if not answers:
        return Question(row["question"].strip(), ("<no answer>",), passage=row["context"])
    return Question(row["question"].strip(), tuple(answers), passage=row["context"], answer_starts=tuple(starts))


_ROWS: tuple[tuple[set[str], Callable[[dict[str, Any]], Question]], ...] = (
    ({"text", "answers"}, _own_row),
    ({"instruction", "answer"}, _instruction_row),
    ({"answerKey", "question"}, _labelled_row),
    ({"answerKey", "question_stem"}, _labelled_row),
    ({"question", "passage", "answer"}, _boolq_row),
    ({"question", "context", "answers"}, _squad_row),
)


def _from_squad(articles: list[dict[str, Any]]) -> Iterator[Question]:
    for article in articles:
        for paragraph in article["paragraphs"]:
            for asked in paragraph["qas"]:
                answers = {name: [answer[name] for answer in asked["answers"]] for name in ("text", "answer_start")}
                yield _squad_row({"question": asked["question"], "context": paragraph["context"], "answers": answers})


def _from_mctest(content: str, answers: str) -> Iterator[Question]:
    """A story a line, with four questions of four choices each."""
    for line, letters in zip(content.splitlines(), answers.splitlines(), strict=True):
        _, _, story, *rest = line.split("\t")
        for number, letter in enumerate(letters.split("\t")):
            text, *choices = rest[5 * number : 5 * number + 5]
            choices = [_without_escapes(choice) for choice in choices]
            answer = choices["ABCD".index(letter)]
            yield Question(text.partition(":")[2].strip(), (answer,), tuple(choices), _without_escapes(story))


def _without_escapes(text: str) -> str:
    for escape, character in _MCTEST_ESCAPES:
        text = text.replace(escape, character)
    return text.strip()


def _is_hub_id(source: str) -> bool:
    return source.count(":") == 2 and not source.startswith((".", "/", "~"))


def _from_hub(source: str) -> QuestionSet:
    identifier, configuration, split = source.split(":")
    try:
        datasets = importlib.import_module("datasets")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{source} needs the package datasets, which is not installed: pip install datasets, or name a file"
        ) from error
    rows = datasets.load_dataset(identifier, configuration or None, split=split)
    return QuestionSet(source, tuple(_from_row(dict(row)) for row in rows))
