"""The table from the records. Nothing in this module measures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...runs.ledger import is_finished, newest, on_file
from ...runs.records import Json, days_and_commits, reads, write_whole
from ..tables import Page

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = "topk_attention/long-cache/1"
NAME = "long-cache"  # of the files
_HEADINGS = (
    *("cached tokens", "files [GiB]", "index in memory [GiB]", "process, without pages of files [GiB]"),
    *("first token, nothing in memory [s]", "token [s]", "of it attention [s]", "read from disk for a token [MiB]"),
    *("continue: check and index [s]", "full attention, one layer [s]"),
)
_GIB = 2**30


def in_words(record: Json) -> str:
    """A finished point in a few words."""
    return f"{record['token_s']:.3g} s a token, the first {record['first_token_s']:.3g} s"


def show(records: Sequence[Json], console: Console) -> None:
    if finished := [record for record in records if is_finished(record)]:
        _page(finished).show(console)


@reads(f"{NAME}.jsonl")
def report(out: Path) -> list[Path]:
    """Write `long-cache.md` from the records on file; returns the files written."""
    records = newest(on_file(out / f"{NAME}.jsonl", SCHEMA), lambda record: json.dumps(record["point"], sort_keys=True))
    records = sorted(filter(is_finished, records), key=lambda record: record["point"]["tokens"])
    if not records:
        return []
    path = out / f"{NAME}.md"
    write_whole(path, _page(records).as_markdown())
    return [path]


def _page(records: Sequence[Json]) -> Page:
    return Page(
        title="A token over a context in files",
        headings=_HEADINGS,
        rows=[_row(record) for record in records],
        notes=[*_notes(records), f"Measured {days_and_commits(records)}."],
        has_list=True,
    )


def _row(record: Json) -> tuple[str, ...]:
    late = record["steps"][len(record["steps"]) // 2 :]
    attention_s = sorted(step["attention_s"] for step in late)[len(late) // 2]
    return (
        f"{record['point']['tokens']:,}",
        f"{record['file_bytes'] / _GIB:.1f}",
        f"{record['index_bytes'] / _GIB:.2f}",
        f"{record['anonymous_bytes'] / _GIB:.2f}",
        f"{record['first_token_s']:.2f}",
        f"{record['token_s']:.3f}",
        f"{attention_s:.3f}",
        f"{record['token_read_bytes'] / 2**20:.1f}",
        f"{record['indexed']['wall_s']:.0f}",
        f"{record['full_attention_of_a_layer']['wall_s']:.2f}",
    )


def _notes(records: Sequence[Json]) -> list[str]:
    return [
        *dict.fromkeys(map(_note, records)),
        *map(_check, records),
        "The index counts with the place that it keeps for later keys; the process counts what it has touched.",
    ]


def _check(record: Json) -> str:
    checked = record["checked"]
    layers, heads = (" and ".join(map(str, checked[name])) for name in ("layers", "heads"))
    return (
        f"{record['point']['tokens']:,} tokens, checked in layers {layers}: the same bits as the operation on "
        f"tensors in memory without an index; heads {heads} within {checked['largest_error']:.1g} of a dense "
        "computation in float64."
    )


def _note(record: Json) -> str:
    point = record["point"]
    return (
        f"Attention alone: {point['layers']} layers, {point['heads']} query heads on {point['key_heads']} key heads of "
        f"{point['head_dim']}, {point['dtype']}, k = {point['k']}, {point['threads']} thread(s); the median of the "
        f"later half of {point['steps']} tokens. A page of 4 KiB for each key that a head keeps would be "
        f"{record['reckoned_read_bytes'] / 2**20:,.0f} MiB a token; keys that are scored and not kept "
        "come on top, pages that lie in memory already do not count."
    )
