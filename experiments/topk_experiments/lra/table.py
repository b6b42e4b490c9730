"""The table of all runs on file and the picture of their learning curves. Nothing in this file trains."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runs.records import Json, read_json_lines, reads, write_whole
from ..runs.timing import busy_note
from ..show.html import counted
from ..show.plots import QUOTED, legend_below, new_figure, save, styles
from .configuration import METHOD_OPTIONS, TASKS
from .quoted import NOTES, quoted_accuracies
from .runs import RECORDS

if TYPE_CHECKING:
    from rich.console import Console

# An accuracy that is so many of its standard errors above a guess is clearly above it.
_CLEARLY = 5
# Degrees of freedom -> half the width of a mean's 95 % interval in standard errors (Student's t).
_T_95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}
TABLE, PICTURE = "table.md", "curves.png"
_HEADINGS = (
    "attention",
    "seeds",
    "accuracy at the best validation, %",
    "accuracy at the last step, %",
    "best validation, %",
    "one step, s",
    "steps x median step, min",
    "processor time, min",
    "peak memory, MiB",
)


def redraw(results: Path) -> list[Path]:
    """Write table and picture again from the records below the folder of all results, if there are any."""
    out = results / "lra"
    return list(write_files(out)) if (out / RECORDS).exists() else []


def write_table(out: Path, console: Console) -> tuple[Path, Path]:
    """Write table.md and curves.png, print their paths and return them.

    Raises:
        ValueError: there are no records.
    """
    written = write_files(out)
    for path in written:
        console.print(f"Written: {path}", markup=False, highlight=False, soft_wrap=True)
    return written


@reads(RECORDS)
def write_files(out: Path) -> tuple[Path, Path]:
    """Write table.md and curves.png from the records in a folder; return their paths.

    Raises:
        ValueError: there are no records.
    """
    records = read_json_lines(out / RECORDS)
    if not records:
        raise ValueError(f"no finished runs in {out / RECORDS}; train some with topk-experiments lra train")
    table, picture = out / TABLE, out / PICTURE
    write_whole(table, table_in_words(records))
    save(draw_curves(records), picture)
    return table, picture


def table_in_words(records: Sequence[Json]) -> str:
    """Markdown: one table of all accuracies beside the published ones, then a table for each configuration."""
    parts = [
        "# Long Range Arena",
        "Mean over seeds, with the standard deviation where there are several. Accuracies are of the test set, with "
        "the weights of the best validation and with the last ones; times and memory are medians over runs. Training "
        "time is the number of steps times the median step, so that stalls by other work do not count; where others "
        "shared the machine, processor time says more. Published accuracies are quoted, not measured here: they are "
        "of the benchmark's own data at full size. Configurations that end in -small have less and shorter data and "
        "smaller models, and do not compare with them.",
    ]
    by_name = _setups(records)
    return "\n\n".join([*parts, _overview(by_name), *itertools.starmap(_section, by_name.items())]) + "\n"


def _setups(records: Sequence[Json]) -> dict[str, list[Json]]:
    """Name -> runs of one configuration on the same data. If later settings or data replaced these, the name says so.

    Tasks stand in the benchmark's order, configurations of a task in the order of their first records.
    """
    groups = sorted(_grouped(records, ("name", "config", "data")), key=lambda group: list(TASKS).index(_task(group)))
    of_name: dict[str, list[list[Json]]] = {}
    for group in groups:
        of_name.setdefault(group[0]["name"], []).append(group)
    named = {}
    for name, states in of_name.items():
        for number, state in enumerate(states, 1):
            earlier = "" if number == len(states) else f" (earlier settings or data, {number})"
            named[name + earlier] = state
    return named


def _overview(by_name: Mapping[str, Sequence[Json]]) -> str:
    """Test accuracy at the best validation: a column a setup, a row a method and a published model."""
    setups = list(by_name.values())
    majorities = [f"{100 * setup[0]['majority_share']['test']:.2f}" for setup in setups]
    rows = [["accuracy, %", *by_name], ["---"] * (len(setups) + 1), ["most frequent label", *majorities]]
    for method in METHOD_OPTIONS:
        cells = [_accuracies([record for record in setup if record["method"] == method]) for setup in setups]
        if any(cells):
            rows.append([method, *cells])
    published = [
        {f"{model} (quoted: {source})": accuracy for model, accuracy, source in _quoted(setup)} for setup in setups
    ]
    for model in _in_order([model for accuracies in published for model in accuracies]):
        cells = [f"{accuracies[model]:.2f}" if model in accuracies else "" for accuracies in published]
        rows.append([model, *cells])
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    tasks = dict.fromkeys(_task(setup) for setup, quoted in zip(setups, published, strict=True) if quoted)
    return "\n\n".join([table, *(NOTES[task] for task in tasks if task in NOTES)])


def _quoted(setup: Sequence[Json]) -> list[tuple[str, float, str]]:
    config = setup[0]["config"]
    return quoted_accuracies(config["task"], **_resolution(config))


def _accuracies(runs: Sequence[Json]) -> str:
    """Mean accuracies with the number of seeds, one for each k or number of features."""
    cells = []
    groups = _same_options(runs)
    for group in groups:
        accuracies = [100 * run["best"]["test_accuracy"] for run in group]
        options = f"{', '.join(_options(group[0]))}: " if len(groups) > 1 else ""
        cells.append(f"{options}{_spread(accuracies)} ({counted(len(group), 'seed')})")
    return "; ".join(cells)


def _task(setup: Sequence[Json]) -> str:
    return setup[0]["config"]["task"]


def _section(name: str, records: Sequence[Json]) -> str:
    first = records[0]
    model, training = first["config"]["model"], first["config"]["training"]
    lines = [
        f"## {name}",
        "",
        f"{counted(model['num_layers'], 'layer')} of d_model {model['d_model']} with "
        f"{counted(model['num_heads'], 'head')}, {first['num_parameters']:,} parameters, {training['steps']:,} steps "
        f"of {training['batch']} examples, {first['num_examples']['train']:,} to train on, "
        f"{first['num_examples']['test']:,} to test on. "
        f"{_where(records)}",
        *_majority_lines(records),
        *_baseline_lines(records),
        *_difference_lines(records),
        *_equality_lines(records),
        *_busy_lines(records),
        "",
        "| " + " | ".join(_HEADINGS) + " |",
        "|" + "---|" * len(_HEADINGS),
    ]
    for method in METHOD_OPTIONS:
        for runs in _same_options([record for record in records if record["method"] == method]):
            lines.append("| " + " | ".join(_row(runs)) + " |")
    return "\n".join(lines)


def _resolution(config: Json) -> dict[str, int]:
    settings = config["settings"]
    return {"resolution": settings["resolution"]} if "resolution" in settings else {}


def _baseline_lines(records: Sequence[Json]) -> list[str]:
    """Accuracies of guesses without a model, and the runs that are not clearly above them."""
    known: Json = next((record["baselines"] for record in records if record.get("baselines")), {})
    lines = []
    for name, shares in known.items():
        unclear = [
            f"{_run_name(record)} ({record['best']['test_accuracy']:.1%})"
            for record in records
            if _standard_errors_above(shares["test"], record) < _CLEARLY
        ]
        line = f"Guessing {name} is right for {shares['test']:.1%} of the test examples, without a model."
        named = f" Less than {_CLEARLY} standard errors above it: {'; '.join(unclear)}."
        lines += ["", line + (named if unclear else "")]
    return lines


def _majority_lines(records: Sequence[Json]) -> list[str]:
    """How far the runs are above the most frequent label; runs that are not clearly above it are named."""
    apart = [(_standard_errors_above(record["majority_share"]["test"], record), record) for record in records]
    lowest = min(errors for errors, _ in apart)
    unclear = [f"{_run_name(record)} ({errors:.1f})" for errors, record in apart if errors < _CLEARLY]
    line = f"Every run is at least {lowest:.1f} standard errors of its test accuracy above the most frequent label."
    if unclear:
        line = (
            f"Less than {_CLEARLY} standard errors of their test accuracy above the most frequent label: "
            f"{'; '.join(unclear)}."
        )
    return ["", line]


def _standard_errors_above(share: float, record: Json) -> float:
    accuracy, count = record["best"]["test_accuracy"], record["num_examples"]["test"]
    error = math.sqrt(max(accuracy * (1 - accuracy), 1 / count) / count)
    return (accuracy - share) / error


def _difference_lines(records: Sequence[Json]) -> list[str]:
    """Test accuracies of top-k attention minus those of vanilla, and of completed attention minus those of both.

    Of the same seeds, where both have several.
    """
    groups = {name: _same_options([one for one in records if one["method"] == name]) for name in METHOD_OPTIONS}
    pairs = [
        (runs, others) for name in ("topk", "topk-completed") for runs in groups[name] for others in groups["vanilla"]
    ]
    completed = itertools.product(groups["topk-completed"], groups["topk"])
    pairs += [(runs, others) for runs, others in completed if runs[0]["options"] == others[0]["options"]]
    lines = []
    for runs, others in pairs:
        other_of = {run["seed"]: run for run in others}
        both = {run["seed"]: run for run in runs if run["seed"] in other_of}
        if len(both) < 2:
            continue
        parts = []
        for point, words in (("best", "at the best validation"), ("last", "at the last step")):
            differences = [
                100 * (run[point]["test_accuracy"] - other_of[seed][point]["test_accuracy"])
                for seed, run in sorted(both.items())
            ]
            mean = statistics.fmean(differences)
            error = statistics.stdev(differences) / math.sqrt(len(differences))
            reach = _T_95.get(len(differences) - 1, _T_95[max(_T_95)]) * error
            verdict = "0 is within" if abs(mean) <= reach else "0 is outside"
            parts.append(
                f"{mean:+.2f} ± {error:.2f} points {words} ({', '.join(f'{d:+.2f}' for d in differences)}; {verdict} "
                f"the 95 % interval, ± {reach:.2f})"
            )
        lines += [
            "",
            f"{method_name(runs[0])} minus {method_name(others[0])} with the same seed, mean and its standard error "
            f"over {len(both)} seeds: {'; '.join(parts)}.",
        ]
    return lines


def _equality_lines(records: Sequence[Json]) -> list[str]:
    """How far query chunks are from vanilla attention after a whole training; both compute the same."""
    vanilla = {record["seed"]: record for record in records if record["method"] == "vanilla"}
    lines = []
    for run in records:
        other = vanilla.get(run["seed"])
        if run["method"] != "query-chunks" or other is None:
            continue
        by_step = {point["step"]: point for point in other["curve"]}
        # One of them may have stopped earlier.
        pairs = [(point, by_step[point["step"]]) for point in run["curve"] if point["step"] in by_step]
        if not pairs:
            continue
        furthest = max(
            abs(point[name] / expected[name] - 1)
            for point, expected in pairs
            for name in ("training_loss", "validation_loss")
        )
        hits = round(abs(run["best"]["test_accuracy"] - other["best"]["test_accuracy"]) * run["num_examples"]["test"])
        lines += [
            "",
            f"{_run_name(run)}, against vanilla: the losses of the curve differ by at most {furthest:.1e} of their "
            f"size, the number of right test answers by {hits}.",
        ]
    return lines


def _run_name(record: Json) -> str:
    return f"{method_name(record)}, seed {record['seed']}"


def _busy_lines(records: Sequence[Json]) -> list[str]:
    note = busy_note([record["other_cores"] for record in records], records[0]["environment"].get("num_cpus"))
    return [] if note is None else ["", note]


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
        f"{statistics.median(run['steps'] * run['median_step_s'] for run in runs) / 60:,.1f}",
        f"{median('processor_s') / 60:,.1f}",
        f"{median('peak_mib'):,.0f}",
    ]


def method_name(record: Json) -> str:
    """A method with its options.

    >>> method_name({"method": "topk", "options": {"k": 128}})
    'topk, k = 128'
    """
    return ", ".join([record["method"], *_options(record)])


def _options(record: Json) -> list[str]:
    return [f"{name} = {value}" for name, value in record["options"].items()]


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2f}"


def _where(records: Sequence[Json]) -> str:
    places = [
        f"{record['environment']['cpu'] if record['device'] == 'cpu' else record['device']}, "
        f"{counted(record['threads'], 'thread')}, {counted(record['num_processes'], 'process', 'es')}, torch "
        f"{record['environment']['torch']}"
        for record in records
    ]
    return "Measured on " + "; ".join(_in_order(places)) + "."


def draw_curves(records: Sequence[Json]) -> Any:
    """A figure: validation accuracy against steps. A panel for each configuration, a line for each run."""
    by_name = _setups(records)
    columns = min(2, len(by_name))
    rows = -(-len(by_name) // columns)
    figure = new_figure(width=5.5 * columns, height=3.4 * rows)
    style_of = styles(method_name(record) for record in _by_method(records))
    for number, (setup, shown) in enumerate(by_name.items(), 1):
        axes = figure.add_subplot(rows, columns, number)
        drawn = set()
        for record in _by_method(shown):
            name = method_name(record)
            axes.plot(
                [point["step"] for point in record["curve"]],
                [100 * point["validation_accuracy"] for point in record["curve"]],
                color=style_of[name].colour,
                marker=style_of[name].marker,
                linestyle=style_of[name].line,
                markersize=3,
                linewidth=1,
                alpha=0.8,
                label=None if name in drawn else name,
            )
            drawn.add(name)
        majority = 100 * shown[0]["majority_share"]["validation"]
        axes.axhline(majority, color=QUOTED, linestyle=":", linewidth=1, label="most frequent label")
        axes.set_xlabel("step")
        axes.set_title(f"{setup}: validation accuracy [%]", fontsize=10, loc="left")
        axes.grid(alpha=0.25)
    legend_below(figure, columns=2 * columns)
    return figure


def _by_method(records: Sequence[Json]) -> list[Json]:
    """In the order of METHOD_OPTIONS."""
    return sorted(records, key=lambda record: list(METHOD_OPTIONS).index(record["method"]))


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
    """Each word once, in the order of first appearance."""
    return list(dict.fromkeys(words))
