"""What to say of each model, and the page of supported models. From the records: nothing in this module measures."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from ..runs.ledger import is_finished, newest, on_file
from ..runs.records import Json, days_and_commits, reads, write_whole
from ..show.markdown import markdown_table
from .catalogue import OTHERS
from .comparisons import OF_ATTENTION, OF_NETWORKS, is_rounding

SCHEMA = "topk_attention/conformance/1"
FILE = "conformance.jsonl"
PAGE = "supported-models.md"
# Of our scripts before this command, with transformers 5.23: model classes tried, those of which attention was
# converted, and those of these that were exact in every comparison.
_BEFORE = (466, 359, 340)
# Why a class is no row of the page, or stands there untried.
OF_A_PART = "takes the configuration of a part of its type, which is a type by itself"
WITHOUT_CLASS = "transformers has no table with a class for it: a part of other models"
_LONGEST_REMARK = 240


class Verdict(NamedTuple):
    """A word for a cell, and the reason where there is more to say."""

    word: str
    reason: str = ""


EXACT, IN_PART, DIFFERS, REFUSED, HAS_NONE, NOT_TRIED = "exact", "in part", "differs", "refused", "none", "not tried"
WORDS = (EXACT, IN_PART, DIFFERS, REFUSED, HAS_NONE, NOT_TRIED)


def verdict(record: Json) -> Verdict:
    """What to say of the attention of a model."""
    return _verdict(record, "attention", OF_ATTENTION)


def verdict_on_networks(record: Json) -> Verdict:
    """What to say of its feed-forward networks."""
    return _verdict(record, "feed_forward", OF_NETWORKS)


def _verdict(record: Json, kind: str, compared: Sequence[str]) -> Verdict:
    if not is_finished(record):
        return Verdict(NOT_TRIED, f"{record['outcome']}: {record['message']}")
    if not record["built"]:
        return Verdict(NOT_TRIED, record["reason"])
    converted = record[kind]
    if "refused" in converted:
        return Verdict(DIFFERS, converted["refused"])
    if not converted["replaced"] and not converted["skipped"]:
        return Verdict(HAS_NONE)
    if not converted["replaced"]:
        return Verdict(REFUSED, _reasons(converted))
    for what in compared:
        wrong = {n: v for n, v in record["differences"].get(what, {}).items() if not is_rounding(n, v)}
        if wrong:
            name, value = next(iter(wrong.items()))
            others = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            return Verdict(DIFFERS, f"{what}, {name}: {value}{others}")
    unjudged = [
        f"{what} not judged: {reasons['all']}"
        for what, reasons in record["not_judged"].items()
        if what in compared and "all" in reasons
    ]
    if converted["skipped"]:
        return Verdict(IN_PART, "; ".join([*converted["skipped"], *unjudged]))
    return Verdict(EXACT, "; ".join(unjudged))


def _reasons(converted: Json) -> str:
    return "; ".join(converted["skipped"])


def in_numbers(records: Sequence[Json]) -> str:
    """How many of each verdict, in a line."""
    counts = Counter(verdict(record).word for record in records if not _is_of_a_part(record))
    return ", ".join(f"{counts[word]} {word}" for word in WORDS if counts[word])


def _is_of_a_part(record: Json) -> bool:
    return record.get("reason") == OF_A_PART


@reads(FILE)
def report(out: Path) -> list[Path]:
    """Write `supported-models.md` from the records on file; returns the files written."""
    records = newest(on_file(out / FILE, SCHEMA), lambda record: f"{record['model_type']} {record['model_class']}")
    records = sorted(
        (record for record in records if not _is_of_a_part(record)),
        key=lambda record: (record["model_type"], record["model_class"]),
    )
    if not records:
        return []
    write_whole(out / PAGE, as_markdown(records))
    return [out / PAGE]


def redraw(out: Path) -> list[Path]:
    """Write the page again from the records in the folder of all results."""
    return report(out / "conformance")


def as_markdown(records: Sequence[Json]) -> str:
    """The page of these records: counts, then a table for each family."""
    families: dict[str, list[Json]] = {}
    for record in sorted(
        records, key=lambda record: (record.get("family", OTHERS) == OTHERS, record.get("family", ""))
    ):
        families.setdefault(record.get("family", OTHERS), []).append(record)
    parts = [_summary(records), _counts(families)]
    for family, of_family in families.items():
        parts.append(f"## {family}")
        rows = [
            (record["model_type"], _code(record["model_class"]), *_cells(record))
            for record in of_family
            if record.get("reason") != WITHOUT_CLASS
        ]
        if rows:
            parts.append(markdown_table(("model type", "class", "attention", "networks", "remarks"), rows))
        without = [record["model_type"] for record in of_family if record.get("reason") == WITHOUT_CLASS]
        if without:
            parts.append(f"Not tried, as {WITHOUT_CLASS}: {', '.join(without)}.")
    return "\n\n".join(parts) + "\n"


def _summary(records: Sequence[Json]) -> str:
    there = records[-1]["environment"]
    words = [verdict(record).word for record in records]
    tried = {record["model_type"] for record, word in zip(records, words, strict=True) if word != NOT_TRIED}
    accepted, exact = sum(words.count(word) for word in (EXACT, IN_PART, DIFFERS)), words.count(EXACT)
    return (
        f"transformers {there['transformers']}, PyTorch {there['torch']}, {days_and_commits(records)}: "
        f"{len({record['model_type'] for record in records})} model types, {len(tried)} of them tried, in "
        f"{sum(word != NOT_TRIED for word in words)} classes. Attention of {accepted} classes is converted, of {exact} "
        "completely and exactly in every comparison. "
        f"Before, by other scripts: {_BEFORE[0]} classes, {_BEFORE[1]} converted, {_BEFORE[2]} exact."
    )


def _counts(families: dict[str, list[Json]]) -> str:
    def row(name: str, records: Sequence[Json], judge: Callable[[Json], Verdict]) -> tuple[str, ...]:
        counts = Counter(judge(record).word for record in records)
        return name, *(str(counts[word] or "") for word in WORDS)

    everything = [record for records in families.values() for record in records]
    rows = [row(name, records, verdict) for name, records in families.items()]
    rows += [row("**all**", everything, verdict), row("**networks of all**", everything, verdict_on_networks)]
    return markdown_table(("attention", *WORDS), rows)


def _cells(record: Json) -> tuple[str, str, str]:
    attention, networks = verdict(record), verdict_on_networks(record)
    remarks = [attention.reason]
    if without := record.get("attention", {}).get("without_completion"):
        remarks.append(without)
    if networks.reason and networks.reason != attention.reason:
        remarks.append(f"networks: {networks.reason}" if attention.reason else networks.reason)
    return attention.word, networks.word, "; ".join(filter(None, map(_short, remarks)))


def _short(reason: str) -> str:
    """A reason for a cell: classes without their modules, no places in code, no bars."""
    reason = re.sub(r"transformers\.models\.[\w.]+\.(\w+)", r"\1", reason)
    reason = re.sub(r" \([\w-]+/\w+\.py:\d+(, [\w-]+/\w+\.py:\d+)*\)", "", reason)
    reason = reason if len(reason) <= _LONGEST_REMARK else f"{reason[:_LONGEST_REMARK]} ..."
    return reason.replace("|", "/").replace("<", "&lt;").replace("*", r"\*").replace("_", r"\_")


def _code(name: str) -> str:
    return f"`{name}`"
