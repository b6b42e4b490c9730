"""The table of all recorded runs and the picture of their learning curves. Reads records; nothing here trains."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..plots import COLOURS, QUOTED, new_figure, png_of
from ..records import Json, read_json_lines, write_whole
from .configuration import METHODS
from .quoted import quoted_accuracies
from .runs import RECORDS

if TYPE_CHECKING:
    from rich.console import Console

TABLE, PICTURE = "table.md", "curves.png"
_HEADINGS = (
    "attention",
    "seeds",
    "accuracy at the best validation, %",
    "accuracy at the last step, %",
    "best validation, %",
    "one step, s",
    "its processor time, s",
    "training, min",
    "peak memory, MiB",
)


def write_table(out: Path, console: Console) -> tuple[Path, Path]:
    """Write table.md and curves.png from the records in a folder; returns their paths.

    Raises:
        ValueError: there are no records.
    """
    records = read_json_lines(out / RECORDS)
    if not records:
        raise ValueError(f"no finished runs in {out / RECORDS}; train some with topk-attention lra train")
    table, picture = out / TABLE, out / PICTURE
    write_whole(table, table_in_words(records))
    write_whole(picture, draw_curves(records))
    for path in (table, picture):
        console.print(f"Written: {path}", markup=False, highlight=False, soft_wrap=True)
    return table, picture


def table_in_words(records: Sequence[Json]) -> str:
    """Markdown: a table for each configuration, with the accuracies published for its task below it."""
    parts = [
        "# Long Range Arena",
        "Mean over seeds, with the standard deviation where there are several. Accuracies are of the test set, with "
        "the weights of the best validation and with the last ones; times and memory are medians over runs. Where "
        "other work shared the machine, processor time says more than time by the clock. Published accuracies are "
        "quoted: they are of the full benchmark and of larger models, and were not measured here.",
    ]
    for name in _in_order([record["name"] for record in records]):
        for group in _same_setup([record for record in records if record["name"] == name]):
            parts.append(_section(name, group))
    return "\n\n".join(parts) + "\n"


def _section(name: str, records: Sequence[Json]) -> str:
    first = records[0]
    config, majority = first["config"], first["majority_share"]["test"]
    model, training = config["model"], config["training"]
    lines = [
        f"## {name}",
        "",
        f"{model['num_layers']} layers of d_model {model['d_model']} with {model['num_heads']} heads, "
        f"{first['num_parameters']:,} parameters, {training['steps']:,} steps of {training['batch']} examples, "
        f"{first['num_examples']['train']:,} to train on, {first['num_examples']['test']:,} to test on. "
        f"The most frequent label is right for {majority:.1%}. {_where(records)}",
        "",
        "| " + " | ".join(_HEADINGS) + " |",
        "|" + "---|" * len(_HEADINGS),
    ]
    for method in METHODS:
        for runs in _same_options([record for record in records if record["method"] == method]):
            lines.append("| " + " | ".join(_row(runs)) + " |")
    quoted = quoted_accuracies(config["task"])
    if quoted:
        lines += ["", "Quoted, not measured here:", "", "| model | accuracy, % | source |", "|---|---|---|"]
        lines += [f"| {model} | {accuracy:.2f} | quoted: {source} |" for model, accuracy, source in quoted]
    return "\n".join(lines)


def _row(runs: Sequence[Json]) -> list[str]:
    def median(field: str) -> float:
        return statistics.median(run[field] for run in runs)

    return [
        method_name(runs[0]),
        ", ".join(str(run["seed"]) for run in sorted(runs, key=lambda run: run["seed"])),
        _spread([100 * run["best"]["test_accuracy"] for run in runs]),
        _spread([100 * run["last"]["test_accuracy"] for run in runs]),
        _spread([100 * run["best"]["validation_accuracy"] for run in runs]),
        f"{median('median_step_s'):.3f}",
        f"{statistics.median(run['processor_s'] / run['steps'] for run in runs):.3f}",
        f"{median('elapsed_s') / 60:,.1f}",
        f"{median('peak_mib'):,.0f}",
    ]


def method_name(record: Json) -> str:
    """
    >>> method_name({"method": "topk", "options": {"k": 128}})
    'topk, k = 128'
    """
    return ", ".join([record["method"], *(f"{name} = {value}" for name, value in record["options"].items())])


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2f}"


def _where(records: Sequence[Json]) -> str:
    places = [
        f"{record['environment']['cpu'] if record['device'] == 'cpu' else record['device']}, {record['threads']} "
        f"thread{'s' if record['threads'] > 1 else ''}, {record['num_processes']} "
        f"process{'es' if record['num_processes'] > 1 else ''}, torch {record['environment']['torch']}"
        for record in records
    ]
    return "Measured on " + "; ".join(_in_order(places)) + "."


def draw_curves(records: Sequence[Json]) -> bytes:
    """PNG: validation accuracy against steps, a panel for each configuration, a line for each run."""
    names = _in_order([record["name"] for record in records])
    columns = min(2, len(names))
    rows = -(-len(names) // columns)
    figure = new_figure(width=5.5 * columns, height=3.6 * rows)
    for number, name in enumerate(names, 1):
        axes = figure.add_subplot(rows, columns, number)
        shown = [record for record in records if record["name"] == name]
        for colour, method in zip(COLOURS, METHODS, strict=True):
            for first, record in enumerate(record for record in shown if record["method"] == method):
                axes.plot(
                    [point["step"] for point in record["curve"]],
                    [100 * point["validation_accuracy"] for point in record["curve"]],
                    color=colour,
                    linewidth=1,
                    alpha=0.8,
                    label=None if first else method_name(record),
                )
        majority = 100 * shown[0]["majority_share"]["validation"]
        axes.axhline(majority, color=QUOTED, linestyle=":", linewidth=1, label="most frequent label")
        axes.set_xlabel("step")
        axes.set_title(f"{name}: validation accuracy [%]", fontsize=10, loc="left")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8)
    return png_of(figure)


def _same_setup(records: Sequence[Json]) -> list[list[Json]]:
    """Runs of one name that had the same configuration and data, together."""
    return _grouped(records, ("config", "data"))


def _same_options(records: Sequence[Json]) -> list[list[Json]]:
    return _grouped(records, ("options",))


def _grouped(records: Sequence[Json], fields: Sequence[str]) -> list[list[Json]]:
    groups: list[list[Json]] = []
    for record in records:
        for group in groups:
            if all(group[0][field] == record[field] for field in fields):
                group.append(record)
                break
        else:
            groups.append([record])
    return groups


def _in_order(words: Sequence[str]) -> list[str]:
    """Each once, in the order of their first appearance."""
    return list(dict.fromkeys(words))
