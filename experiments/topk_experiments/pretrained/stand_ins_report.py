"""The table of what stand-ins for dropped neurons are worth, from its record. Nothing in this file measures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..runs.records import Json, days_and_commits, read_json, reads, write_whole
from ..show.console import print_table
from ..show.html import counted
from ..show.markdown import markdown_table

if TYPE_CHECKING:
    from rich.console import Console

RECORD, PAGE = "stand-ins.json", "stand-ins.md"


@reads(f"stand-ins/{RECORD}")
def redraw(results: Path) -> list[Path]:
    """Write the table again from the record below the folder of all results; return its path."""
    record = read_json(results / "stand-ins" / RECORD)
    return [] if record is None else [write_report(record, results / "stand-ins")]


def write_report(record: Json, out: Path) -> Path:
    """Write `stand-ins.md` and return its path."""
    write_whole(out / PAGE, as_markdown(record))
    return out / PAGE


def run_name(k: int | None, rank: int | None) -> str:
    """The name of a run in messages.

    >>> run_name(384, 0), run_name(384, 64), run_name(384, None), run_name(None, None)
    ('k = 384, constant', 'k = 384, rank 64', 'k = 384', 'every neuron')
    """
    if k is None:
        return "every neuron"
    return f"k = {k}" if rank is None else f"k = {k}, {kind(rank)}"


def kind(rank: int | None) -> str:
    """What takes the place of dropped neurons, in words."""
    if rank is None:
        return "nothing"
    return f"rank {rank}" if rank else "constant"


def table_rows(record: Json) -> list[list[str]]:
    """Headings, then a row for each run: perplexity, and how long a layer takes against that without a stand-in."""
    size = record["config"]["evaluate_tokens"]
    rows = [["neurons", "in place of the others", "perplexity", f"time of a layer, {size:,} tokens"]]
    for run in record["runs"]:
        time = ""
        if "layer_s" in run:
            alone = next(other for other in record["runs"] if (other["k"], other["rank"]) == (run["k"], None))
            time = f"{run['layer_s'][str(size)] / alone['layer_s'][str(size)]:.2f}"
        neurons = "all" if run["k"] is None else f"{run['k']}"
        rows.append([neurons, "" if run["k"] is None else kind(run["rank"]), f"{run['perplexity']:.2f}", time])
    return rows


def as_markdown(record: Json) -> str:
    """The table with how it was made."""
    config, here = record["config"], record["environment"]
    num_fitted = config["num_tokens"] * config["windows"]
    headings, *rows = table_rows(record)
    lines = [
        f"{record['model']['name']} on {record['text']['source']}: {config['evaluate_tokens']:,} tokens from character "
        f"{config['evaluate_start']:,}, stand-ins fitted on {num_fitted:,} tokens from character {config['start']:,} "
        f"({config['windows']} windows). Times of one layer, forward, are medians, as multiples of the layer without a "
        f"stand-in. {counted(config['threads'], 'thread')}, float32, PyTorch {here['torch']}, "
        f"{days_and_commits([record])}.",
        "",
        markdown_table(headings, rows),
    ]
    return "\n".join(lines) + "\n"


def show(record: Json, console: Console) -> None:
    """Show the table on the console."""
    headings, *rows = table_rows(record)
    print_table(console, f"{record['model']['name']}, {record['text']['source']}", headings, rows)
