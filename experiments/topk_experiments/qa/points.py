"""What records of evaluations and of trainings share: their configuration, names for their files, and scores."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from topk_attention.functional.words import full_attention_note

from ..runs.ledger import field_of
from ..runs.ledger import identity as identity_of
from ..runs.records import Json

_CONFIGURATION = ("model", "questions", "protocol", "setting", "training", "run.backend", "run.dtype")
_VERSIONS = ("topk_attention", "torch", "transformers")


def configuration(record: Json) -> Json:
    """What was asked or trained and how, for the ledger; not the threads and other fields that leave answers alone."""
    return {name: field_of(record, name) for name in _CONFIGURATION}


def identity(record: Json) -> Json:
    """Configuration and versions: what tells records apart in tables, and names the folders of trained models.

    Whether a record spares a run is not decided here but by the ledger.
    """
    fields = {name: record.get(name) for name in ("schema", *_CONFIGURATION) if "." not in name}
    versions = {name: record["environment"].get(name) for name in _VERSIONS}
    return fields | versions | {name: record["run"].get(name) for name in ("backend", "dtype")}


def key_of(record: Json) -> str:
    """A short name that only records of the same identity share."""
    return _short(identity(record))


def work_name(record: Json) -> str:
    """A name for the files of an unfinished run: only runs that the ledger calls the same share it."""
    return _short(identity_of(configuration(record), record["environment"]))


def in_words(record: Json) -> str:
    """The scores of a record in one line, and whether its k left nothing out."""
    named = ((name.replace("_", " "), score) for name, score in record["scores"].items())
    line = ", ".join(f"{name} {score['value']:.1f} ± {score['error']:.1f}" for name, score in named)
    k = record["setting"]["attention_k"]
    note = full_attention_note(k if isinstance(k, int) else None, record["lengths"]["most_tokens"])
    return line if note is None else f"{line}; {note}"


def packed(outcomes: Sequence[float]) -> str | list[float]:
    """Outcomes, one a question, in a short form: a string of digits if all are 0 or 1.

    >>> packed([1.0, 0.0, 1.0]), packed([1.0, 0.25])
    ('101', [1.0, 0.25])
    """
    if set(outcomes) <= {0.0, 1.0}:
        return "".join(str(int(outcome)) for outcome in outcomes)
    return [round(outcome, 4) for outcome in outcomes]


def unpack(stored: str | Sequence[float]) -> list[float]:
    """The outcomes that `packed` was given, to four digits."""
    return [float(outcome) for outcome in stored]


def _short(described: Json) -> str:
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]
