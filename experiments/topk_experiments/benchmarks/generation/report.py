"""Table and picture of generation, from the records of all rounds. Nothing in this module measures."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...runs.ledger import is_finished, newest, on_file
from ...runs.records import Json, reads, write_whole
from ...show.plots import STYLES, new_figure, save
from ..tables import Page, busy_notes, by_setting, head
from .methods import METHODS, REFERENCE

NAME, SCHEMA = "generation", "topk_attention/generation/1"
_SETTINGS = ("model", "text", "num_tokens", "short_length", "threads")
_OF_PAGE = (*_SETTINGS, "length")
_FIELDS = ("prefill_s", "token_s", "short_token_s", "peak_mib", "total_peak_mib")


def in_words(record: Json) -> str:
    """A finished point in a few words."""
    return (
        f"{record['prefill_s']:.1f} s to read the prompt, {1e3 * record['token_s']:.1f} ms a token, "
        f"{1e3 * record['short_token_s']:.1f} ms after {record['point']['short_length']} tokens, "
        f"{record['total_peak_mib']:,.0f} MiB"
    )


@reads(f"{NAME}.jsonl")
def report(out: Path) -> list[Path]:
    """Write `generation.md` and `generation.png` of all records on file in a folder; returns the files written."""
    records = newest(on_file(out / f"{NAME}.jsonl", SCHEMA), lambda record: json.dumps(record["point"], sort_keys=True))
    if not records:
        return []
    table, picture = out / f"{NAME}.md", out / f"{NAME}.png"
    write_whole(table, "\n".join(page.as_markdown() for page in pages(records)))
    last = [record for record in by_setting(records, _SETTINGS)[-1] if is_finished(record)]
    if not last:
        return [table]
    save(draw(summaries(last)), picture)
    return [table, picture]


def pages(records: Sequence[Json]) -> list[Page]:
    """A table for each setting and length of the prompt."""
    return [_page(group) for group in by_setting(records, _OF_PAGE)]


def summaries(records: Sequence[Json]) -> list[Json]:
    """One entry for each length and method with finished rounds: medians over the rounds, in the order of the table.

    Beside them: length, method, k, rounds, `attention_s`, by how much a token takes longer after the whole prompt than
    after a few tokens, and `equal_tokens`, at how many places it finds the same token most likely as full attention in
    float32; None where that was not measured.
    """
    rounds: dict[tuple[int, int, int], list[Json]] = {}
    for record in filter(is_finished, records):
        point = record["point"]
        key = (point["length"], list(METHODS).index(point["method"]), point["k"] or 0)
        rounds.setdefault(key, []).append(record)
    reference = {length: of[-1]["tokens"] for (length, method, _), of in rounds.items() if method == 0}
    found = []
    for (length, number, k), of in sorted(rounds.items()):
        summary: Json = {"length": length, "method": list(METHODS)[number], "k": k or None, "rounds": len(of)}
        summary |= {field: statistics.median(record[field] for record in of) for field in _FIELDS}
        summary["attention_s"] = summary["token_s"] - summary["short_token_s"]
        summary["range_s"] = [edge(record["token_s"] for record in of) for edge in (min, max)]
        right = reference.get(length)
        summary["equal_tokens"] = None if right is None else min(_num_equal(one["tokens"], right) for one in of)
        found.append(summary)
    return found


def _num_equal(tokens: Sequence[int], others: Sequence[int]) -> int:
    return sum(one == other for one, other in zip(tokens, others, strict=True))


def label(method: str, k: int | None) -> str:
    """What a table calls a method.

    >>> label("topk-completed", 64), label("sdpa", None)
    ('top-k, completed, k = 64', 'SDPA')
    """
    return METHODS[method].description + ("" if k is None else f", k = {k}")


def _page(records: Sequence[Json]) -> Page:
    point = records[-1]["point"]
    headings = (
        *("method", "prompt [s]", "token [ms]", f"after {point['short_length']} [ms]", "attention [ms]"),
        *("peak [MiB]", "of the process [MiB]", f"as in full, of {point['num_tokens']}"),
    )
    threads = point["threads"]
    notes = [
        "Prompt: the time of reading it. Token: the time of a token after it, median of rounds (fastest to slowest); "
        "every round runs each method once, in a fresh process. Attention: by how much that is longer than a token "
        "after the short prompt. Peak: above the loaded model; llama.cpp's includes its weights. As in full: at how "
        "many places the same next token is the most likely as with SDPA in float32. All read the same token ids, "
        "after the prompt those that follow in the text, one by one. llama.cpp computes with the packed weights (4 "
        "bits), the others with their unpacked copy.",
        *_missing(records),
        *busy_notes(records),
    ]
    return Page(
        f"{point['model'][0]}: a prompt of {point['length']:,} tokens, then {point['num_tokens']} one by one",
        headings,
        [_row(summary) for summary in summaries(records)],
        notes,
        head=head(records, threads=threads),
    )


def _row(summary: Json) -> tuple[str, ...]:
    equal = summary["equal_tokens"]
    low, high = summary["range_s"]
    spread = f" ({1e3 * low:.1f} to {1e3 * high:.1f})" if summary["rounds"] > 1 else ""
    return (
        label(summary["method"], summary["k"]),
        f"{summary['prefill_s']:.1f}",
        f"{1e3 * summary['token_s']:.1f}{spread}",
        f"{1e3 * summary['short_token_s']:.1f}",
        f"{1e3 * summary['attention_s']:.1f}",
        f"{summary['peak_mib']:,.0f}",
        f"{summary['total_peak_mib']:,.0f}",
        "" if equal is None or summary["method"] == REFERENCE else f"{equal}",
    )


def _missing(records: Sequence[Json]) -> list[str]:
    """Methods that could not take their turn, and why."""
    missing: dict[str, None] = {}
    for record in records:
        if not is_finished(record):
            point, message = record["point"], record["message"].splitlines()[0]
            where = "" if record["outcome"] == "not there" else f" after {point['length']:,} tokens"
            missing[f"{label(point['method'], point['k'])}{where}: {record['outcome']} ({message})."] = None
    return list(missing)


def draw(found: Sequence[Json]) -> Any:
    """Bars of each method after the longest prompt: seconds of reading it, milliseconds of a token, peak memory."""
    length = max(summary["length"] for summary in found)
    shown = [summary for summary in found if summary["length"] == length]
    labels = [label(summary["method"], summary["k"]) for summary in shown]
    colours = [_colour(summary["method"]) for summary in shown]
    panels = (
        ("prefill_s", 1.0, "Reading the prompt [s]"),
        ("token_s", 1e3, "A token [ms]; dark: after few tokens"),
        ("total_peak_mib", 1 / 1024, "Peak memory of the process [GiB]"),
    )
    figure = new_figure(width=13, height=1.4 + 0.34 * len(shown))
    for number, (field, factor, title) in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), number)
        widths = [summary[field] * factor for summary in shown]
        bars = axes.barh(labels, widths, color=colours, height=0.7)
        if field == "token_s":
            axes.barh(labels, [1e3 * summary["short_token_s"] for summary in shown], color="#333333", height=0.25)
        axes.bar_label(bars, [f"{width:.3g}" for width in widths], padding=3, fontsize=8)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.18 * max(widths))
        axes.set_title(title, fontsize=10, loc="left")
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        if number > 1:
            axes.set_yticklabels([])
    figure.suptitle(f"After a prompt of {length:,} tokens", fontsize=10)
    return figure


def _colour(method: str) -> str:
    of = METHODS[method]
    if of.is_llama:
        return STYLES["performer"].colour
    return STYLES["topk-completed" if of.completed else "topk" if of.keeps_k else "vanilla"].colour
