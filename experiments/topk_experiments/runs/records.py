"""Records of experiments: JSON files and files of JSON lines, written so that no reader ever sees half a record."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from topk_attention.files import append_json_line, write_whole

from .files import damage_named, read_utf8

__all__ = [
    "Json",
    "append_json_line",
    "days_and_commits",
    "differences",
    "read_json",
    "read_json_lines",
    "reads",
    "write_json",
    "write_whole",
]

Json = dict[str, Any]
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
# Fields of records that hold fields of their own, or lists, whatever the experiment.
_SECTIONS = {
    "best": dict,
    "config": dict,
    "curve": list,
    "environment": dict,
    "last": dict,
    "methods": dict,
    "model": dict,
    "outcome": str,
    "point": dict,
    "questions": dict,
    "request": dict,
    "run": dict,
    "runs": list,
    "scores": dict,
    "setting": dict,
    "text": dict,
}
_WORDS = ("model", "text", "setting", "questions", "run")
_IN_WORDS = {dict: "JSON object", list: "list", str: "word"}
_HOLDS = "holds a record that is not as these commands write it"
_WAY_OUT = "move it away or give another --out"


def reads(
    *names: str, way_out: str = "mend the record or delete it"
) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Makes a function that reads records and draws from them name their files where a record is not as it should be.

    names  of the files in the folder that is the function's first argument; none: that argument is the file
    """

    def decorate(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        @functools.wraps(function)
        def wrapped(*arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
            place: Any = arguments[0]
            files = [place / name for name in names] or [place]
            try:
                return function(*arguments, **options)
            except Exception as error:
                if str(place) in str(error):  # in words already
                    raise
                with damage_named(" or ".join(map(str, files)), way_out, _HOLDS):
                    raise

        return wrapped

    return decorate


def days_and_commits(records: Sequence[Json]) -> str:
    """The days on which records were made, first to last, and their commits, for the head of a table.

    >>> made = [{"date": "2026-11-29T10:00:00", "commit": "abc1234"}, {"date": "2026-11-24T10:00:00", "commit": None}]
    >>> days_and_commits([{"environment": environment} for environment in made])
    '2026-11-24 to 2026-11-29, commit abc1234, unknown'
    """
    dates = sorted({record["environment"]["date"][:10] for record in records})
    days = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    commits = dict.fromkeys(record["environment"]["commit"] or "unknown" for record in records)
    return f"{days}, commit {', '.join(commits)}"


def differences(old: Json, new: Json) -> list[str]:
    """What differs between two descriptions, in words; a section of both is compared field by field.

    >>> differences({"seed": 0, "config": {"k": 8, "steps": 9}}, {"seed": 0, "config": {"k": 16, "steps": 9}})
    ['config k: 8 -> 16']
    """
    lines = []
    for name in [*old, *(name for name in new if name not in old)]:
        before, now = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(now, dict):
            lines += [f"{name} {line}" for line in differences(before, now)]
        elif before != now:
            lines.append(f"{name}: {before} -> {now}")
    return lines


def write_json(path: Path, record: Json) -> None:
    """Write a record as indented JSON."""
    write_whole(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Json | None:
    """The record in a JSON file; None if there is no file.

    Raises:
        ValueError: the file holds something else.
    """
    if not path.exists():
        return None
    with damage_named(path, _WAY_OUT):
        content = read_utf8(path)
    try:
        record = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); {_WAY_OUT}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path} is not a record; {_WAY_OUT}")
    if problem := _problem(record):
        raise ValueError(f"{path} is not a record: {problem}; {_WAY_OUT}")
    return record


def _problem(record: Json) -> str | None:
    """What is wrong with a record's sections, in words."""
    for name, kind in _SECTIONS.items():
        value = record.get(name)
        if name == "runs" and isinstance(value, list) and not all(isinstance(run, dict) for run in value):
            return f"runs must be a list of JSON objects, got {value!r:.60}"
        # An old record may lack a section, and one of another experiment may name a model by a word.
        if value is None or isinstance(value, kind) or (name in _WORDS and isinstance(value, str | list)):
            continue
        return f"{name} must be a {_IN_WORDS[kind]}, got {value!r:.60}"
    return None


def read_json_lines(path: Path) -> list[Json]:
    """All complete records of a file of JSON lines, oldest first; an empty list if there is no file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not UTF-8, or a record's section is something else; the message names file and line.
    """
    if not path.exists():
        return []
    records = []
    with damage_named(path, _WAY_OUT):
        content = read_utf8(path)
    for number, line in enumerate(content.split("\n"), 1):  # records may hold the other separators of lines
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue  # a line that an interrupted run left incomplete
        if isinstance(record, dict):
            if problem := _problem(record):
                raise ValueError(f"line {number} of {path} is not a record: {problem}; delete the line, or {_WAY_OUT}")
            records.append(record)
    return records
