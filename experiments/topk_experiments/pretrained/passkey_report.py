"""The table of passkeys that were found, from the records. Nothing in this file measures."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from ..models.settings import setting_name
from ..runs.ledger import newest, on_file
from ..runs.records import Json, days_and_commits, reads, write_whole
from ..show.html import counted
from ..show.markdown import markdown_table

NAME, SCHEMA = "passkey", "topk_attention/passkey/2"
_SHARED = ("depths", "num_tokens", "filler", "frame", "model", "text")


@reads(f"{NAME}.jsonl")
def report(out: Path) -> list[Path]:
    """Write `passkey.md` of the records in a folder that are of the last one's model: a table for each length and form
    of the prompt. Returns its path.
    """
    records = newest(on_file(out / f"{NAME}.jsonl", SCHEMA), lambda record: json.dumps(record["point"], sort_keys=True))
    if not records:
        return []
    tables: dict[str, list[Json]] = {}
    for record in records:
        if record["point"]["model"] == records[-1]["point"]["model"]:
            shared = json.dumps([record["point"][name] for name in _SHARED])
            tables.setdefault(shared, []).append(record)
    path = out / f"{NAME}.md"
    write_whole(path, "\n".join(map(as_markdown, tables.values())))
    return [path]


def redraw(results: Path) -> list[Path]:
    """Write the table again from the records below the folder of all results; return its path."""
    return report(results / NAME)


def table_rows(records: Sequence[Json]) -> list[list[str]]:
    """Headings, then a row for each setting: whether it found the passkeys, and at each depth how many digits."""
    depths = records[-1]["point"]["depths"]
    places = [f"{depth / depths:.0%}" for depth in range(depths)]
    rows = [["attention", "found", "digits first", "log-probability of a digit", *places, "seconds a depth"]]
    by_setting: dict[str, dict[int, Json]] = {}
    for record in records:
        by_setting.setdefault(setting_name(record["point"]["setting"]), {})[record["point"]["depth"]] = record
    for name, of in by_setting.items():
        cells = [str(of[depth]["ranks"].count(0)) if depth in of else "" for depth in range(depths)]
        seconds = sum(record["elapsed_s"] for record in of.values()) / len(of)
        number = sum(record["found"] for record in of.values())
        ranks, chances = (
            [x for record in of.values() for x in record[name]] for name in ("ranks", "log_probabilities")
        )
        first, mean = ranks.count(0) / len(ranks), sum(chances) / len(chances)
        rows.append([name, f"{number} of {len(of)}", f"{first:.0%}", f"{mean:.2f}", *cells, f"{seconds:.1f}"])
    return rows


def as_markdown(records: Sequence[Json]) -> str:
    """The table with how it was made."""
    point, here = records[-1]["point"], records[-1]["environment"]
    headings, *rows = table_rows(records)
    lines = [
        f"{point['model'][0]} looks for a passkey of five digits in {point['num_tokens']:,} tokens of "
        f"{point['text'][0]}, {'in its chat template' if point['frame'] == 'chat' else 'without a template'}. Each "
        "digit is asked for after the right ones before it: how many are the likeliest of all tokens, and the natural "
        f"logarithm of their probability (one of ten digits at random: {-math.log(10):.1f}). Found: all five. Then the "
        f"digits found at each depth. {here['cpu']}, {counted(point['threads'], 'thread')}, float32, PyTorch "
        f"{here['torch']}, {days_and_commits(records)}. The text before the passkey is read once for all depths.",
        "",
        markdown_table(headings, rows),
    ]
    return "\n".join(lines) + "\n"
