"""What a demo's record says, in words and as a page."""

from __future__ import annotations

import base64
from collections.abc import Callable
from html import escape
from typing import Any

from ..runs.records import Json
from ..runs.timing import busy_note

# A perplexity this much above full attention's counts as close to it.
_CLOSE = 0.05

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .25rem .9rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; height: auto; }
footer { color: #666; font-size: .85rem; }
"""


def run_name(k: int | None, num_tokens: int | None = None) -> str:
    """How a run is called everywhere: "full attention" or "k = 64", and what a k of every token is.

    >>> run_name(5000, 4096)
    'k = 5000 (every key: full attention)'
    """
    if k is None:
        return "full attention"
    return f"k = {k} (every key: full attention)" if num_tokens is not None and k >= num_tokens else f"k = {k}"


def summary(record: Json) -> str:
    """What the numbers say, for better or worse, in one or two sentences."""
    full = next((run for run in record["runs"] if run["k"] is None), None)
    topk = sorted((run for run in record["runs"] if run["k"] is not None), key=lambda run: run["k"])
    if full is None or not topk:
        return "There is nothing to compare yet."
    return f"{_quality(full, topk)} {_cost(full, topk)}"


def page_top(title: str) -> str:
    """How every page begins, down to its heading."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
"""


def html_page(record: Json, picture: bytes) -> str:
    """One self-contained page: what was run, the table, the picture and what they say."""
    config, environment = record["config"], record["environment"]
    rows = "\n".join(_row(run, config["num_tokens"]) for run in record["runs"])
    model, text = record["model"], record["text"]
    title = f"{model['name']}: the k best keys per query"
    return (
        page_top(title)
        + f"""<p>{escape(model["name"])} ({model.get("num_parameters", 0) / 1e6:,.0f} million parameters,
{escape(model["revision"])}, {escape(config["dtype"])}, no training) read the first {config["num_tokens"]:,} tokens of
{escape(text["source"])}: once with full attention as the model comes, once for each k with every query keeping its
k best keys.</p>
<p><strong>{escape(summary(record))}</strong></p>
<table>
<tr><th>attention</th><th>perplexity</th><th>time [s]</th><th>peak memory [MiB]</th><th>of the process [MiB]</th></tr>
{rows}
</table>
<img alt="Perplexity, time and peak memory against k" src="data:image/png;base64,{base64.b64encode(picture).decode()}">
<p>Each run had a process of its own. Time is that of one forward pass over the whole window, logits included. Peak
memory is the resident memory above what the process held just before, with the model loaded and warmed up; the last
column includes that.{_busy(record)}</p>
<footer>topk_attention {escape(_known(environment, "topk_attention"))} ({escape(_known(environment, "commit"))}),
torch {escape(_known(environment, "torch"))}, transformers {escape(_known(environment, "transformers"))},
Python {escape(_known(environment, "python"))}, {escape(_known(environment, "cpu"))}, {config["threads"]} threads,
backend {escape(config["backend"])}, {escape(_known(environment, "date"))},
text sha256 {escape(text["sha256"][:16])}</footer>
</body>
</html>
"""
    )


def _busy(record: Json) -> str:
    note = busy_note([run.get("other_cores") for run in record["runs"]], record["environment"].get("num_cpus"))
    return "" if note is None else f"\n{note}"


def _row(run: Json, num_tokens: int) -> str:
    return (
        f"<tr><td>{run_name(run['k'], num_tokens)}</td><td>{run['perplexity']:.2f}</td>"
        f"<td>{run['elapsed_s']:.1f}</td>"
        f"<td>{run['peak_mib']:,.0f}</td><td>{run['total_peak_mib']:,.0f}</td></tr>"
    )


def _quality(full: Json, topk: list[Json]) -> str:
    close = [run for run in topk if run["perplexity"] <= (1 + _CLOSE) * full["perplexity"]]
    run = close[0] if close else min(topk, key=lambda run: run["perplexity"])
    change = 100 * (run["perplexity"] / full["perplexity"] - 1)
    numbers = f"{run['perplexity']:.2f} against {full['perplexity']:.2f}, {change:+.1f} %"
    if close:
        return (
            f"k = {run['k']} is the smallest k tried whose perplexity is within {100 * _CLOSE:.0f} % of full "
            f"attention's ({numbers})."
        )
    return (
        f"No k tried comes within {100 * _CLOSE:.0f} % of full attention's perplexity; k = {run['k']} comes closest "
        f"({numbers})."
    )


def _cost(full: Json, topk: list[Json]) -> str:
    time_ratios = [run["elapsed_s"] / full["elapsed_s"] for run in topk]
    memory_ratios = [run["peak_mib"] / max(full["peak_mib"], 1e-9) for run in topk]
    slower = sum(ratio > 1 for ratio in time_ratios)
    speed = {
        0: "faster than full attention at every k",
        len(topk): "slower than full attention at every k",
    }.get(slower, f"slower than full attention at {slower} of {len(topk)} k")
    return (
        f"In this run top-k attention was {speed} ({_range(time_ratios)} its time) and needed "
        f"{_range(memory_ratios)} its memory."
    )


def _range(ratios: list[float]) -> str:
    show: Callable[[float], str] = "{:.2f}".format
    low, high = show(min(ratios)), show(max(ratios))
    return f"{low} times" if low == high else f"{low} to {high} times"


def _known(environment: dict[str, Any], name: str) -> str:
    value = environment.get(name)
    return "unknown" if value is None else str(value)
