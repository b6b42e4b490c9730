"""Tables and pictures of `feed_forward_layer` from its records. Nothing here measures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..runs.points import newest_records
from ..runs.records import Json
from ..show.plots import draw_memory_and_time
from ..show.quoted import FEED_FORWARD_LAYER as PAPER
from ..show.quoted import FEED_FORWARD_LAYER_TOKENS as PAPER_TOKENS
from .feed_forward_layer import LINES, METHODS, SCHEMA
from .tables import (
    MEASURED,
    PEAK_OF_LAYER,
    Page,
    by_setting,
    curves_over,
    how_measured,
    measured_cells,
    quoted_by_field,
    size_with_most,
    with_several,
    write_report,
)

# The paper's name -> what computes the same here, the first one that is there.
_COUNTERPARTS = {
    "vanilla": ("vanilla",),
    "query-chunks": ("vanilla-chunks",),
    "topk": ("topk-cpu", "topk-chunked"),
    "topk-sparse": ("topk-torch-sparse",),
}
_WORDS = {
    "vanilla": "vanilla",
    "query-chunks": "query chunks",
    "topk": "top-k",
    "topk-sparse": "top-k, torch.sparse",
}
_SETTINGS = ("tokens", "d_model", "device", "threads")


def report(out: Path) -> list[Path]:
    """Write `feed-forward.md` with all records on file and a picture for each sweep over d_ff or k among them."""
    return write_report(
        out / "feed-forward.md",
        newest_records(out / LINES, SCHEMA),
        _SETTINGS,
        _page,
        lambda group, suffix: [
            *_draw_neurons(group, out / f"feed-forward{suffix}.png"),
            *_draw_ks(group, out / f"feed-forward-k{suffix}.png"),
        ],
    )


def pages(records: Sequence[Json]) -> list[Page]:
    """A table for each setting."""
    return [_page(group) for group in by_setting(records, _SETTINGS)]


def _page(records: Sequence[Json]) -> Page:
    records = sorted(records, key=lambda record: record["point"]["d_ff"])
    rows = [(name_of(record["point"]), f"{record['point']['d_ff']:,}", *measured_cells(record)) for record in records]
    notes = [
        *how_measured(records),
        PEAK_OF_LAYER,
    ]
    if records[0]["point"]["d_model"] == 768:
        rows += [
            (f"paper, {_WORDS[name]}, {PAPER_TOKENS:,} tokens, quoted", f"{d_ff:,}", f"{gib:.2f}", f"{s:.2f}", "")
            for name, points in PAPER.items()
            for d_ff, (gib, s) in points.items()
        ]
        notes.append("Quoted: Gupta et al. 2021, read off the figure, on a GPU.")
    return Page(_title(records[0]["point"]), ("method", "d_ff", *MEASURED), rows, notes)


def name_of(point: Json) -> str:
    """What a table or a picture calls a method with its settings."""
    name = METHODS.get(point["method"], f"top-k ({point['method'].removeprefix('topk-')})")
    return name if point["k"] is None else f"{name}, k = {point['k']}"


def _title(point: Json) -> str:
    threads = f"{point['threads']} CPU threads" if point["device"] == "cpu" else point["device"]
    return (
        f"One feed-forward layer, d_model {point['d_model']}, {point['tokens']:,} tokens, forward and backward, "
        f"float32, {threads}"
    )


def _draw_neurons(records: Sequence[Json], path: Path) -> list[Path]:
    """Over d_ff."""
    swept = with_several("d_ff", records)
    if not any(record["outcome"] == "finished" for record in swept):
        return []
    curves, _ = curves_over("d_ff", swept, name_of)
    papers: dict[str, dict[int, tuple[float, float]]] = {}
    like: dict[str, str] = {}
    for name, methods in _COUNTERPARTS.items():
        for record in swept:
            point = record["point"]
            if point["method"] in methods and point["d_model"] == 768 and point["k"] in (None, 512):
                label = f"{_WORDS[name]}, Gupta et al. 2021 (quoted, GPU, {PAPER_TOKENS:,} tokens)"
                papers[label], like[label] = PAPER[name], name_of(point)
                break
    draw_memory_and_time(
        curves,
        path,
        x="d_ff",
        x_label="d_ff, neurons of the layer",
        title=_title(records[0]["point"]),
        quoted=quoted_by_field(papers),
        quoted_like=like,
    )
    return [path]


def _draw_ks(records: Sequence[Json], path: Path) -> list[Path]:
    """Over k at the size at which most k were measured."""
    d_ff = size_with_most("k", records, "d_ff")
    if d_ff is None:
        return []
    swept = [record for record in records if record["point"]["d_ff"] == d_ff]
    curves, levels = curves_over("k", swept, lambda point: name_of(point | {"k": None}))
    draw_memory_and_time(
        curves,
        path,
        x="k",
        x_label="k, neurons kept per token",
        title=f"{_title(records[0]['point'])}, d_ff = {d_ff:,}",
        levels=levels,
    )
    return [path]
