"""Pictures of a calibration, as PNG bytes. Nothing in this file measures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from topk_attention.calibrate import Calibration

from ..runs.records import Json
from ..show.plots import STYLES, new_figure, only_ticks_at
from .calibration_measures import Measure

# With more cells than this, numbers in them cannot be read.
_MOST_CELLS_WITH_NUMBERS = 600
_MOST_TICKS = 9
_CALIBRATED = STYLES["calibrated"]


def heat_maps(calibration: Calibration) -> Any:
    """k, and the softmax weight lost at that k, by layer and head."""
    from matplotlib.colors import LogNorm

    ks = _square(list(calibration.values()))
    lost = 100 * _square([lost_mass_at(calibration, path) for path in calibration])
    num_layers, num_heads = ks.shape
    width = min(16.0, 2.4 + 0.9 * num_heads)
    figure = new_figure(width=max(9.0, width), height=min(14.0, 1.6 + 0.28 * num_layers))
    panels = (
        ("k", ks, {"cmap": "viridis", "norm": LogNorm(max(1, np.nanmin(ks)), np.nanmax(ks) + 1e-9)}, "{:.0f}"),
        ("softmax weight lost at that k [%]", lost, {"cmap": "magma", "vmin": 0.0}, "{:.1f}"),
    )
    for number, (title, values, colours, form) in enumerate(panels, 1):
        axes = figure.add_subplot(1, 2, number)
        image = axes.imshow(values, aspect="auto", interpolation="nearest", **colours)
        bar = figure.colorbar(image, ax=axes)
        if number == 1:
            _powers_of_two(bar.ax.yaxis, np.nanmin(values), np.nanmax(values), inside=True)
        if values.size <= _MOST_CELLS_WITH_NUMBERS:
            for (layer, head), value in np.ndenumerate(values):
                if np.isfinite(value):
                    shade = image.norm(value)
                    axes.text(
                        head,
                        layer,
                        form.format(value),
                        ha="center",
                        va="center",
                        fontsize=7,
                        color="black" if shade > 0.6 else "white",
                    )
        axes.set_xticks(_few(num_heads))
        axes.set_yticks(_few(num_layers))
        axes.set_xlabel("head")
        axes.set_ylabel("layer")
        axes.set_title(title, fontsize=10, loc="left")
    return figure


def mass_against_k(calibration: Calibration) -> Any:
    """The softmax weight that the k best keys hold: a line per layer, and how far heads differ."""
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    figure = new_figure(width=11, height=4.2)
    by_layer, by_head = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    colours, depth = colormaps["viridis"], Normalize(0, max(1, len(calibration.curves) - 1))
    largest_k = max(curves.ks[-1] for curves in calibration.curves.values())
    grid = np.geomspace(1, largest_k, 100)
    heads = []
    for number, curves in enumerate(calibration.curves.values()):
        kept = 100 * (1 - curves.lost_mass.numpy())
        by_layer.plot(curves.ks, kept.mean(0), color=colours(depth(number)), linewidth=1)
        heads += [np.interp(np.log(grid), np.log(curves.ks), head) for head in kept]
    scale = _scalar_mappable(depth, colours)
    figure.colorbar(scale, ax=by_layer, label="layer", ticks=_few(len(calibration.curves)))
    by_layer.set_title("each layer, mean of its heads", fontsize=10, loc="left")
    for low, high, alpha, label in ((0, 100, 0.15, "all heads"), (25, 75, 0.35, "the middle half")):
        edges = np.percentile(heads, (low, high), axis=0)
        by_head.fill_between(grid, *edges, color=_CALIBRATED.colour, alpha=alpha, linewidth=0, label=label)
    by_head.plot(grid, np.median(heads, axis=0), color=_CALIBRATED.colour, label="the median head")
    by_head.set_title("how far heads differ", fontsize=10, loc="left")
    by_head.legend(frameon=False, fontsize=9, loc="lower right")
    for axes in (by_layer, by_head):
        axes.set_xscale("log", base=2)
        _powers_of_two(axes.xaxis, 1, largest_k)
        axes.set_ylim(0, 101)
        axes.set_xlabel("k")
        axes.set_ylabel("softmax weight on the k best keys [%]")
        axes.grid(alpha=0.25)
    return figure


def neurons_by_layer(calibration: Calibration) -> Any:
    """k of each feed-forward layer, and the activation that the k best neurons hold."""
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    figure = new_figure(width=11, height=3.8)
    chosen, mass = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    ks = list(calibration.feed_forward.values())
    chosen.bar(range(len(ks)), ks, color=_CALIBRATED.colour)
    chosen.set_xticks(_few(len(ks)))
    chosen.set_xlabel("layer")
    chosen.set_title("k, neurons kept per token", fontsize=10, loc="left")
    colours, depth = colormaps["viridis"], Normalize(0, max(1, len(ks) - 1))
    largest_k = 1
    for number, curves in enumerate(calibration.feed_forward_curves.values()):
        mass.plot(curves.ks, 100 * (1 - curves.lost_mass[0].numpy()), color=colours(depth(number)), linewidth=1)
        largest_k = max(largest_k, curves.ks[-1])
    figure.colorbar(_scalar_mappable(depth, colours), ax=mass, label="layer", ticks=_few(len(ks)))
    mass.set_xscale("log", base=2)
    _powers_of_two(mass.xaxis, 1, largest_k)
    mass.set_ylim(0, 101)
    mass.set_xlabel("k")
    mass.set_title("share of |activations| in the k best neurons [%]", fontsize=10, loc="left")
    mass.grid(alpha=0.25)
    return figure


def quality_against_k(runs: Sequence[Json], measure: Measure) -> Any:
    """Calibrated k beside one k for every head, with full attention as a dashed line.

    runs  of attention alone, as `calibration.py` records them
    """
    figure = new_figure(width=7.5, height=4.2)
    axes = figure.add_subplot()
    drawn = []
    for kind, label, style in (
        ("uniform", "one k for every head", STYLES["topk"]),
        ("calibrated", "calibrated, a k for each head", _CALIBRATED),
    ):
        points = sorted((run["mean_k"], run[measure.field]) for run in runs if run["kind"] == kind)
        if points:
            axes.plot(*zip(*points, strict=True), label=label, color=style.colour, marker=style.marker)
            drawn += points
    for run in runs:
        if run["kind"] == "full":
            axes.axhline(run[measure.field], color=STYLES["full"].colour, linestyle="--", label="full attention")
    axes.set_xscale("log", base=2)
    _powers_of_two(axes.xaxis, min(k for k, _ in drawn), max(k for k, _ in drawn))
    axes.set_xlabel("mean k, keys per query and head")
    axes.set_ylabel(measure.axis)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9)
    return figure


def lost_mass_at(calibration: Calibration, path: str) -> list[float]:
    """Softmax weight that each head of a layer loses at its k, between the curve's points along log k."""
    curves = calibration.curves[path]
    return [
        float(np.interp(np.log(k), np.log(curves.ks), lost))
        for k, lost in zip(calibration[path], curves.lost_mass.numpy(), strict=True)
    ]


def _square(rows: Sequence[Sequence[float]]) -> np.ndarray:
    """Rows as one array. Layers may have different numbers of heads; missing ones are NaN."""
    square = np.full((len(rows), max(len(row) for row in rows)), np.nan)
    for number, row in enumerate(rows):
        square[number, : len(row)] = row
    return square


def _few(number: int) -> list[int]:
    """Ticks: every number up to 16, otherwise every fifth."""
    return list(range(0, number, 1 if number <= 16 else 5))


def _powers_of_two(axis: Any, low: float, high: float, *, inside: bool = False) -> None:
    """Ticks around a range of k, or none outside it, where ticks would stretch the axis."""
    down, up = (np.ceil, np.floor) if inside else (np.floor, np.ceil)
    first, last = int(down(np.log2(max(1.0, low)))), int(up(np.log2(max(1.0, high))))
    step = 1 if last - first < _MOST_TICKS else 2
    only_ticks_at(axis, [2**power for power in range(first, last + 1, step)] or [round(low)])


def _scalar_mappable(norm: Any, colours: Any) -> Any:
    from matplotlib.cm import ScalarMappable

    return ScalarMappable(norm, colours)
