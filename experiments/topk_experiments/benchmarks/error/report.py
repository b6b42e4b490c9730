"""Tables, sentences and a picture from the records. Nothing here measures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...runs.points import newest_records, say
from ...runs.records import Json, days_and_commits, write_whole
from ...runs.timing import busy_note
from ...show.plots import QUOTED, new_figure, plain_numbers, save, styles
from ..tables import Page, by_setting, markdown_table
from .methods import METHODS
from .settings import LINES, SCHEMA

if TYPE_CHECKING:
    from rich.console import Console

_HEADINGS = (
    "method",
    "size",
    "relative error",
    "worst head",
    "largest error",
    "forward [s]",
    "forward + backward [s]",
    "peak forward [MiB]",
    "peak forward + backward [MiB]",
)
_SETTINGS = ("model", "text", "layers", "device", "threads")
_OURS = "topk"
_RIVALS = ("performer", "performer-tuned", "rfa")


def _seconds(mode: str) -> Callable[[Json], float]:
    return lambda record: record[mode]["elapsed_s"]


def _mib(mode: str) -> Callable[[Json], float]:
    return lambda record: record[f"{mode}_peak_mib"]


# What a setting costs: name, how to read it off a record, words for a panel
_COSTS: dict[str, tuple[Callable[[Json], float], str]] = {
    "forward time": (_seconds("forward"), "Forward [s]"),
    "forward and backward time": (_seconds("forward_backward"), "Forward and backward [s]"),
    "memory of forward": (_mib("forward"), "Peak memory of forward [MiB]"),
    "memory of forward and backward": (_mib("forward_backward"), "Peak memory of forward and backward [MiB]"),
}


def in_words(record: Json) -> str:
    """A finished point in a few words."""
    seconds, mib = (of(record) for of, _ in (_COSTS["forward time"], _COSTS["memory of forward"]))
    return f"error {record['relative_error']:.3g}, {seconds:.3g} s, {mib:,.0f} MiB"


def show(records: Sequence[Json], console: Console) -> None:
    """A table for each length, and how the numbers came about."""
    for length, of_length in _by_length(records).items():
        Page(f"{length:,} tokens", _HEADINGS, [_row(record) for record in of_length], ()).show(console)
    for line in notes(records):
        say(console, line)


def report(out: Path) -> list[Path]:
    """Write `error.md` and `error.png` from the records on file that share their settings with the last one.

    Returns the files written.
    """
    on_file = newest_records(out / LINES, SCHEMA)
    if not on_file:
        return []
    order = list(METHODS)
    records = sorted(
        by_setting(on_file, _SETTINGS)[-1],
        key=lambda record: (order.index(record["point"]["method"]), record["point"]["size"] or 0),
    )
    written = [out / "error.md"]
    write_whole(written[0], as_markdown(records))
    if any(record["outcome"] == "finished" and record["point"]["size"] is not None for record in records):
        written.append(out / "error.png")
        draw(records, written[1])
    return written


def as_markdown(records: Sequence[Json]) -> str:
    """A page: how it was made, then for each length all settings, and what rivals reach at equal cost."""
    lines = [f"# {title(records)}", "", *notes(records)]
    for length, of_length in _by_length(records).items():
        lines += ["", f"## {length:,} tokens", "", *markdown_table(_HEADINGS, [_row(record) for record in of_length])]
        for cost in _COSTS:
            rows = equal_cost(of_length, cost)
            if rows:
                headings = ("top-k", cost, "its error", *(METHODS[rival].description for rival in _RIVALS))
                lines += ["", f"The lowest error of each within the {cost} of top-k attention:", ""]
                lines += markdown_table(headings, rows)
    return "\n".join(lines) + "\n"


def equal_cost(records: Sequence[Json], cost: str) -> list[tuple[str, ...]]:
    """For each k of top-k attention its cost and error, and the best that each rival does at no higher cost.

    Both variants of Performer do the same work, so that each counts with what the cheaper one cost.
    """
    finished = [record for record in records if record["outcome"] == "finished"]
    lowest: dict[tuple[str, int | None], float] = {}
    for record in finished:
        measured = _COSTS[cost][0](record)
        lowest[_work(record)] = min(measured, lowest.get(_work(record), measured))

    def value(record: Json) -> float:
        return lowest[_work(record)]

    rows = []
    for ours in finished:
        if ours["point"]["method"] != _OURS:
            continue
        cells = [
            f"k = {ours['point']['size']:,}",
            _three_digits(value(ours)),
            _three_digits(ours["relative_error"]),
        ]
        for rival in _RIVALS:
            within = [
                record for record in finished if record["point"]["method"] == rival and value(record) <= value(ours)
            ]
            best = min(within, key=lambda record: record["relative_error"], default=None)
            cells.append(
                "none" if best is None else f"{best['relative_error']:.3g} ({best['point']['size']:,} features)"
            )
        rows.append(tuple(cells))
    return rows


def _work(record: Json) -> tuple[str, int | None]:
    """What is computed, apart from the numbers it is computed with."""
    method = record["point"]["method"]
    return "performer" if method == "performer-tuned" else method, record["point"]["size"]


def title(records: Sequence[Json]) -> str:
    point = records[0]["point"]
    return f"Error of attention in {point['model'][0]} reading {point['text'][0]}"


def notes(records: Sequence[Json]) -> list[str]:
    """How the numbers came about."""
    point, here = records[0]["point"], records[0]["environment"]
    numbers = ", ".join(map(str, point["layers"]))
    watched = [record["forward_backward"].get("other_cores") for record in records if record["outcome"] == "finished"]
    busy = busy_note(watched, here["num_cpus"])
    draws = max((record["point"]["draws"] or 1 for record in records), default=1)
    return [
        f"{here['cpu'] if point['device'] == 'cpu' else point['device']}, {point['threads']} threads, float32, PyTorch "
        f"{here['torch']}, {days_and_commits(records)}.",
        "",
        f"Causal attention of all heads of layers {numbers}; keys and values repeated for the query heads that share "
        "them. Relative error: |output - dense| / |dense| of a head (Euclidean norms; dense attention in float64), "
        f"mean over heads and layers{f' and {draws} draws of random features' if draws > 1 else ''}. Worst head: the "
        "largest of those. Largest error: the largest difference in one number, as a fraction of the head's largest "
        "number. Zeros "
        "in place of the output would have relative error 1.",
        "",
        "Time: one layer, median over layers and repetitions. Memory: peak above query, key, value and the gradient of "
        "the output.",
        "",
        "Random features are made for models that are trained with them; here they take the place of softmax in a "
        "model that was not. In favour of them, each head of RFA has the sigma, and each head of the tuned Performer "
        "the factor on its scores, with which its error on these very data is lowest, of a grid.",
        *([] if busy is None else ["", busy]),
    ]


def draw(records: Sequence[Json], path: Path) -> None:
    """Error against each cost, a row for each length."""
    lengths = _by_length(records)
    figure = new_figure(width=4.4 * len(_COSTS), height=0.6 + 3.6 * len(lengths))
    for row, (length, of_length) in enumerate(lengths.items()):
        finished = [record for record in of_length if record["outcome"] == "finished"]
        for column, (value, label) in enumerate(_COSTS.values()):
            axes = figure.add_subplot(len(lengths), len(_COSTS), row * len(_COSTS) + column + 1)
            _draw_panel(axes, finished, value)
            axes.set_xlabel(label)
            axes.set_title(f"{length:,} tokens", fontsize=10, loc="left")
            if column == 0:
                axes.set_ylabel("relative error")
            if row == column == 0:
                axes.legend(frameon=False, fontsize=7)
    figure.suptitle(title(records), fontsize=10)
    save(figure, path)


def _draw_panel(axes: Any, finished: Sequence[Json], value: Callable[[Json], float]) -> None:
    style_of = styles(about.description for about in METHODS.values())
    for method in (name for name, about in METHODS.items() if about.size is not None):
        of_method = [record for record in finished if record["point"]["method"] == method]
        points = sorted((record["point"]["size"], value(record), record["relative_error"]) for record in of_method)
        if not points:
            continue
        _, costs, errors = zip(*points, strict=True)
        label = METHODS[method].description
        colour, marker, line = style_of[label]
        axes.plot(costs, errors, label=label, color=colour, marker=marker, linestyle=line, markersize=4)
        for size, x, y in (points[0], points[-1]):
            axes.annotate(f"{size:,}", (x, y), textcoords="offset points", xytext=(4, 4), fontsize=6, color=colour)
    for record in finished:
        if record["point"]["method"] == "sdpa":
            label = METHODS["sdpa"].description
            axes.axvline(value(record), color=style_of[label].colour, linestyle="--", linewidth=1, label=label)
        if record["point"]["method"] == "uniform":
            axes.axhline(
                record["relative_error"], color=QUOTED, linestyle=":", linewidth=1, label=METHODS["uniform"].description
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    plain_numbers(axes.xaxis)
    plain_numbers(axes.yaxis)
    axes.grid(alpha=0.25, which="both")


def _row(record: Json) -> tuple[str, ...]:
    point = record["point"]
    size = "" if point["size"] is None else f"{point['size']:,}"
    if record["outcome"] != "finished":
        return (METHODS[point["method"]].description, size, record["outcome"], *[""] * (len(_HEADINGS) - 3))
    errors = (record[name] for name in ("relative_error", "worst_relative_error", "largest_error"))
    costs = (value(record) for value, _ in _COSTS.values())
    return (METHODS[point["method"]].description, size, *map(_three_digits, (*errors, *costs)))


def _three_digits(number: float) -> str:
    """Three significant digits, without an exponent for large numbers."""
    return f"{number:,.0f}" if number >= 1000 else f"{number:.3g}"


def _by_length(records: Sequence[Json]) -> dict[int, list[Json]]:
    return {group[0]["point"]["length"]: group for group in by_setting(records, ("length",))}
