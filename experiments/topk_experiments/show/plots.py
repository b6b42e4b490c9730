"""Pictures drawn from records. Nothing here measures."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..runs.records import Json, write_whole

COLOURS = (
    *("#2463a6", "#c4571b", "#3b8c4a", "#8a4fa3", "#b8962e", "#2a9d9d", "#a0345a"),
    *("#111111", "#e377c2", "#7fbf3f", "#8c6d4f"),
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p")
QUOTED = "#6b6b6b"
MEMORY_AND_TIME = (
    ("peak_mib", "Peak memory of a step [GiB]", 1 / 1024),
    ("elapsed_s", "Forward and backward [s]", 1.0),
)


def draw_demo(record: Json, path: Path) -> None:
    """Perplexity, seconds and peak memory against k, with full attention as a dashed line.

    record  as `demo.py` writes it, with at least one run
    """
    full = [run for run in record["runs"] if run["k"] is None]
    topk = sorted((run for run in record["runs"] if run["k"] is not None), key=lambda run: run["k"])
    panels = (
        ("perplexity", "Perplexity", "lower is better"),
        ("elapsed_s", "Time of the forward pass [s]", "lower is better"),
        ("peak_mib", "Peak memory above the model [MiB]", "lower is better"),
    )
    figure = new_figure(width=11, height=3.6)
    for number, (field, title, note) in enumerate(panels, 1):
        axes = figure.add_subplot(1, 3, number)
        if topk:
            axes.plot(
                [run["k"] for run in topk],
                [run[field] for run in topk],
                color=COLOURS[0],
                marker="o",
                label="top-k attention",
            )
            axes.set_xscale("log", base=2)
            only_ticks_at(axes.xaxis, [run["k"] for run in topk])
        for run in full:
            axes.axhline(run[field], color=COLOURS[1], linestyle="--", label="full attention")
        axes.set_ylim(0, 1.12 * max(run[field] for run in record["runs"]))
        axes.set_xlabel("k, keys kept per query")
        axes.set_title(title, fontsize=10, loc="left")
        axes.grid(alpha=0.25)
        axes.text(
            0.98,
            0.03,
            note,
            transform=axes.transAxes,
            ha="right",
            va="bottom",
            fontsize=8,
            color=QUOTED,
            style="italic",
        )
        if number == 1:
            axes.legend(frameon=False, fontsize=9, loc="center left")
    save(figure, path)


def draw_memory_and_time(
    curves: Mapping[str, Sequence[Json]],
    path: Path,
    *,
    x: str,
    x_label: str,
    title: str,
    quoted: Mapping[str, Mapping[str, Mapping[int, float]]] | None = None,
    quoted_like: Mapping[str, str] | None = None,
    levels: Mapping[str, Json] | None = None,
    panels: Sequence[tuple[str, str, float]] = MEMORY_AND_TIME,
) -> None:
    """Peak memory and time of one step against a size, both axes logarithmic.

    curves  name -> points, each with x and the panels' fields; a point that did not finish lacks those, and stands at
            the upper edge as a sign of its "outcome" where it has one
    panels  (field of the points, title, factor from the field's unit to the title's)
    quoted  field -> name -> {x: value in the unit of the panel's title}: somebody else's numbers, drawn faint and
            dotted, as far as the sizes of the points reach
    quoted_like  name of quoted numbers -> name of the curve whose colour and marker they take
    levels  name -> a point that does not depend on x, drawn as a dashed line
    """
    figure = new_figure(width=5 * len(panels), height=4.2)
    labelled: dict[str, Any] = {}
    sizes = sorted({point[x] for points in curves.values() for point in points})
    styles = {
        name: {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
        for index, name in enumerate(curves)
    }
    for number, (field, panel_title, factor) in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), number)
        for name, points in curves.items():
            drawn = sorted((point[x], point[field] * factor) for point in points if field in point)
            # A curve without a finished point still says what its signs at the edge stand for.
            across, heights = zip(*drawn, strict=True) if drawn else ((), ())
            axes.plot(across, heights, label=name, markersize=5, **styles[name])
        for index, (name, values) in enumerate((quoted or {}).get(field, {}).items()):
            shown = sorted((size, value) for size, value in values.items() if sizes[0] <= size <= sizes[-1])
            if shown:
                own = {"color": QUOTED, "marker": MARKERS[index % len(MARKERS)]}
                style = styles.get((quoted_like or {}).get(name, ""), own)
                axes.plot(*zip(*shown, strict=True), label=name, linestyle=":", alpha=0.4, markersize=4, **style)
        for index, (name, point) in enumerate((levels or {}).items()):
            if field in point:
                colour = COLOURS[(len(curves) + index) % len(COLOURS)]
                axes.axhline(point[field] * factor, label=name, color=colour, linestyle="--", linewidth=1)
        _draw_given_up(axes, curves, x, {name: style["color"] for name, style in styles.items()})
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        plain_numbers(axes.yaxis)
        only_ticks_at(axes.xaxis, sizes)
        axes.set_xlabel(x_label)
        axes.set_title(panel_title, fontsize=10, loc="left")
        axes.grid(alpha=0.25, which="both")
        labelled = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True)) | labelled
    columns = 1 + len(panels)
    figure.set_figheight(figure.get_figheight() + 0.17 * math.ceil(len(labelled) / columns))
    # Below the panels, where it covers no curve.
    figure.legend(labelled.values(), labelled, loc="outside lower center", ncols=columns, frameon=False, fontsize=7)
    figure.suptitle(title, fontsize=10)
    save(figure, path)


def _draw_given_up(axes: Any, curves: Mapping[str, Sequence[Json]], x: str, colours: Mapping[str, str]) -> None:
    """A sign at the upper edge for each point that did not finish, one row a curve."""
    labelled = set()
    for row, (name, points) in enumerate(curves.items()):
        for outcome, marker in (("out of memory", "x"), ("time limit", "$t$")):
            sizes = [point[x] for point in points if point.get("outcome") == outcome]
            if not sizes:
                continue
            # x in data, y as a fraction of the panel's height.
            height, transform = [0.97 - 0.035 * row] * len(sizes), axes.get_xaxis_transform()
            style = {"linestyle": "", "markersize": 6, "clip_on": False, "transform": transform}
            axes.plot(sizes, height, marker=marker, color=colours[name], **style)
            if outcome not in labelled:
                axes.plot([], [], marker=marker, color=QUOTED, linestyle="", markersize=6, label=outcome)
                labelled.add(outcome)


def draw_loss_curves(
    curves: Mapping[str, Sequence[Json]], path: Path, *, title: str, unit: str = "nats per byte"
) -> None:
    """Validation loss against steps and against training time, one curve an arm.

    curves  name -> points with step, elapsed_s and validation_loss
    """
    figure = new_figure(width=9, height=3.8)
    for number, (field, label) in enumerate((("step", "step"), ("elapsed_s", "training time [s]")), 1):
        axes = figure.add_subplot(1, 2, number)
        for index, (name, points) in enumerate(curves.items()):
            axes.plot(
                [point[field] for point in points],
                [point["validation_loss"] for point in points],
                label=name,
                color=COLOURS[index % len(COLOURS)],
                marker=MARKERS[index % len(MARKERS)],
                markersize=3,
            )
        axes.set_xlabel(label)
        axes.set_title(f"Validation loss [{unit}]", fontsize=10, loc="left")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=10)
    save(figure, path)


def new_figure(width: float, height: float) -> Any:
    # A figure of its own, without pyplot: no window system, no state that outlives the call.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def only_ticks_at(axis: Any, values: Sequence[int]) -> None:
    from matplotlib.ticker import NullLocator

    axis.set_minor_locator(NullLocator())
    axis.set_ticks(values, [f"{value:,}" for value in values])


def plain_numbers(axis: Any) -> None:
    """1, 2, 5, 10 and so on instead of powers of ten, which say little over one or two decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def png_of(figure: Any) -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    return picture.getvalue()


def save(figure: Any, path: Path) -> None:
    write_whole(path, png_of(figure))
