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
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ...runs.files import read_utf8
from .questions import YES_OR_NO, Question, QuestionSet
from .unifiedqa import parse_line

_DATA_SUFFIXES = (".json", ".jsonl", ".tsv")
_UNIFIEDQA = ".unifiedqa.tsv"
_NUMBERED_ANSWER = re.compile(r"\s*Answer(\d+): ")
# What content of another form than expected raises.
_BAD_CONTENT = (AttributeError, LookupError, OverflowError, RecursionError, TypeError, ValueError)
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
        questions = tuple(_from_file(path))
        if not questions:
            raise ValueError(f"{path} holds no questions")
        return QuestionSet(_name(path), questions)
    if _is_hub_id(str(source)):
        return _from_hub(str(source))
    raise FileNotFoundError(f"question file not found: {source}")


def _only_file(folder: Path) -> Path:
    # macOS leaves files like ._dev.json beside those that it unpacks.
    files = sorted(file for file in folder.iterdir() if file.suffix in _DATA_SUFFIXES and file.name[0] != ".")
    files = [file for file in files if not file.name.endswith(_UNIFIEDQA)] or files
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise ValueError(f"{folder} must hold one data file ({', '.join(_DATA_SUFFIXES)}), got {names}: name the file")
    return files[0]


def _name(path: Path) -> str:
    return f"{path.resolve().parent.name}/{path.name}"


def _from_file(path: Path) -> Iterator[Question]:
    content = read_utf8(path)
    start = content.lstrip()[:1]
    try:
        if start == "[":
            yield from _each(_from_row, "row", enumerate(json.loads(content), 1))
        elif start == "{":
            yield from _from_objects(content)
        elif path.with_suffix(".ans").is_file():
            yield from _from_mctest(content, path.with_suffix(".ans"))
        elif _looks_like_mctest(content):
            raise ValueError(f"MCTest's answers must be in a file beside it, {path.with_suffix('.ans').name}")
        else:
            yield from _each(parse_line, "line", _lines(content))
    except _BAD_CONTENT as error:
        raise ValueError(f"{path} has none of the known forms of question files: {_words(error)}") from error


def _from_objects(content: str) -> Iterator[Question]:
    """SQuAD's one object, or a row on each line, whatever the file's name ends in."""
    try:
        whole = json.loads(content)
    except ValueError:
        yield from _each(lambda line: _from_row(json.loads(line)), "line", _lines(content))
        return
    if "data" in whole:
        yield from _from_squad(whole["data"])
    else:
        yield from _each(_from_row, "row", [(1, whole)])


def _lines(content: str) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, with their numbers. Only line feeds end them: texts hold the other separators."""
    return ((number, line) for number, line in enumerate(content.split("\n"), 1) if line.strip())


def _each(read: Callable[[Any], Question], unit: str, numbered: Iterable[tuple[int, Any]]) -> Iterator[Question]:
    for number, part in numbered:
        try:
            yield read(part)
        except _BAD_CONTENT as error:
            raise ValueError(f"{unit} {number}: {_words(error)}") from error


def _words(error: Exception) -> str:
    return f"the field {error} is missing" if isinstance(error, KeyError) else str(error)


def _from_row(row: dict[str, Any]) -> Question:
    if not isinstance(row, dict):
        raise ValueError(f"a row must be a JSON object, got {type(row).__name__}")
    for wanted, convert in _ROWS:
        if wanted <= set(row):
            return convert(row)
    raise ValueError(f"a row has none of the known sets of fields, got {', '.join(list(row)[:8])}")


def _own_row(row: dict[str, Any]) -> Question:
    for name, kind, words in (
        ("text", str, "text"),
        ("passage", str, "text"),
        ("answers", list, "a list"),
        ("choices", list, "a list"),
        ("answer_starts", list, "a list"),
    ):
        if not isinstance(row.get(name, kind()), kind):
            raise ValueError(f"{name} must be {words}, got {row[name]!r:.80}")
    _check_answers(row["answers"], row.get("answer_starts", ()))
    _check_answers(row.get("choices", ()), name="a choice")
    return Question.from_json({name: row[name] for name in Question.__dataclass_fields__ if name in row})


def _check_answers(answers: Any, starts: Any = (), name: str = "an answer") -> None:
    """
    Raises:
        ValueError: an answer is no text, or the place of one is no number of a character.
    """
    for answer in answers:
        if not isinstance(answer, str):
            raise ValueError(f"{name} must be text, got {answer!r:.80}")
    for start in starts:
        if isinstance(start, bool) or not isinstance(start, int):
            raise ValueError(f"answer_start must be a whole number, got {start!r:.80}")


def _instruction_row(row: dict[str, Any]) -> Question:
    """Question, blank line, numbered answers from 1, blank line, the format of the answer."""
    body, found, _ = row["instruction"].rpartition("\n\nAnswer format:")
    before, numbered, listed = body.partition("\n\nAnswer1: ")
    if not found or not numbered:
        raise ValueError(f'an instruction must list "Answer1: ...", got {row["instruction"][:80]!r}')
    text = before.partition(": ")[2]
    choices = tuple(choice.strip() for choice in _NUMBERED_ANSWER.split("Answer1: " + listed)[2::2])
    number = int(row["answer"].removeprefix("answer"))
    if not 1 <= number <= len(choices):
        raise ValueError(f"answer must be one of answer1 to answer{len(choices)}, got {row['answer']!r}")
    return Question(text.strip(), (choices[number - 1],), choices)


def _labelled_row(row: dict[str, Any]) -> Question:
    """Choices with labels, in either of two notations, and the label of the right one."""
    asked: Any = row.get("question_stem") or row["question"]
    choices: Any = row.get("choices")
    if isinstance(asked, dict):
        asked, choices = asked["stem"], asked["choices"]
    if isinstance(choices, list):
        choices = {name: [choice[name] for choice in choices] for name in ("label", "text")}
    texts = tuple(_text("a choice", text) for text in choices["text"])
    labels, key = list(choices["label"]), row["answerKey"]
    if len(labels) != len(texts):
        raise ValueError(f"choices must hold a label for each of {len(texts)} texts, got {len(labels)}")
    if key not in labels:
        hint = "; test sets are published without answers" if not key else ""
        raise ValueError(f"answerKey must be one of the labels {', '.join(map(str, labels))}, got {key!r}{hint}")
    return Question(_text("question", asked), (texts[labels.index(key)],), texts)


def _text(name: str, value: Any) -> str:
    """A text without space around it; numbers stand for themselves."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{name} must be text, got {value!r}")
    return str(value).strip()


def _boolq_row(row: dict[str, Any]) -> Question:
    text = _text("question", row["question"])
    name = "answer" if "answer" in row else "label"
    answer = row[name]
    if answer not in (0, 1):  # also true and false
        raise ValueError(f"{name} must be true or false, got {answer!r}")
    passage = _text("passage", row["passage"])
    return Question(text if text.endswith("?") else f"{text}?", ("yes" if answer else "no",), YES_OR_NO, passage)


def _squad_row(row: dict[str, Any]) -> Question:
    answers, starts = row["answers"]["text"], row["answers"].get("answer_start", ())
    question, context = _text("question", row["question"]), row["context"]
    if not isinstance(context, str):
        raise ValueError(f"context must be text, got {context!r}")
    # Unanswerable questions of SQuAD 2 have no answer; UnifiedQA expects these words.
    if not answers:
        return Question(question, ("<no answer>",), passage=context)
    if not isinstance(answers, list | tuple):
        raise ValueError(f"the text of answers must be a list, got {answers!r:.80}")
    _check_answers(answers, starts)
    return Question(question, tuple(answers), passage=context, answer_starts=tuple(starts))


_ROWS: tuple[tuple[set[str], Callable[[dict[str, Any]], Question]], ...] = (
    ({"text", "answers"}, _own_row),
    ({"instruction", "answer"}, _instruction_row),
    ({"answerKey", "question"}, _labelled_row),
    ({"answerKey", "question_stem"}, _labelled_row),
    ({"question", "passage", "answer"}, _boolq_row),
    ({"question", "passage", "label"}, _boolq_row),
    ({"question", "context", "answers"}, _squad_row),
)


def _from_squad(articles: list[dict[str, Any]]) -> Iterator[Question]:
    place = "data"
    try:
        for number, article in enumerate(articles, 1):
            place = f"article {number}"
            for paragraph_number, paragraph in enumerate(article["paragraphs"], 1):
                place = f"article {number}, paragraph {paragraph_number}"
                for question_number, asked in enumerate(paragraph["qas"], 1):
                    place = f"article {number}, paragraph {paragraph_number}, question {question_number}"
                    yield _from_squad_question(asked, paragraph)
    except _BAD_CONTENT as error:
        raise ValueError(f"{place}: {_words(error)}") from error


def _from_squad_question(asked: dict[str, Any], paragraph: dict[str, Any]) -> Question:
    if "context" not in paragraph and "background" in paragraph:
        raise ValueError(
            "a paragraph must hold its context, got background and situation, as ROPES has them; join them"
        )
    given = asked["answers"]
    names = [name for name in ("text", "answer_start") if all(name in answer for answer in given)]
    if "text" not in names:
        raise ValueError(f"an answer must hold text, got {given!r:.80}")
    answers = {name: [answer[name] for answer in given] for name in names}
    return _squad_row({"question": asked["question"], "context": paragraph["context"], "answers": answers})


def _looks_like_mctest(content: str) -> bool:
    fields = content.partition("\n")[0].split("\t")
    return len(fields) >= 23 and fields[1].startswith("Author:")


def _from_mctest(content: str, answer_file: Path) -> Iterator[Question]:
    """A story a line, with four questions of four choices each."""
    stories, answers = list(_lines(content)), list(_lines(read_utf8(answer_file)))
    if len(stories) != len(answers):
        raise ValueError(f"{answer_file.name} must hold a line for each of {len(stories)} stories, got {len(answers)}")
    for (number, line), (_, letters) in zip(stories, answers, strict=True):
        _, _, story, *rest = [*line.rstrip("\r").split("\t"), "", ""]
        for question, letter in enumerate(letters.rstrip("\r").split("\t")):
            text, *choices = rest[5 * question : 5 * question + 5] or [""]
            choices = [_without_escapes(choice) for choice in choices]
            if len(choices) < 4 or letter not in tuple("ABCD"):
                raise ValueError(
                    f"line {number}: four choices and one of A, B, C, D are needed for each question, got "
                    f"{len(choices)} choices and {letter!r}"
                )
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
