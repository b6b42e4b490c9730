"""The table of networks from their records. Nothing in this module measures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ...runs.ledger import is_finished, newest, on_file
from ...runs.records import Json, reads, write_whole
from ..tables import Page, busy_notes, head
from .works import OURS, Work

NAME, SCHEMA = "networks", "topk_attention/networks/1"
_HEADINGS = ("tokens", "mode", "method", "time [ms]", "fastest to slowest [ms]", "x as fast as the best dense way")
_MODES = {"forward": "forward", "forward_backward": "forward and backward"}


def in_words(record: Json) -> str:
    """How many times as fast as the best dense way our methods are, on one line."""
    parts = []
    for run in record["runs"]:
        best = best_s(run)
        ours = [f"{best / s:.2f}" for name in OURS if best and (s := _median(run, name))]
        parts.append(f"{run['tokens']:,} {_MODES[run['mode']]} {' and '.join(ours) or 'none'}")
    return f"x as fast as the best dense way: {'; '.join(parts)}"


def best_s(run: Json) -> float | None:
    """Of the dense ways, the fastest one's median."""
    times = [s for name in run["methods"] if name not in OURS and (s := _median(run, name)) is not None]
    return min(times, default=None)


def _median(run: Json, name: str) -> float | None:
    return run["methods"].get(name, {}).get("median_s")


@reads(f"{NAME}.jsonl")
def report(out: Path) -> list[Path]:
    """Write `networks.md` of all records on file in a folder; returns the files written."""
    records = newest(on_file(out / f"{NAME}.jsonl", SCHEMA), _identity)
    if not records:
        return []
    table = out / f"{NAME}.md"
    write_whole(table, "\n".join(page.as_markdown() for page in pages(records)))
    return [table]


def _identity(record: Json) -> str:
    request = record["request"]
    return json.dumps([request["work"], request["threads"], request["seed"]], sort_keys=True)


def pages(records: Sequence[Json]) -> list[Page]:
    """A table for each network; how they were measured stands below the last."""
    shown = [_page(record) for record in records]
    notes = [
        "The network of one layer, router included, float32. Weights are random, as the model's class draws them, and "
        "tokens are normal: routers give experts nearly the same number of tokens, and a trained model's do not.",
        "Median of rounds in which all ways took turns in one process. Forward: nothing requires a gradient, and top-k "
        "networks are stored by neuron. Backward: gradients of the tokens and of all weights, made anew.",
        "Checked first: in float64, at a small size, top-k with every neuron gives the dense output and gradients, and "
        "with k neurons those of the reference; at the size that is measured, every neuron gives the dense output.",
        *busy_notes(records),
    ]
    return [*shown[:-1], replace(shown[-1], notes=[*shown[-1].notes, *notes])] if shown else []


def _page(record: Json) -> Page:
    work = Work(**record["request"]["work"])
    rows = _rows(work, record) if is_finished(record) else [("", "", record["outcome"], "", "", "")]
    notes = []
    if record.get("busiest_expert"):
        notes = [f"The busiest expert has {record['busiest_expert']:.2f} times the mean number of tokens."]
    title = f"{work}, weights of {work.weights_gib:.2g} GiB"
    lines = head([record], threads=record["request"]["threads"])
    return Page(title, _HEADINGS, rows, notes, has_list=True, head=lines)


def _rows(work: Work, record: Json) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for run in record["runs"]:
        best = best_s(run)
        for name, of in run["methods"].items():
            label = f"top-k, k = {work.k(name)}" if name in OURS else name
            cells = (f"{run['tokens']:,}", _MODES[run["mode"]], label)
            if of["outcome"] != "finished":
                rows.append((*cells, f"{of['outcome']}: {of['message'].splitlines()[0]}", "", ""))
                continue
            ratio = "" if best is None else f"{best / of['median_s']:.2f}"
            spread = f"{1e3 * of['fastest_s']:.3g} to {1e3 * of['slowest_s']:.3g}"
            rows.append((*cells, f"{1e3 * of['median_s']:.3g}", spread, ratio))
    return rows
