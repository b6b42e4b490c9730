"""The picture: scores against k, a row of panels for each model."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..models.settings import mean_k
from ..runs.records import Json
from ..show.html import counted
from ..show.plots import QUOTED, STYLES, new_figure, only_ticks_at
from .groups import Group
from .published import curves

METRICS = {
    "accuracy": "accuracy",
    "accuracy_by_length": "accuracy, likelihoods divided by the choice's characters",
    "exact_match": "exact match",
    "f1": "F1",
}
_PANELS = {"attention_k": "k, keys kept per query", "feed_forward_k": "k, neurons kept per token"}
_ROW_TITLE = {"x": 0.01, "ha": "left", "fontsize": 9.5}
_BARS = "Bars: standard error of each score over its questions.\nChanges, taken question by question, are in the table."
# If F1 differs from exact match by at most so many points, it needs no line of its own.
_SAME = 0.3
# Line of each metric; of the two accuracies one is enough.
_SHOWN_IN_PICTURE = {"accuracy_by_length": "-", "exact_match": "-", "f1": "--"}


def picture(evaluated: Sequence[Group]) -> Any:
    """A figure: mean score against attention k and feed-forward k. Each group has a row and a y axis of its own.

    The published curves, of other models and other sets, have a panel of their own beside the legend.
    """
    rows = [group for group in evaluated if any(is_drawn(group, setting) for setting in group.settings)]
    figure = new_figure(width=11, height=2.9 * len(rows) + 3.2)
    *parts, last = figure.subfigures(len(rows) + 1, 1, squeeze=False)[:, 0]
    for part, group in zip(parts, rows, strict=True):
        _draw_group(part, group)
    labelled: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            labelled.setdefault(name, handle)
    last.suptitle("Published (quoted): other models, whole development sets", **_ROW_TITLE)
    beside, axes = last.subplots(1, 2)
    beside.set_axis_off()
    if labelled:
        beside.legend(labelled.values(), labelled, loc="center left", frameon=False, fontsize=9, title=_BARS)
    _draw_published(axes)
    return figure


def _draw_group(part: Any, group: Group) -> None:
    sets = group.compared
    drawn = {metric: line for metric, line in _SHOWN_IN_PICTURE.items() if metric in group.metrics}
    over = sets[0] if len(sets) == 1 else f"mean over {counted(len(sets), 'set')}"
    title = f"{group.name}: {over}"
    if "f1" in drawn and _is_nearly_exact_match(group):
        del drawn["f1"]
        title += f"; F1 is within {_SAME} of exact match"
    part.suptitle(textwrap.fill(title, 130), **_ROW_TITLE)
    panels = part.subplots(1, len(_PANELS), sharey=True)
    for axes, (field, label) in zip(panels, _PANELS.items(), strict=True):
        settings = {setting: k for setting, k in _limiting(group, field).items() if is_drawn(group, setting)}
        if not settings:
            axes.set_axis_off()
            continue
        for metric, line in drawn.items():
            _draw_points(axes, group, settings, metric, line)
        _finish_panel(axes, label, settings.values())
        axes.set_ylabel("per cent", fontsize=9)


def _draw_points(axes: Any, group: Group, settings: Mapping[str, float], metric: str, line: str) -> None:
    """Uniform k as a curve, calibrated k as hollow markers, both again if completed; the full model as a level line."""
    series: list[tuple[list[str], str, Json]] = []
    for completed in (False, True):
        shown = sorted(
            (setting for setting in settings if group.described(setting).get("completed", False) == completed),
            key=lambda name: settings[name],
        )
        calibrated = [setting for setting in shown if _is_calibrated(group, setting)]
        topk = STYLES["topk-completed" if completed else "topk"]
        own = topk if completed else STYLES["calibrated"]
        filled = {"color": topk.colour, "marker": topk.marker, "linestyle": line, "markersize": 4, "capsize": 2}
        hollow = {"color": own.colour, "marker": own.marker, "markersize": 8, "markerfacecolor": "none", "capsize": 5}
        hollow["linestyle"] = ""
        suffix = ", completed" if completed else ""
        uniform = [setting for setting in shown if setting not in calibrated]
        series.append((uniform, f"{METRICS[metric]}{suffix}", filled))
        series.append((calibrated, f"calibrated{suffix}, at its mean k", hollow))
    style = {"elinewidth": 0.8}
    for shown, label, more in series:
        means = [group.mean(setting, metric) for setting in shown]
        if means:
            ks, values, errors = [settings[setting] for setting in shown], *zip(*means, strict=True)
            axes.errorbar(ks, values, yerr=errors, label=label, **style | more)
    if "full" in group.settings:
        full = group.mean("full", metric).value
        axes.axhline(full, label="full model", color=STYLES["full"].colour, linestyle=line, linewidth=1)


def _draw_published(axes: Any) -> None:
    ks: set[int] = set()
    for name, curve in curves().items():
        axes.plot(list(curve), list(curve.values()), color=QUOTED, linestyle=":", marker=".")
        k, value = max(curve.items())
        axes.annotate(name, (k, value + 0.8), fontsize=8, color=QUOTED, ha="right", va="bottom")
        ks |= set(curve)
    _finish_panel(axes, _PANELS["feed_forward_k"], ks)
    axes.margins(y=0.15)
    axes.set_ylabel("exact match, per cent", fontsize=9)


def _finish_panel(axes: Any, label: str, ks: Iterable[float]) -> None:
    """A logarithmic axis with ticks at these k, without those whose labels would overlap."""
    axes.set_xscale("log", base=2)
    ticks: list[int] = []
    rounded = sorted(map(round, ks))
    axes.set_xlim(rounded[0] / 1.3, rounded[-1] * 1.3)
    for k in rounded:
        if not ticks or k > 1.15 * ticks[-1]:
            ticks.append(k)
    only_ticks_at(axes.xaxis, ticks)
    axes.tick_params(labelsize=8, labelleft=True)
    axes.set_xlabel(label, fontsize=9)
    axes.grid(alpha=0.25)


def _limiting(group: Group, field: str) -> dict[str, float]:
    """Settings that limit this kind alone -> their mean k."""
    result = {}
    for setting in group.settings:
        limited = [name for name in _PANELS if group.described(setting)[name] is not None]
        k = mean_k(group.described(setting)[field])
        if k is not None and limited == [field]:
            result[setting] = k
    return result


def _is_calibrated(group: Group, setting: str) -> bool:
    return any(isinstance(k, dict) for k in group.described(setting).values())


def is_drawn(group: Group, setting: str) -> bool:
    """Whether a setting is in the picture: it limits one kind alone and has answered every compared set."""
    limits_one = any(setting in _limiting(group, field) for field in _PANELS)
    return limits_one and all((setting, each) in group.records for each in group.compared)


def _is_nearly_exact_match(group: Group) -> bool:
    settings = [setting for setting in group.settings if setting == "full" or is_drawn(group, setting)]
    return all(
        abs(group.mean(setting, "f1").value - group.mean(setting, "exact_match").value) <= _SAME for setting in settings
    )
