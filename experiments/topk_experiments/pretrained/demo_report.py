"""What the record of a demo shows: table, sentences, picture and page. Nothing in this file measures."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from topk_attention.functional.words import k_in_words

from ..runs.records import Json, read_json, reads, write_whole
from ..runs.timing import busy_note
from ..show.html import counted, drawn, footer, page, table
from ..show.plots import QUOTED, STYLES, new_figure, only_ticks_at, save

# A perplexity at most this much above full attention's counts as close to it.
_CLOSE = 0.05
# Ratios nearer to 1 than this are no difference.
_SMALLEST_DIFFERENCE = 0.02
_HEADINGS = (
    "attention",
    "perplexity",
    "time [s]",
    "fastest to slowest [s]",
    "peak memory [MiB]",
    "of the process [MiB]",
)
_COMPLETION_IN_WORDS = ", alone and completed: the other keys then enter its softmax as one entry"
_TOPK, _COMPLETED, _FULL = STYLES["topk"], STYLES["topk-completed"], STYLES["full"]


@reads("demo/demo.json")
def redraw(results: Path) -> list[Path]:
    """Write picture and page of the demo's record below the folder of all results again; return their paths."""
    record = read_json(results / "demo" / "demo.json")
    return [] if record is None else write_report(record, results / "demo")


def write_report(record: Json, out: Path) -> list[Path]:
    """Write `demo.png` and `demo.html`; return their paths."""
    png, written = out / "demo.png", out / "demo.html"
    save(draw(record), png)
    write_whole(written, html_page(record))
    return [png, written]


def run_name(k: int | None, num_tokens: int | None = None, *, completed: bool = False) -> str:
    """The name of a run in tables and messages: "full attention" or "k = 64", and what a k of every token is.

    >>> run_name(5000, 4096)
    'k = 5000 (every key: full attention)'
    >>> run_name(64, 4096, completed=True)
    'k = 64, completed'
    """
    return "full attention" if k is None else k_in_words(k, num_tokens) + ", completed" * completed


def by_setting(record: Json) -> list[Json]:
    """One entry a setting: medians over the rounds, and the values of every round.

    Full attention comes first, then by k top-k attention alone and completed. Fields: k, completed, perplexity,
    elapsed_s, peak_mib and total_peak_mib (medians), and "rounds", the runs themselves. A record of the first schema
    holds one run a k, and none before the third is completed.
    """
    runs: dict[tuple[int, bool], list[Json]] = {}
    for run in record["runs"]:
        runs.setdefault((run["k"] or 0, run.get("completed", False)), []).append(run)
    fields = ("perplexity", "elapsed_s", "peak_mib", "total_peak_mib")
    return [
        {"k": k or None, "completed": completed, "rounds": rounds}
        | {field: statistics.median(run[field] for run in rounds) for field in fields}
        for (k, completed), rounds in sorted(runs.items())
    ]


def table_rows(record: Json) -> list[list[str]]:
    """Headings, then a row for each setting."""
    rows = [list(_HEADINGS)]
    for setting in by_setting(record):
        times = _values(setting, "elapsed_s")
        rows.append(
            [
                run_name(setting["k"], record["config"]["num_tokens"], completed=setting["completed"]),
                f"{setting['perplexity']:.2f}",
                f"{setting['elapsed_s']:.1f}",
                f"{min(times):.1f} to {max(times):.1f}" if len(times) > 1 else "one round",
                f"{setting['peak_mib']:,.0f}",
                f"{setting['total_peak_mib']:,.0f}",
            ]
        )
    return rows


def summary(record: Json) -> str:
    """What the numbers say about perplexity, without and with completion, about time and about memory."""
    settings = by_setting(record)
    full = next((setting for setting in settings if setting["k"] is None), None)
    topk = [setting for setting in settings if setting["k"] is not None]
    if full is None or not topk:
        return "There is nothing to compare yet."
    alone = [setting for setting in topk if not setting["completed"]]
    completed = [setting for setting in topk if setting["completed"]]
    if alone and completed:
        quality = [_quality(full, alone, "Without completion "), _quality(full, completed, "With completion ")]
    else:
        quality = [_quality(full, topk, "With completion " if completed else "")]
    return " ".join(
        [
            *quality,
            _difference(full, topk, "elapsed_s", "faster", "slower", "time"),
            _difference(full, topk, "peak_mib", "smaller", "larger", "peak memory"),
        ]
    )


def html_page(record: Json) -> str:
    """One page without other files: what was run, the table, the picture and what they say."""
    config, model, text = record["config"], record["model"], record["text"]
    note = busy_note([run.get("other_cores") for run in record["runs"]], record["environment"].get("num_cpus"))
    rounds = max(len(setting["rounds"]) for setting in by_setting(record))
    how = "once" if rounds == 1 else f"in {counted(rounds, 'round')}, every setting once a round"
    million = model.get("num_parameters", 0) / 1e6
    return page(
        f"{model['name']}: the k best keys per query",
        f"<p>{escape(model['name'])} ({million:,.0f} million parameters, {escape(model['revision'])}, "
        f"{escape(config['dtype'])}, no training) read the first {config['num_tokens']:,} tokens of "
        f"{escape(text['source'])} {how}: with full attention, as the model comes, and with every query keeping its k "
        f"best keys{_COMPLETION_IN_WORDS if any(setting['completed'] for setting in by_setting(record)) else ''}.</p>",
        f"<p><strong>{escape(summary(record))}</strong></p>",
        table(table_rows(record)),
        drawn("Perplexity, time and peak memory against k", draw(record)),
        "<p>Each run had a process of its own. Numbers are medians over the rounds. Time is that of one forward pass "
        "over the whole window, logits included. Peak memory is resident memory above what the process held just "
        "before the pass, with the model loaded and warmed up; the last column includes that."
        f"{'' if note is None else f' {escape(note)}'}</p>",
        footer(record, f"text sha256 {text['sha256'][:16]}"),
    )


def draw(record: Json) -> Any:
    """A figure: perplexity, seconds and peak memory against k, with full attention as a dashed line. Bars: all rounds.

    record  with at least one run
    """
    settings = by_setting(record)
    topk = [setting for setting in settings if setting["k"] is not None]
    curves = (("top-k attention", False, _TOPK), ("completed", True, _COMPLETED))
    panels = (
        ("perplexity", "Perplexity"),
        ("elapsed_s", "Time of the forward pass [s]"),
        ("peak_mib", "Peak memory above the model [MiB]"),
    )
    figure = new_figure(width=11, height=3.9)
    for number, (field, title) in enumerate(panels, 1):
        axes = figure.add_subplot(1, 3, number)
        for label, completed, look in curves:
            points = [setting for setting in topk if setting["completed"] == completed]
            if not points:
                continue
            middles = [setting[field] for setting in points]
            lows, highs = (
                [abs(edge(_values(setting, field)) - setting[field]) for setting in points] for edge in (min, max)
            )
            style = {"color": look.colour, "marker": look.marker, "capsize": 3, "elinewidth": 0.8}
            axes.errorbar([setting["k"] for setting in points], middles, yerr=(lows, highs), label=label, **style)
        if topk:
            axes.set_xscale("log", base=2)
            only_ticks_at(axes.xaxis, sorted({setting["k"] for setting in topk}))
        for setting in settings:
            if setting["k"] is None:
                axes.axhline(setting[field], color=_FULL.colour, linestyle="--", label="full attention")
                values = _values(setting, field)
                axes.axhspan(min(values), max(values), color=_FULL.colour, alpha=0.1, linewidth=0)
        axes.set_ylim(0, 1.12 * max(run[field] for run in record["runs"]))
        axes.set_xlabel("k, keys kept per query")
        axes.set_title(title, fontsize=10, loc="left")
        axes.grid(alpha=0.25)
        place = {"ha": "right", "va": "bottom", "fontsize": 8, "transform": axes.transAxes}
        axes.text(0.98, 0.03, "lower is better", color=QUOTED, style="italic", **place)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def _values(setting: Json, field: str) -> list[float]:
    return [run[field] for run in setting["rounds"]]


def _quality(full: Json, topk: Sequence[Json], with_what: str) -> str:
    """A sentence on the smallest k that is close enough, or on the closest; its first words are those given."""
    close = [setting for setting in topk if setting["perplexity"] <= (1 + _CLOSE) * full["perplexity"]]
    best = close[0] if close else min(topk, key=lambda setting: setting["perplexity"])
    change = 100 * (best["perplexity"] / full["perplexity"] - 1)
    numbers = f"{best['perplexity']:.2f} against {full['perplexity']:.2f}, {change:+.1f} %"
    if close:
        return (
            f"{with_what}k = {best['k']} is the smallest k tried whose perplexity is within {100 * _CLOSE:.0f} % of "
            f"full attention's ({numbers})."
        )
    return (
        f"{with_what + 'no' if with_what else 'No'} k tried comes within {100 * _CLOSE:.0f} % of full attention's "
        f"perplexity; k = {best['k']} comes closest ({numbers})."
    )


def _difference(full: Json, topk: Sequence[Json], field: str, less: str, more: str, noun: str) -> str:
    """A sentence on time or memory. It claims a difference only where every round of one is below every round of the
    other."""
    ratios = {_short_name(setting): _ratios(setting, full, field) for setting in topk}
    lowest, highest = min(low for low, _ in ratios.values()), max(high for _, high in ratios.values())
    numbers = f"{lowest:.2f} times" if f"{lowest:.2f}" == f"{highest:.2f}" else f"{lowest:.2f} to {highest:.2f} times"
    rounds = min(len(setting["rounds"]) for setting in [full, *topk])
    numbers = f"({numbers} full attention's {noun}, over {counted(rounds, 'round')})"
    if rounds < 2:
        return f"One round cannot tell a difference in {noun} from noise {numbers}."
    verdicts = {
        less: [name for name, (_, high) in ratios.items() if high < 1 - _SMALLEST_DIFFERENCE],
        more: [name for name, (low, _) in ratios.items() if low > 1 + _SMALLEST_DIFFERENCE],
    }
    claims = [
        f"{word} {'at every k' if len(names) == len(topk) else 'at k = ' + ', '.join(names)}"
        for word, names in verdicts.items()
        if names
    ]
    if not claims:
        return f"{noun.capitalize()}: no difference beyond noise {numbers}."
    if sum(map(len, verdicts.values())) < len(topk):
        claims.append("no difference beyond noise at the other k")
    return f"{noun.capitalize()}: {'; '.join(claims)} {numbers}."


def _short_name(setting: Json) -> str:
    """Of a setting in a list of k: "64" or "64 completed"."""
    return f"{setting['k']}" + " completed" * setting["completed"]


def _ratios(setting: Json, full: Json, field: str) -> tuple[float, float]:
    """Lowest and highest ratio between any round of a setting and any round of full attention."""
    ours, theirs = _values(setting, field), [max(value, 1e-9) for value in _values(full, field)]
    return min(ours) / max(theirs), max(ours) / min(theirs)
