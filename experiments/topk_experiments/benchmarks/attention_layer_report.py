"""Tables and pictures of `attention_layer` from its records. Nothing here measures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ..runs.points import newest_records
from ..runs.records import Json
from ..show.plots import draw_memory_and_time
from ..show.quoted import ATTENTION_LAYER as PAPER
from .attention_layer import IMPLEMENTATIONS, LINES, SCHEMA
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

# implementation -> what the paper calls it. Its query chunking is written out, with all heads at a time.
_PAPER_NAMES = {"topk": "topk", "vanilla": "vanilla", "vanilla-chunks": "query-chunks", "performer": "performer"}
_SETTINGS = ("num_heads", "head_dim", "bias", "dropout_p", "projections", "device", "threads")
# Which others stand beside a picture over k: one line each.
_LEVELS = ("sdpa", "performer", "rfa", "vanilla-chunks")
_QUOTED = (
    "Quoted: Gupta et al. 2021, read off the figure, on a GPU and with dropout 0.1; its query chunking stands beside "
    "vanilla-chunks."
)


def report(out: Path) -> list[Path]:
    """Write `attention.md` with all records on file and a picture for each sweep over length or k among them."""
    return write_report(
        out / "attention.md",
        newest_records(out / LINES, SCHEMA),
        _SETTINGS,
        _page,
        lambda group, suffix: [
            *_draw_lengths(group, out / f"attention{suffix}.png"),
            *_draw_ks(group, out / f"attention-k{suffix}.png"),
        ],
    )


def pages(records: Sequence[Json]) -> list[Page]:
    """A table for each setting."""
    return [_page(group) for group in by_setting(records, _SETTINGS)]


def _page(records: Sequence[Json]) -> Page:
    """A table of records of one setting, by length."""
    order = list(IMPLEMENTATIONS)
    records = sorted(
        records,
        key=lambda record: (
            record["point"]["length"],
            order.index(record["point"]["implementation"]),
            record["point"]["backend"] or "",
            record["point"]["k"] or 0,
        ),
    )
    rows, is_quoted = [], False
    for record in records:
        point, paper = record["point"], paper_of(record["point"])
        is_quoted |= paper is not None
        quoted = ("", "") if paper is None else tuple(f"{number:.2f}" for number in paper)
        rows.append((curve_name(point), f"{point['length']:,}", *measured_cells(record), *quoted))
    headings = ("implementation", "L", *MEASURED, "paper [GiB], quoted", "paper [s], quoted")
    notes = [*how_measured(records), PEAK_OF_LAYER, *([_QUOTED] if is_quoted else [])]
    return Page(title(records[0]["point"]), headings, rows, notes)


def title(point: Json) -> str:
    """What all points of a table share."""
    what = "One causal self-attention layer" if point["projections"] else "Causal attention alone, without projections"
    parts = [what, f"{point['num_heads']} heads of {point['head_dim']}"]
    parts += [] if point["bias"] == "none" else ["a learned bias for each head and distance"]
    parts += [f"dropout {point['dropout_p']:g}"] if point["dropout_p"] else []
    return f"{', '.join(parts)}, forward and backward, float32"


def curve_name(point: Json) -> str:
    """What a table or a picture calls an implementation with its settings."""
    name = IMPLEMENTATIONS[point["implementation"]]
    match point["implementation"]:
        case "topk":
            return f"{name}, k = {point['k']} ({point['backend']})"
        case "query-chunks":
            return f"{name} ({point['backend']})"
        case "performer" | "rfa":
            return f"{name}, {point['num_features']} features"
    return name


def paper_of(point: Json) -> tuple[float, float] | None:
    """(GiB, seconds) that the paper has for a point, in its setting alone."""
    return _papers_curve(point).get(point["length"])


def _papers_curve(point: Json) -> dict[int, tuple[float, float]]:
    if tuple(point[name] for name in _SETTINGS[:3]) != (12, 64, "none") or not point["projections"]:
        return {}
    sizes = {"topk": point["k"] == 128, "performer": point["num_features"] == 256}
    return (
        PAPER.get(_PAPER_NAMES.get(point["implementation"], ""), {}) if sizes.get(point["implementation"], True) else {}
    )


def _draw_lengths(records: Sequence[Json], path: Path) -> list[Path]:
    swept = with_several("length", records)
    if not any(record["outcome"] == "finished" for record in swept):
        return []
    curves, _ = _curves("length", swept)
    papers: dict[str, dict[int, tuple[float, float]]] = {}
    like: dict[str, str] = {}
    for record in swept:
        name, quoted = IMPLEMENTATIONS[record["point"]["implementation"]], _papers_curve(record["point"])
        label = f"{name}, Gupta et al. 2021 (quoted, GPU)"
        if quoted and label not in papers:
            papers[label], like[label] = quoted, curve_name(record["point"])
    draw_memory_and_time(
        curves,
        path,
        x="length",
        x_label="L, length of the sequence",
        title=_picture_title(records[0]),
        quoted=quoted_by_field(papers),
        quoted_like=like,
    )
    return [path]


def _draw_ks(records: Sequence[Json], path: Path) -> list[Path]:
    """Over k at the length at which most k were measured."""
    length = size_with_most("k", records, "length")
    if length is None:
        return []
    there = [record for record in records if record["point"]["length"] == length]
    swept = [
        record for record in there if record["point"]["k"] is not None or record["point"]["implementation"] in _LEVELS
    ]
    if not any(record["outcome"] == "finished" for record in swept):
        return []
    curves, levels = _curves(
        "k", swept, lambda point: f"top-k ({point['backend']})" if point["k"] else curve_name(point)
    )
    draw_memory_and_time(
        curves,
        path,
        x="k",
        x_label="k, keys kept per query",
        title=f"{_picture_title(records[0])}, L = {length:,}",
        levels=levels,
    )
    return [path]


def _curves(
    x: str, records: Sequence[Json], name: Callable[[Json], str] = curve_name
) -> tuple[dict[str, list[Json]], dict[str, Json]]:
    """`curves_over` in the order of IMPLEMENTATIONS, with the backend that was measured first before others."""
    order = list(IMPLEMENTATIONS)
    return curves_over(x, sorted(records, key=lambda record: order.index(record["point"]["implementation"])), name)


def _picture_title(record: Json) -> str:
    point = record["point"]
    threads = f", {point['threads']} CPU threads" if point["device"] == "cpu" else f", {point['device']}"
    return title(point) + threads
