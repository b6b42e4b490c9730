"""What evaluations and trainings have in common: which record stands for a point, and what it holds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from ..runs.records import Json

# Answers depend on what is computed, not on how fast: a record of another processor counts, and so does one of edited
# code, whose commit it holds. Use --fresh after a change that should change answers.
_SAME_ENVIRONMENT = ("topk_attention", "torch", "transformers")
_IDENTITY = ("schema", "model", "questions", "protocol", "setting", "training")


def identity(record: Json) -> Json:
    """What has to agree for a record to stand for a point."""
    same = {name: record.get(name) for name in _IDENTITY}
    return (
        same
        | {name: record["environment"].get(name) for name in _SAME_ENVIRONMENT}
        | {name: record["run"].get(name) for name in ("backend", "dtype")}
    )


def key_of(record: Json) -> str:
    """The same for records of the same identity; names their files."""
    return hashlib.sha256(json.dumps(identity(record), sort_keys=True).encode()).hexdigest()[:16]


def find_record(records: Sequence[Json], wanted: Json) -> Json | None:
    """The newest record of the same identity."""
    return next((record for record in reversed(records) if identity(record) == identity(wanted)), None)


def in_words(record: Json) -> str:
    """The scores in one line."""
    named = ((name.replace("_", " "), score) for name, score in record["scores"].items())
    return ", ".join(f"{name} {score['value']:.1f} ± {score['error']:.1f}" for name, score in named)


def packed(outcomes: Sequence[float]) -> str | list[float]:
    """One outcome a question, short: a digit each where all are 0 or 1.

    >>> packed([1.0, 0.0, 1.0]), packed([1.0, 0.25])
    ('101', [1.0, 0.25])
    """
    if set(outcomes) <= {0.0, 1.0}:
        return "".join(str(int(outcome)) for outcome in outcomes)
    return [round(outcome, 4) for outcome in outcomes]


def unpack(stored: str | Sequence[float]) -> list[float]:
    """What `packed` was given, to four digits."""
    return [float(outcome) for outcome in stored]
