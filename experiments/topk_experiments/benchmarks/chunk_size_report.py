"""Tables and pictures of `chunk_size` from its records. Nothing here measures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..runs.points import newest_records
from ..runs.records import Json
from ..show.plots import draw_memory_and_time
from ..show.quoted import CHUNK_SIZE as PAPER
from ..show.quoted import CHUNK_SIZE_LENGTH as PAPER_LENGTH
from .chunk_size import LINES, METHODS, SCHEMA
from .tables import MEASURED, Page, by_setting, curves_over, how_measured, measured_cells, quoted_by_field, write_report

_PAPER_NAME = f"query chunks, L = {PAPER_LENGTH:,}, Gupta et al. 2021 (quoted, GPU)"
_SETTINGS = ("length", "num_heads", "head_dim", "is_causal", "device", "threads")


def report(out: Path) -> list[Path]:
    """Write `chunk-size.md` with all records on file and a picture for each length and mask."""
    return write_report(
        out / "chunk-size.md",
        newest_records(out / LINES, SCHEMA),
        _SETTINGS,
        _page,
        lambda group, suffix: _draw(group, out / f"chunk-size{suffix}.png"),
    )


def pages(records: Sequence[Json]) -> list[Page]:
    """A table for each setting."""
    return [_page(group) for group in by_setting(records, _SETTINGS)]


def _page(records: Sequence[Json]) -> Page:
    """A table of records of one setting, with the paper's numbers below where it is the paper's."""
    order = list(METHODS)
    records = sorted(records, key=lambda record: (order.index(record["point"]["method"]), _size(record)))
    rows = []
    for record in records:
        point = record["point"]
        size = "" if point["chunk_size"] is None else f"{point['chunk_size']:,}"
        rows.append((_name(point), size, *measured_cells(record)))
    if _is_papers(records[0]["point"]):
        name = f"paper, L = {PAPER_LENGTH:,}, quoted"
        rows += [(name, f"{size:,}", f"{gib:.2f}", f"{seconds:.2f}", "") for size, (gib, seconds) in PAPER.items()]
    notes = [*how_measured(records), "Memory is the peak above query, key and value; time: median."]
    return Page(_title(records[0]["point"]), ("method", "chunk", *MEASURED), rows, notes)


def _size(record: Json) -> int:
    return record["point"]["chunk_size"] or 0


def _is_papers(point: Json) -> bool:
    return (point["num_heads"], point["head_dim"], point["is_causal"]) == (12, 64, False)


def _title(point: Json) -> str:
    mask = "causal" if point["is_causal"] else "no mask"
    heads = f"{point['num_heads']} heads of {point['head_dim']}"
    return f"Attention, forward pass, L = {point['length']:,}, {heads}, {mask}, float32"


def _name(point: Json) -> str:
    description = METHODS[point["method"]].description
    return description if point["k"] is None else f"{description}, k = {point['k']}"


def _draw(records: Sequence[Json], path: Path) -> list[Path]:
    point = records[0]["point"]
    finished = {_size(record) for record in records if record["outcome"] == "finished"} - {0}
    if len(finished) < 2:
        return []
    curves, levels = curves_over("chunk_size", records, _name)
    draw_memory_and_time(
        curves,
        path,
        x="chunk_size",
        x_label="C, queries in a chunk",
        title=_title(point),
        quoted=quoted_by_field({_PAPER_NAME: PAPER}) if _is_papers(point) else None,
        quoted_like={_PAPER_NAME: METHODS["vanilla-chunks"].description},
        levels=levels,
        panels=(("peak_mib", "Peak memory of a forward pass [GiB]", 1 / 1024), ("elapsed_s", "Forward [s]", 1.0)),
    )
    return [path]
