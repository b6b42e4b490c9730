"""Table and picture of decoding steps, from their records. Nothing in this module measures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...runs.ledger import is_finished, newest, on_file
from ...runs.records import Json, reads, write_whole
from ...show.html import counted
from ...show.plots import QUOTED, STYLES, new_figure, save
from ..tables import Page, busy_notes, head
from .works import METHODS, OURS, Work

NAME, SCHEMA = "decode", "topk_attention/decode/1"
_HEADINGS = (
    "method",
    "time [ms]",
    "fastest to slowest [ms]",
    "x reading the keys",
    "x as fast as enable_gqa",
    "x as fast as PyTorch's best",
)
_RIVALS = ("sdpa", "sdpa-rows")
_COLOURS = {"sdpa": STYLES["vanilla"].colour, "sdpa-rows": STYLES["full"].colour}


def in_words(record: Json) -> str:
    """The medians of a record on one line."""
    shown = [f"{name} {1e3 * of['median_s']:.2f} ms" for name, of in record["methods"].items() if "median_s" in of]
    return ", ".join([*shown, f"reading the keys {1e3 * record['floor']['median_s']:.2f} ms"])


@reads(f"{NAME}.jsonl")
def report(out: Path) -> list[Path]:
    """Write `decode.md` and `decode.png` of all records on file in a folder; returns the files written."""
    records = newest(on_file(out / f"{NAME}.jsonl", SCHEMA), _identity)
    if not records:
        return []
    table, picture = out / f"{NAME}.md", out / f"{NAME}.png"
    write_whole(table, "\n".join(page.as_markdown() for page in pages(records)))
    threads = records[-1]["request"]["threads"]
    finished = [one for one in sorted(records, key=_order) if is_finished(one) and one["request"]["threads"] == threads]
    if not finished:
        return [table]
    save(draw(finished), picture)
    return [table, picture]


def _identity(record: Json) -> str:
    request = record["request"]
    return json.dumps([request["work"], request["threads"], request["seed"]], sort_keys=True)


def pages(records: Sequence[Json]) -> list[Page]:
    """A table for each work and number of threads; how they were measured stands below the last."""
    shown = [_page(record) for record in sorted(records, key=_order)]
    notes = [
        "Medians of rounds in which the methods took turns, each answer checked against float64 first. Reading the "
        "keys: the time in which the same threads add up all keys once. PyTorch's best: the faster of its two forms.",
        *missing_notes(records),
        *busy_notes(records),
    ]
    return [*shown[:-1], replace(shown[-1], notes=notes)] if shown else []


def _order(record: Json) -> tuple[int, int, bool]:
    """Few threads first, then long works, then float32."""
    work = record["request"]["work"]
    return record["request"]["threads"], -work["num_heads"] * work["num_keys"], work["dtype"] != "float32"


def _page(record: Json) -> Page:
    request = record["request"]
    rows = _rows(record) if is_finished(record) else [(record["outcome"], *[""] * (len(_HEADINGS) - 1))]
    title = f"One decoding step: {Work(**request['work'])}"
    return Page(title, _HEADINGS, rows, [], head=head([record], threads=request["threads"]))


def _rows(record: Json) -> list[tuple[str, ...]]:
    floor, methods = record["floor"], record["methods"]
    medians = {name: of["median_s"] for name, of in methods.items() if "median_s" in of}
    theirs = [medians[name] for name in _RIVALS if name in medians]
    rows = []
    for name, of in methods.items():
        if name not in medians:
            rows.append((METHODS[name], of["outcome"], *[""] * (len(_HEADINGS) - 2)))
            continue
        against = ("", "")
        if name in OURS and "sdpa" in medians:
            against = (f"{medians['sdpa'] / medians[name]:.1f}", f"{min(theirs) / medians[name]:.1f}")
        rows.append((METHODS[name], *_times(of), f"{medians[name] / floor['median_s']:.2f}", *against))
    return [*rows, ("reading the keys", *_times(floor), "1", "", "")]


def _times(of: Json) -> tuple[str, str]:
    return f"{1e3 * of['median_s']:.2f}", f"{1e3 * of['fastest_s']:.2f} to {1e3 * of['slowest_s']:.2f}"


def missing_notes(records: Sequence[Json]) -> list[str]:
    """Methods that could not take their turn, and why."""
    missing: dict[str, None] = {}
    for record in records:
        for name, of in record.get("methods", {}).items():
            if of["outcome"] != "finished":
                missing[f"{METHODS[name]}: {of['outcome']} ({of['message'].splitlines()[0]})."] = None
    return list(missing)


def draw(records: Sequence[Json]) -> Any:
    """A panel for each work: a bar for each method, and a line at the time of reading the keys."""
    figure = new_figure(width=11, height=1.2 + 2.1 * ((len(records) + 1) // 2))
    for number, record in enumerate(records, 1):
        axes = figure.add_subplot((len(records) + 1) // 2, min(2, len(records)), number)
        shown = [(name, 1e3 * of["median_s"]) for name, of in record["methods"].items() if "median_s" in of]
        labels, heights = [METHODS[name] for name, _ in shown], [ms for _, ms in shown]
        colours = [_COLOURS.get(name, STYLES["topk"].colour) for name, _ in shown]
        bars = axes.barh(labels, heights, color=colours, height=0.65)
        axes.bar_label(bars, [f"{ms:.2f} ms" for ms in heights], padding=3, fontsize=8)
        axes.axvline(1e3 * record["floor"]["median_s"], color=QUOTED, linestyle="--", linewidth=1)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.25 * max(heights))
        work = Work(**record["request"]["work"])
        axes.set_title(f"{work.sizes}, {work.dtype}", fontsize=9, loc="left")
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    request = records[-1]["request"]
    threads = counted(request["threads"], "CPU thread")
    title = f"One decoding step [ms], k = {request['work']['k']}, {threads}; dashed: reading the keys once"
    figure.suptitle(title, fontsize=10)
    return figure
