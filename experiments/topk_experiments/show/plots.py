"""Pictures drawn from records. Nothing in this file measures."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..runs.records import Json, write_whole


class Style(NamedTuple):
    """How a method is drawn. Marker and line tell methods apart where colours do not."""

    colour: str
    marker: str
    line: str = "-"


# One style a method, the same in every figure. Feed-forward layers have the style of the attention that they resemble.
STYLES = {
    "topk": Style("#2463a6", "o"),
    "topk-chunked": Style("#2a9d9d", "^"),
    "topk-reference": Style("#8a4fa3", "v"),
    "topk-sparse": Style("#7fbf3f", "P"),
    "topk-completed": Style("#6a51c7", "h"),
    "calibrated": Style("#a0345a", "D"),
    "full": Style("#111111", "s"),
    "vanilla": Style("#c4571b", "X"),
    "vanilla-chunks": Style("#e377c2", "<"),
    "query-chunks": Style("#8c6d4f", ">"),
    "performer": Style("#3b8c4a", "*"),
    "rfa": Style("#b8962e", "p"),
}
# Names of curves -> method; the first that matches counts.
_NAMES = (
    (".*calibrated", "calibrated"),
    (".*torch\\.sparse", "topk-sparse"),
    ("top-?k.*completed", "topk-completed"),
    ("top-?k.*reference", "topk-reference"),
    ("top-?k.*chunked", "topk-chunked"),
    ("(top-?k|k = |one k |attention k = |feed-forward k = )", "topk"),
    ("performer", "performer"),
    ("(rfa|random feature attention)", "rfa"),
    ("(query-chunks|token-chunks|every (key|neuron),)", "query-chunks"),
    ("(vanilla.* at a time|vanilla-chunks|query chunks)", "vanilla-chunks"),
    ("(vanilla|dense|eager)", "vanilla"),
    ("(full|sdpa|pytorch)", "full"),
)
_OTHER_COLOURS = ("#6d597a", "#00798c", "#9c6644", "#5f6b2d", "#d1495b")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p", "h")
_LINES = ("-", "--", "-.", ":")
# Of the picture for a phone: width, resolution, and how many characters of its title fit into a line.
_NARROW_INCHES, _NARROW_DPI, _NARROW_CHARACTERS = 4.4, 130, 60
QUOTED = "#6b6b6b"  # numbers of others, and levels that no method has
MEMORY_AND_TIME = (
    ("peak_mib", "Peak memory of a step [GiB]", 1 / 1024),
    ("elapsed_s", "Forward and backward [s]", 1.0),
)


def styles(names: Iterable[str]) -> dict[str, Style]:
    """A style for each curve of a figure, by its name.

    A method has its own colour. Further curves of the same method, for example with another k, keep the colour and
    differ in marker and line. Names of no known method get the remaining colours.

    >>> styles(["top-k (cpu), k = 64", "Performer", "top-k (cpu), k = 128"])["top-k (cpu), k = 128"]
    Style(colour='#2463a6', marker='s', line='--')
    """
    seen: Counter[str] = Counter()
    result = {}
    for name in dict.fromkeys(names):
        method = _method_of(name)
        if method is None:
            style = Style(_OTHER_COLOURS[seen[""] % len(_OTHER_COLOURS)], _MARKERS[seen[""] % len(_MARKERS)])
            seen[""] += 1
        else:
            style, number = STYLES[method], seen[method]
            if number:
                at = _MARKERS.index(style.marker) + number
                style = Style(style.colour, _MARKERS[at % len(_MARKERS)], _LINES[number % len(_LINES)])
            seen[method] += 1
        result[name] = style
    return result


def _method_of(name: str) -> str | None:
    return next((method for pattern, method in _NAMES if re.match(pattern, name, re.IGNORECASE)), None)


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

    curves  name -> points, each with x and the fields of the panels. A point that did not finish lacks these fields;
            a sign for its "outcome" stands at the upper edge
    panels  (field of the points, title, factor from the unit of the field to that of the title)
    quoted  field -> name -> {x: value in the unit of the panel's title}: published numbers of others, drawn faint and
            dotted, within the sizes of the points
    quoted_like  name of quoted numbers -> name of the curve whose colour and marker they take
    levels  name -> a point that does not depend on x, drawn as a dashed line
    """
    figure = new_figure(width=5 * len(panels), height=4.2)
    sizes = sorted({point[x] for points in curves.values() for point in points})
    style_of = styles([*curves, *(levels or {})])
    quoted_names = dict.fromkeys(name for values in (quoted or {}).values() for name in values)
    like = {name: (quoted_like or {}).get(name, name) for name in quoted_names}
    quoted_style = {name: style_of.get(like[name]) or _quoted_style(name) for name in quoted_names}
    for number, (field, panel_title, factor) in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), number)
        for name, points in curves.items():
            drawn = sorted((point[x], point[field] * factor) for point in points if field in point)
            # A curve without a finished point still says what its signs at the edge stand for.
            across, heights = zip(*drawn, strict=True) if drawn else ((), ())
            axes.plot(across, heights, label=name, markersize=5, **_line_options(style_of[name]))
        for name, values in (quoted or {}).get(field, {}).items():
            shown = sorted((size, value) for size, value in values.items() if sizes[0] <= size <= sizes[-1])
            if shown:
                options = _line_options(quoted_style[name]) | {"linestyle": ":", "alpha": 0.4, "markersize": 4}
                axes.plot(*zip(*shown, strict=True), label=name, **options)
        for name, point in (levels or {}).items():
            if field in point:
                colour = style_of[name].colour
                axes.axhline(point[field] * factor, label=name, color=colour, linestyle="--", linewidth=1)
        _draw_unfinished(axes, curves, x, {name: style_of[name].colour for name in curves})
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        plain_numbers(axes.yaxis)
        only_ticks_at(axes.xaxis, sizes)
        axes.set_xlabel(x_label)
        axes.set_title(panel_title, fontsize=10, loc="left")
        axes.grid(alpha=0.25, which="both")
    legend_below(figure, columns=1 + len(panels))
    figure.suptitle(title, fontsize=10)
    save(figure, path)


def _line_options(style: Style) -> dict[str, str]:
    return {"color": style.colour, "marker": style.marker, "linestyle": style.line}


def _quoted_style(name: str) -> Style:
    """The style of quoted numbers that resemble no curve of the figure."""
    method = _method_of(name)
    return Style(QUOTED, "." if method is None else STYLES[method].marker)


def _draw_unfinished(axes: Any, curves: Mapping[str, Sequence[Json]], x: str, colours: Mapping[str, str]) -> None:
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

    curves  name -> points with step, elapsed_s (seconds) and validation_loss
    """
    figure = new_figure(width=9, height=3.8)
    style_of = styles(curves)
    for number, (field, label) in enumerate((("step", "step"), ("elapsed_s", "training time [s]")), 1):
        axes = figure.add_subplot(1, 2, number)
        for name, points in curves.items():
            axes.plot(
                [point[field] for point in points],
                [point["validation_loss"] for point in points],
                label=name,
                markersize=3.5,
                **_line_options(style_of[name]),
            )
        axes.set_xlabel(label)
        axes.set_title(f"Validation loss [{unit}]", fontsize=10, loc="left")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=10)
    save(figure, path)


def legend_below(figure: Any, columns: int) -> None:
    """One legend of all panels, below them, where it covers no curve. The figure grows by its rows."""
    labelled: dict[str, Any] = {}
    for axes in figure.axes:
        labelled = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True)) | labelled
    figure.set_figheight(figure.get_figheight() + 0.17 * math.ceil(len(labelled) / columns))
    figure.legend(labelled.values(), labelled, loc="outside lower center", ncols=columns, frameon=False, fontsize=7)


def new_figure(width: float, height: float) -> Any:
    """A figure of this size in inches. It uses no pyplot: no window system, and no state after the call."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def only_ticks_at(axis: Any, values: Sequence[int]) -> None:
    """Ticks at these values and nowhere else."""
    from matplotlib.ticker import NullLocator

    axis.set_minor_locator(NullLocator())
    axis.set_ticks(values, [f"{value:,}" for value in values])


def plain_numbers(axis: Any) -> None:
    """Ticks at 1, 2, 5, 10 and so on: powers of ten alone are too few for one or two decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def png_of(figure: Any, dpi: int = 150) -> bytes:
    """The figure as a PNG file."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=dpi)
    return picture.getvalue()


def narrow_png_of(figure: Any) -> bytes | None:
    """The figure for a phone, as a PNG file: its panels below one another. None where it has a single panel.

    The figure stays as it is for a phone.
    """
    panels = [axes for axes in figure.axes if not hasattr(axes, "_colorbar")]
    if len(panels) < 2 or len(panels) < len(figure.axes):
        return None
    # Panels keep about the height that they have side by side.
    rows = max(axes.get_subplotspec().rowspan.stop for axes in panels)
    grid = figure.add_gridspec(len(panels), 1)
    for axes, place in zip(panels, grid, strict=True):
        axes.set_subplotspec(place)
        axes.tick_params(axis="x", labelsize=7)
    figure.set_size_inches(_NARROW_INCHES, figure.get_figheight() / rows * len(panels))
    if figure.get_suptitle():
        figure.suptitle(textwrap.fill(figure.get_suptitle(), _NARROW_CHARACTERS), fontsize=9)
    for legend in list(figure.legends):
        legend.remove()
        names = [text.get_text() for text in legend.get_texts()]
        figure.set_figheight(figure.get_figheight() + 0.17 * len(names))
        figure.legend(legend.legend_handles, names, loc="outside lower center", frameon=False, fontsize=7)
    return png_of(figure, _NARROW_DPI)


def narrow(path: Path) -> Path:
    """Where `save` puts the picture for a phone."""
    return path.with_name(f"{path.stem}.narrow{path.suffix}")


def save(figure: Any, path: Path) -> None:
    """Write the figure as a PNG file, and beside it one for a phone where it has several panels."""
    write_whole(path, png_of(figure))
    if (png := narrow_png_of(figure)) is not None:
        write_whole(narrow(path), png)
