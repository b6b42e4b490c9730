"""The table of passkeys that were found, from the records. Nothing in this file measures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ..models.settings import setting_name
from ..runs.ledger import newest, on_file
from ..runs.records import Json, days_and_commits, reads, write_whole
from ..show.html import counted

NAME, SCHEMA = "passkey", "topk_attention/passkey/1"
_SHARED = ("depths", "num_tokens", "model", "text")


@reads(f"{NAME}.jsonl")
def report(out: Path) -> list[Path]:
    """Write `passkey.md` of the records in a folder that share their settings with the last; returns its path."""
    records = newest(on_file(out / f"{NAME}.jsonl", SCHEMA), lambda record: json.dumps(record["point"], sort_keys=True))
    if not records:
        return []
    last = records[-1]["point"]
    shown = [record for record in records if all(record["point"][name] == last[name] for name in _SHARED)]
    path = out / f"{NAME}.md"
    write_whole(path, as_markdown(shown))
    return [path]


def redraw(results: Path) -> list[Path]:
    """Write the table again from the records below the folder of all results; return its path."""
    return report(results / NAME)


def table_rows(records: Sequence[Json]) -> list[list[str]]:
    """Headings, then a row for each setting: at which depths it found the passkey, and the probability it gave it."""
    depths = records[-1]["point"]["depths"]
    rows = [["attention", "found", *(f"{depth / depths:.0%}" for depth in range(depths)), "seconds a depth"]]
    by_setting: dict[str, dict[int, Json]] = {}
    for record in records:
        by_setting.setdefault(setting_name(record["point"]["setting"]), {})[record["point"]["depth"]] = record
    for name, of in by_setting.items():
        cells = [_cell(of[depth]) if depth in of else "" for depth in range(depths)]
        seconds = sum(record["elapsed_s"] for record in of.values()) / len(of)
        number = sum(record["found"] for record in of.values())
        rows.append([name, f"{number} of {len(of)}", *cells, f"{seconds:.1f}"])
    return rows


def _cell(record: Json) -> str:
    return f"{'yes' if record['found'] else 'no'} ({record['probability']:.2f})"


def as_markdown(records: Sequence[Json]) -> str:
    """The table with how it was made."""
    point, here = records[-1]["point"], records[-1]["environment"]
    headings, *rows = table_rows(records)
    lines = [
        f"{point['model'][0]} looks for a passkey of five digits in {point['num_tokens']:,} tokens of "
        f"{point['text'][0]}; columns: how deep it is hidden. Yes: each digit is the most likely token; in parentheses "
        f"the probability of all. {here['cpu']}, {counted(point['threads'], 'thread')}, float32, PyTorch "
        f"{here['torch']}, {days_and_commits(records)}. The text before the passkey is read once for all depths.",
        "",
        *("| " + " | ".join(row) + " |" for row in (headings, ["---"] * len(headings), *rows)),
    ]
    return "\n".join(lines) + "\n"
