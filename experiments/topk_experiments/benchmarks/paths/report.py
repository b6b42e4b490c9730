"""The table of ways from their records. Nothing in this module measures."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path

from ...runs.ledger import is_finished, newest, on_file
from ...runs.records import Json, reads, write_whole
from ..tables import Page, head
from .works import ATTENTION_K, NEURONS_SHARE, PATHS

NAME, SCHEMA = "paths", "topk_attention/paths/1"
_MODES = ("forward", "training")


def in_words(record: Json) -> str:
    """The peaks of a record on one line."""
    parts = []
    for mode in _MODES:
        points = [point for point in record["points"] if point["mode"] == mode]
        parts.append(f"{mode} {', '.join(map(_cell, points))} MiB")
    return "; ".join(parts)


@reads(f"{NAME}.jsonl")
def report(out: Path) -> list[Path]:
    """Write `paths.md` of all records on file in a folder; returns the files written."""
    records = newest(on_file(out / f"{NAME}.jsonl", SCHEMA), _identity)
    if not records:
        return []
    table = out / f"{NAME}.md"
    write_whole(table, "\n".join(page.as_markdown() for page in pages(records)))
    return [table]


def _identity(record: Json) -> str:
    request = record["request"]
    return json.dumps([request["path"], request["method"], request["threads"], request["seed"]])


def pages(records: Sequence[Json]) -> list[Page]:
    """One table: two rows for each way and method, forward and a training step."""
    if not records:
        return []
    lengths = sorted({length for record in records for length in record["request"]["lengths"]})
    names = list(PATHS)
    records = sorted(records, key=lambda record: names.index(record["request"]["path"]))
    rows = [row for record in records for row in _rows(record, lengths)]
    headings = (
        "way",
        "mode",
        "method",
        *(f"{length:,} tokens [MiB]" for length in lengths),
        "grows with length to the",
    )
    notes = [
        "Peak of a process above what it held before the pass. One process for each way and method, where freed memory "
        "goes back to the system at once; before the first pass the model and the gradients of its weights are there.",
        f"A model of one layer (gpt-oss and Gemma 2: two) of size 256 with 4 heads, Parakeet of size 64 with one; "
        f"random weights, float32, k = {ATTENTION_K} keys, and a {NEURONS_SHARE}th of the neurons of fused networks "
        "and experts. Beside these stand PyTorch's attention (sdpa) and dense networks, beside others eager attention.",
        "Growth: the power of the length, from the last two; 1 is linear, 2 is quadratic.",
        "Checked first: with every key and neuron output and gradients are those of the model's own code.",
    ]
    lines = head(records, threads=records[-1]["request"]["threads"])
    return [Page("Peak memory of each way through a converted model", headings, rows, notes, has_list=True, head=lines)]


def _rows(record: Json, lengths: Sequence[int]) -> list[tuple[str, ...]]:
    request = record["request"]
    path = PATHS[request["path"]]
    method = f"top-k, k = {ATTENTION_K}" if request["method"] == "top-k" else path.rival
    if not is_finished(record):
        return [(path.label, "", method, record["outcome"], *[""] * len(lengths))]
    rows: list[tuple[str, ...]] = []
    for mode in _MODES:
        points = {point["length"]: point for point in record["points"] if point["mode"] == mode}
        cells = [_cell(points[length]) if length in points else "" for length in lengths]
        rows.append((path.label, mode, method, *cells, _growth(list(points.values()))))
    return rows


def _cell(point: Json) -> str:
    return f"{point['peak_mib']:,.0f}" if point["outcome"] == "finished" else point["outcome"]


def _growth(points: Sequence[Json]) -> str:
    """The power with which memory grew between the last two lengths."""
    known = sorted((point["length"], point["peak_mib"]) for point in points if point["outcome"] == "finished")
    *_, last = itertools.chain([None], itertools.pairwise(known))
    if last is None or not last[0][1] > 0 or not last[1][1] > 0:
        return ""
    (length, mib), (longer, more) = last
    return f"{math.log(more / mib) / math.log(longer / length):.2f}"
