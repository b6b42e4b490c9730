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

SCHEMA = "topk_attention/sequence-parallel/1"
NAME = "sequence-parallel"  # of the files
_HEADINGS = (
    *("tokens", "processes", "threads of each", "step [s]", "of one process, as many threads each"),
    *("of one process, as many threads in all", "CPU, all processes [s]", "peak of a process [MiB]", "of one process"),
    *("sent for attention of a layer, forward and backward [MiB]",),
)


def in_words(record: Json) -> str:
    """A finished point in a few words."""
    return f"{record['elapsed_s']:.3g} s a step, {record['peak_mib']:,.0f} MiB"


def show(records: Sequence[Json], console: Console) -> None:
    if finished := [record for record in records if is_finished(record)]:
        _page(finished).show(console)


@reads(f"{NAME}.jsonl")
def report(out: Path) -> list[Path]:
    """Write `sequence-parallel.md` from the records on file; returns the files written."""
    records = newest(on_file(out / f"{NAME}.jsonl", SCHEMA), lambda record: json.dumps(record["point"], sort_keys=True))
    finished = sorted(filter(is_finished, records), key=_order)
    if not finished:
        return []
    path = out / f"{NAME}.md"
    write_whole(path, _page(finished).as_markdown())
    return [path]


def _order(record: Json) -> tuple[int, ...]:
    point = record["point"]
    return point["tokens"], point["processes"], point["threads"]


def _page(records: Sequence[Json]) -> Page:
    return Page(
        title="A training step of one sequence over processes",
        headings=_HEADINGS,
        rows=[_row(record, records) for record in records],
        notes=[*dict.fromkeys(map(_note, records)), *_checks(records), f"Measured {days_and_commits(records)}."],
        has_list=True,
    )


def _row(record: Json, records: Sequence[Json]) -> tuple[str, ...]:
    point = record["point"]
    paper = record["ranks"][0]["attention_of_a_layer_on_paper"]
    with_as_many_each = _of_one_process(record, records, point["threads"])
    with_as_many = _of_one_process(record, records, point["threads"] * point["processes"])
    return (
        f"{point['tokens']:,}",
        str(point["processes"]),
        str(point["threads"]),
        f"{record['elapsed_s']:.2f}",
        _ratio(record, with_as_many_each, "elapsed_s"),
        _ratio(record, with_as_many, "elapsed_s"),
        f"{record['cpu_s']:.2f}",
        f"{record['peak_mib']:,.0f}",
        _ratio(record, with_as_many or with_as_many_each, "peak_mib"),
        f"{(paper['forward_bytes'] + paper['backward_bytes']) / 2**20:.1f}",
    )


def _of_one_process(record: Json, records: Sequence[Json], threads: int) -> Json | None:
    wanted = {**record["point"], "processes": 1, "threads": threads}
    return next((other for other in records if other["point"] == wanted), None)


def _ratio(record: Json, one: Json | None, field: str) -> str:
    return "" if one is None or record["point"]["processes"] == 1 else f"{record[field] / one[field]:.2f}"


def _checks(records: Sequence[Json]) -> list[str]:
    shared = [record for record in records if record["point"]["processes"] > 1]
    largest = max((rank["largest_gradient_error"] for record in shared for rank in record["ranks"]), default=None)
    if largest is None:
        return []
    losses = [
        abs(record["loss"] - one["loss"])
        for record in shared
        for threads in (record["point"]["threads"], record["point"]["threads"] * record["point"]["processes"])
        if (one := _of_one_process(record, records, threads)) is not None
    ]
    apart = f" The losses of the first step are apart by {max(losses):.1g} at most." if losses else ""
    return [f"For 500 tokens the gradients are within {largest:.1g} of those of one process.{apart}"]


def _note(record: Json) -> str:
    point = record["point"]
    return (
        f"A Llama of {point['layers']} layers, size {point['hidden']}, {point['heads']} query heads on "
        f"{point['key_heads']} key heads, {point['neurons']} neurons, {point['vocabulary']} tokens, float32, top-k "
        f"attention with k = {point['k']}; forward, backward, the sum of gradients and AdamW. The time of a step is "
        f"the median of {record['ranks'][0]['repetitions']} of the slowest process; the peak of memory is that of the "
        "largest process, with weights, optimiser and activations, above what the imports take. Processes talk with "
        "gloo on one machine."
    )
