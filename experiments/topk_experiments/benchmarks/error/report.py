"""Tables, sentences and a picture from the records. Nothing in this module measures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...runs.ledger import is_finished, newest, on_file
from ...runs.progress import say
from ...runs.records import Json, reads, write_whole
from ...show.markdown import markdown_table
from ...show.plots import QUOTED, legend_below, new_figure, plain_numbers, save, styles
from ..tables import Page, busy_notes, by_setting, head
from .measure import METHODS

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = "topk_attention/attention-error/1"
NAME = "error"  # of the files
_HEADINGS = (
    *("method", "size", "relative error", "worst head", "largest error", "forward [s]", "forward + backward [s]"),
    *("peak forward [MiB]", "peak forward + backward [MiB]"),
)
_SETTINGS = ("model", "text", "layers", "device", "threads")
_OURS = tuple(name for name, method in METHODS.items() if method.size == "k")
_COMPLETED = "topk-completed"
_RANDOM = tuple(name for name, method in METHODS.items() if method.is_random)
# What a method costs: name, and label of its axis.
_COSTS = {
    "forward time": "Forward [s]",
    "forward and backward time": "Forward and backward [s]",
    "memory of forward": "Peak memory of forward [MiB]",
    "memory of forward and backward": "Peak memory of forward and backward [MiB]",
}


def costs_of(record: Json) -> dict[str, float]:
    """The costs of a finished record by name, in the units of the labels."""
    seconds = (record["forward"]["elapsed_s"], record["forward_backward"]["elapsed_s"])
    return dict(zip(_COSTS, (*seconds, record["forward_peak_mib"], record["forward_backward_peak_mib"]), strict=True))


def in_words(record: Json) -> str:
    """A finished point in a few words."""
    costs = costs_of(record)
    return f"error {record['relative_error']:.3g}, {costs['forward time']:.3g} s, {costs['memory of forward']:,.0f} MiB"


def show(records: Sequence[Json], console: Console) -> None:
    """A table for each length, and how the numbers were measured."""
    for page in _pages(records):
        page.show(console)
    for line in notes(records):
        say(console, line)


@reads(f"{NAME}.jsonl")
def report(out: Path) -> list[Path]:
    """Write `error.md` and `error.png` from the records on file that share their settings with the last one.

    Returns the files written.
    """
    records = newest(on_file(out / f"{NAME}.jsonl", SCHEMA), lambda record: json.dumps(record["point"], sort_keys=True))
    if not records:
        return []
    order = list(METHODS)
    records = sorted(
        by_setting(records, _SETTINGS)[-1],
        key=lambda record: (order.index(record["point"]["method"]), record["point"]["size"] or 0),
    )
    written = [out / f"{NAME}.md"]
    write_whole(written[0], as_markdown(records))
    if any(is_finished(record) and record["point"]["size"] is not None for record in records):
        written.append(out / f"{NAME}.png")
        draw(records, written[1])
    return written


def as_markdown(records: Sequence[Json]) -> str:
    """A page: how it was measured, then for each length all points, and what random features reach at equal cost."""
    parts = [f"# {title(records)}", *notes(records)]
    for page, of_length in zip(_pages(records), by_setting(records, ("length",)), strict=True):
        parts += [f"## {page.title}", markdown_table(page.headings, page.rows)]
        for cost in _COSTS:
            if rows := equal_cost(of_length, cost):
                others = (METHODS[method].description for method in _compared_with(of_length))
                headings = ("top-k", cost, "its error", *others)
                parts.append(f"The lowest error of each within the {cost} of top-k attention:")
                parts.append(markdown_table(headings, rows))
    return "\n\n".join(parts) + "\n"


def equal_cost(records: Sequence[Json], cost: str) -> list[tuple[str, ...]]:
    """For each k of top-k attention its cost and error, and the lowest error of each other method at no higher cost.

    Completed attention is one of the others, and has rows of its own after those of top-k attention alone. Both
    variants of Performer do the same work. Each counts with the cost of the cheaper one.
    """
    finished = [record for record in records if is_finished(record)]
    cheapest_last = sorted(finished, key=lambda record: costs_of(record)[cost], reverse=True)
    costs = {_work(record): costs_of(record)[cost] for record in cheapest_last}
    rows = []
    for ours in (record for name in _OURS for record in finished if record["point"]["method"] == name):
        limit = costs[_work(ours)]
        completed = ", completed" if ours["point"]["method"] == _COMPLETED else ""
        name = f"k = {ours['point']['size']:,}{completed}"
        cells = [name, _three_digits(limit), _three_digits(ours["relative_error"])]
        for method in _compared_with(records):
            of_method = (record for record in finished if record["point"]["method"] == method)
            within = (record for record in of_method if costs[_work(record)] <= limit)
            best = min(within, key=lambda record: record["relative_error"], default=None)
            is_own_row = completed and method == _COMPLETED
            cells.append("" if is_own_row else "none" if best is None else _error_with_size(best))
        rows.append(tuple(cells))
    return rows


def _compared_with(records: Sequence[Json]) -> tuple[str, ...]:
    """The methods that have a column beside top-k attention; completed attention only where it was measured."""
    is_measured = any(is_finished(record) and record["point"]["method"] == _COMPLETED for record in records)
    return (_COMPLETED, *_RANDOM) if is_measured else _RANDOM


def _error_with_size(record: Json) -> str:
    size = record["point"]["size"]
    of_size = f"k = {size:,}" if record["point"]["method"] in _OURS else f"{size:,} features"
    return f"{record['relative_error']:.3g} ({of_size})"


def _work(record: Json) -> tuple[str, int | None]:
    """What is computed, apart from the numbers that it is computed with."""
    return record["point"]["method"].removesuffix("-tuned"), record["point"]["size"]


def title(records: Sequence[Json]) -> str:
    point = records[0]["point"]
    return f"Error of attention in {point['model'][0]} reading {point['text'][0]}"


def notes(records: Sequence[Json]) -> list[str]:
    """How the numbers were measured."""
    point = records[0]["point"]
    layers = ", ".join(map(str, point["layers"]))
    draws = max(record["point"]["draws"] or 1 for record in records)
    return [
        head(records, threads=point["threads"], device=point["device"], dtype="float32"),
        f"Causal attention of all heads of layers {layers}; keys and values repeated for the query heads that share "
        "them. Relative error: |output - dense| / |dense| of a head (Euclidean norms; dense attention in float64), "
        f"mean over heads and layers{f' and {draws} draws of random features' if draws > 1 else ''}. Worst head: the "
        "largest of those. Largest error: the largest difference in one number, as a fraction of the head's largest "
        "number. Zeros in place of the output would have relative error 1.",
        "Time: one layer, median over layers and repetitions. Memory: peak above query, key, value and the gradient of "
        "the output.",
        "Random features are made for models that are trained with them; here they take the place of softmax in a "
        "model that was not. In favour of them, each head of RFA has the sigma, and each head of the tuned Performer "
        "the factor on its scores, with which its error on these very data is lowest, of a grid.",
        *busy_notes([record | record.get("forward_backward", {}) for record in records]),
    ]


def draw(records: Sequence[Json], path: Path) -> None:
    """Error against each cost, a row of panels for each length."""
    by_length = by_setting(records, ("length",))
    figure = new_figure(width=4.4 * len(_COSTS), height=0.6 + 3.6 * len(by_length))
    panels = iter(figure.subplots(len(by_length), len(_COSTS), squeeze=False).flat)
    for of_length in by_length:
        for cost, label in _COSTS.items():
            axes = next(panels)
            _draw_panel(axes, [record for record in of_length if is_finished(record)], cost)
            axes.set_xlabel(label)
            axes.set_title(f"{of_length[0]['point']['length']:,} tokens", fontsize=10, loc="left")
    for axes in figure.axes[:: len(_COSTS)]:
        axes.set_ylabel("relative error")
    legend_below(figure, columns=6)
    figure.suptitle(title(records), fontsize=10)
    save(figure, path)


def _draw_panel(axes: Any, finished: Sequence[Json], cost: str) -> None:
    style_of = styles(about.description for about in METHODS.values())
    for method in (name for name, about in METHODS.items() if about.size is not None):
        of_method = [record for record in finished if record["point"]["method"] == method]
        points = sorted(
            (record["point"]["size"], costs_of(record)[cost], record["relative_error"]) for record in of_method
        )
        if not points:
            continue
        _, costs, errors = zip(*points, strict=True)
        label = METHODS[method].description
        colour, marker, line = style_of[label]
        axes.plot(costs, errors, label=label, color=colour, marker=marker, linestyle=line, markersize=4)
        for size, x, y in (points[0], points[-1]):
            axes.annotate(f"{size:,}", (x, y), textcoords="offset points", xytext=(4, 4), fontsize=6, color=colour)
    for record in finished:
        method = record["point"]["method"]
        style = {"color": QUOTED, "linewidth": 1, "label": METHODS[method].description}
        if method == "sdpa":
            style["color"] = style_of[METHODS[method].description].colour
            axes.axvline(costs_of(record)[cost], linestyle="--", **style)
        if method == "uniform":
            axes.axhline(record["relative_error"], linestyle=":", **style)
    axes.set_xscale("log")
    axes.set_yscale("log")
    plain_numbers(axes.xaxis)
    plain_numbers(axes.yaxis)
    axes.grid(alpha=0.25, which="both")


def _pages(records: Sequence[Json]) -> list[Page]:
    """A table for each length."""
    return [
        Page(f"{group[0]['point']['length']:,} tokens", _HEADINGS, [_row(record) for record in group], ())
        for group in by_setting(records, ("length",))
    ]


def _row(record: Json) -> tuple[str, ...]:
    point = record["point"]
    name = (METHODS[point["method"]].description, "" if point["size"] is None else f"{point['size']:,}")
    if not is_finished(record):
        return (*name, record["outcome"], *[""] * (len(_HEADINGS) - 3))
    errors = (record[field] for field in ("relative_error", "worst_relative_error", "largest_error"))
    return (*name, *map(_three_digits, (*errors, *costs_of(record).values())))


def _three_digits(number: float) -> str:
    """Three significant digits, without an exponent for large numbers."""
    return f"{number:,.0f}" if number >= 1000 else f"{number:.3g}"
