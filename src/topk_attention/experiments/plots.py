"""Pictures drawn from records. Nothing here measures."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .records import Json, write_whole

COLOURS = ("#2463a6", "#c4571b", "#3b8c4a", "#8a4fa3", "#6b6b6b")
_MARKERS = ("o", "s", "^", "D", "v")
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
    _save(figure, path)


def draw_memory_and_time(
    curves: Mapping[str, Sequence[Json]],
    path: Path,
    *,
    x: str,
    x_label: str,
    title: str,
    quoted: Mapping[str, Mapping[str, Mapping[int, float]]] | None = None,
    panels: Sequence[tuple[str, str, float]] = MEMORY_AND_TIME,
) -> None:
    """Peak memory and time of one step against a size, both axes logarithmic.

    curves  name -> points, each with x and the panels' fields; points that did not finish lack those and are left out
    panels  (field of the points, title, factor from the field's unit to the title's)
    quoted  field -> name -> {x: value in the unit of the panel's title}: somebody else's numbers, drawn faint and
            dotted, at the sizes of the points alone
    """
    figure = new_figure(width=5 * len(panels), height=4.2)
    sizes = {point[x] for points in curves.values() for point in points}
    for number, (field, panel_title, factor) in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), number)
        for index, (name, points) in enumerate(curves.items()):
            drawn = sorted((point[x], point[field] * factor) for point in points if field in point)
            if not drawn:
                continue
            axes.plot(
                *zip(*drawn, strict=True),
                label=name,
                color=COLOURS[index % len(COLOURS)],
                marker=_MARKERS[index % len(_MARKERS)],
                markersize=5,
            )
        for index, (name, values) in enumerate((quoted or {}).get(field, {}).items()):
            shown = sorted((size, value) for size, value in values.items() if size in sizes)
            if shown:
                marker = _MARKERS[index % len(_MARKERS)]
                axes.plot(*zip(*shown, strict=True), label=name, color=QUOTED, linestyle=":", marker=marker, alpha=0.5)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        _plain_numbers(axes.yaxis)
        only_ticks_at(axes.xaxis, sorted(sizes))
        axes.set_xlabel(x_label)
        axes.set_title(panel_title, fontsize=10, loc="left")
        axes.grid(alpha=0.25, which="both")
        axes.legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    _save(figure, path)


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
                marker=_MARKERS[index % len(_MARKERS)],
                markersize=3,
            )
        axes.set_xlabel(label)
        axes.set_title(f"Validation loss [{unit}]", fontsize=10, loc="left")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=10)
    _save(figure, path)


def new_figure(width: float, height: float) -> Any:
    # A figure of its own, without pyplot: no window system, no state that outlives the call.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def only_ticks_at(axis: Any, values: Sequence[int]) -> None:
    from matplotlib.ticker import NullLocator

    axis.set_minor_locator(NullLocator())
    axis.set_ticks(values, [f"{value:,}" for value in values])


def _plain_numbers(axis: Any) -> None:
    """1, 2, 5, 10 and so on instead of powers of ten, which say little over one or two decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def png_of(figure: Any) -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    return picture.getvalue()


def _save(figure: Any, path: Path) -> None:
    write_whole(path, png_of(figure))
