"""Tables and pictures from the records of a file. Nothing in this module measures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...rivals import METHODS as EVERY_METHOD
from ...runs.ledger import is_finished, newest
from ...runs.records import Json, days_and_commits, read_json_lines, reads, write_whole
from ...show.quoted import MODEL as PAPER
from ...show.quoted import MODEL_NOTE
from ..tables import Columns, Page, Quoted, busy_notes, cells, draw_sweep
from .points import METHODS, RANDOM, curve_name, settings

if TYPE_CHECKING:
    from rich.console import Console

_COLUMNS: Columns = {
    "peak [GiB]": lambda record: f"{record['peak_mib'] / 1024:.2f}",
    "held after forward [GiB]": lambda record: f"{record['held_after_forward_mib'] / 1024:.2f}",
    "step [s]": lambda record: f"{record['elapsed_s']:.1f} ({_spread(record)})",
    "forward [s]": lambda record: f"{record['forward_s']:.1f}",
    "backward [s]": lambda record: f"{record['backward_s']:.1f}",
}


@reads()
def report(lines: Path, setting: Json | None = None, console: Console | None = None) -> list[Path]:
    """Write the table and the picture of the records in `NAME.jsonl` to `NAME.md` and `NAME.png` beside it.

    setting  of `points.settings`; records of other settings are left out. None: that of the last record
    console  shows the table too

    Returns the files written; none where no record has the setting.
    """
    on_file = read_json_lines(lines)
    setting = settings(on_file[-1]["point"]) if setting is None and on_file else setting
    records = [record for record in on_file if settings(record["point"]) == setting]
    if not records:
        return []
    records = newest(records, lambda record: f"{curve_name(record['point'])}, {record['point']['length']}")
    records.sort(key=lambda record: (METHODS.index(record["point"]["method"]), record["point"]["length"]))
    table = page_of(records)
    if console is not None:
        table.show(console)
    page = lines.with_suffix(".md")
    write_whole(page, table.as_markdown())
    return [page, *_draw(records, lines.with_suffix(".png"))]


def redraw(results: Path) -> list[Path]:
    """Draw the tables and pictures of all records in `results/model` again. Nothing is measured."""
    return [written for lines in sorted((results / "model").glob("*.jsonl")) for written in report(lines)]


def page_of(records: Sequence[Json]) -> Page:
    """The table of records of one setting, by length, and the notes below it."""
    by_length = sorted(records, key=lambda record: record["point"]["length"])
    headings, rows = ["L", "method", *_COLUMNS], []
    quoted = [_papers_curve(record["point"]).get(record["point"]["length"]) for record in by_length]
    # The paper's columns appear if the paper has numbers for at least one row.
    headings += ["paper [GiB]", "paper [s]"] if any(quoted) else []
    for record, numbers in zip(by_length, quoted, strict=True):
        row = (f"{record['point']['length']:,}", curve_name(record["point"]), *cells(record, _COLUMNS))
        of_paper = ("", "") if numbers is None else (f"{number:g}" for number in numbers)
        rows.append((*row, *of_paper)[: len(headings)])
    of_last = records[-1]["environment"]
    software = f"PyTorch {of_last['torch']}, transformers {of_last['transformers']}"
    head = f"{of_last['cpu']}, {software}, {days_and_commits(records)}."
    return Page(title(records[0]["point"]), headings, rows, notes(records), has_list=True, head=head)


def title(point: Json) -> str:
    """What all points of a table share."""
    threads = f"{point['threads']} CPU thread{'s' if point['threads'] > 1 else ''}"
    checkpointing = "gradient checkpointing" if point["checkpointing"] else "no gradient checkpointing"
    return (
        f"One training step of {point['shape']}, batch 1, {point['dtype']}, dropout {point['dropout_p']:g}, "
        f"{checkpointing}, {'GPU' if point['device'] == 'cuda' else threads}"
    )


def notes(records: Sequence[Json]) -> list[str]:
    """How the numbers were measured, what was checked, and what is missing and why."""
    finished = [record for record in records if is_finished(record)]
    lines = [
        "Peak: of the first step, above what the process held before the model was made: weights, their gradients, "
        "activations and all between. Step: median (fastest to slowest) where there were several.",
    ]
    for name in dict.fromkeys(curve_name(record["point"]) for record in records):
        of_curve = [record for record in records if curve_name(record["point"]) == name]
        lines += [f"{name}: {line}" for line in _check_lines(of_curve)]
        if any(record["point"]["method"] in RANDOM and record["point"]["dropout_p"] > 0 for record in of_curve):
            lines.append(
                f"{name}: no dropout of attention weights, which it never forms; every other dropout of the model acts."
            )
    if finished:
        weights = sorted({round(record["weights_mib"] / 1024, 2) for record in finished})
        gib = f"{weights[0]:.2f}" if len(weights) == 1 else f"{weights[0]:.2f} to {weights[-1]:.2f}"
        lines.append(f"Weights take {gib} GiB of it, and their gradients as much.")
    for record in records:
        if not is_finished(record):
            message = record["message"].splitlines()[0]
            limit = f", of {record['memory_limit_mib'] / 1024:.1f} GiB" if "memory_limit_mib" in record else ""
            lines.append(
                f"L = {record['point']['length']:,}, {curve_name(record['point'])}: {record['outcome']}{limit} "
                f"({message})."
            )
    return [*lines, *busy_notes(records), *([MODEL_NOTE] if _is_the_papers(records[0]["point"]) else [])]


def _check_lines(records: Sequence[Json]) -> list[str]:
    """How the answer of one method was checked; nothing where there was nothing to compare with."""
    checks = [record["check"] for record in records if is_finished(record)]
    checks = [check for check in checks if check["compared_with"] is not None]
    if not checks:
        return []
    first = checks[0]
    loss, gradient = (max(check[name] for check in checks) for name in ("loss_error", "gradient_error"))
    activation = f" and with {first['activation']}" if "activation" in first else ""
    line = (
        f"checked at {first['length']} tokens without dropout{activation} against {first['compared_with']}; "
        f"largest errors {loss:.0e} and {gradient:.0e} of a gradient's largest entry"
    )
    if "loss_error_below_length" in first:
        below = max(check["loss_error_below_length"] for check in checks)
        line += f"; with k = {first['k']} against {first['compared_with_below_length']}, {below:.0e}"
    return [f"{line}."]


def _spread(record: Json) -> str:
    several = record["repetitions"] > 1
    return "{fastest_s:.1f} to {slowest_s:.1f}".format_map(record) if several else "one step, the first"


def _is_the_papers(point: Json) -> bool:
    """Whether the paper measured a model of these settings."""
    names = ("shape", "dropout_p", "checkpointing", "dtype")
    return [point[name] for name in names] == ["bert-base", 0.1, False, "float32"]


def _papers_curve(point: Json) -> dict[int, tuple[float, float]]:
    """The paper's numbers for a method of these settings that keeps as many keys, or draws as many features."""
    is_its_size = {"topk": point["k"] == 64, "performer": point.get("num_features") == 256}.get(point["method"], True)
    return PAPER.get(point["method"], {}) if _is_the_papers(point) and is_its_size else {}


def _draw(records: Sequence[Json], path: Path) -> list[Path]:
    quoted: dict[str, Quoted] = {}
    if _is_the_papers(records[0]["point"]):
        like = {
            record["point"]["method"]: curve_name(record["point"])
            for record in reversed(records)
            if _papers_curve(record["point"])
        }
        for method, numbers in PAPER.items():
            # Without the explanation in parentheses: the legend has no room for it.
            name = EVERY_METHOD[method].description.partition(" (")[0]
            quoted[f"{name}, Gupta et al. 2021 (quoted, GPU)"] = Quoted(numbers, like.get(method, ""))
    return draw_sweep(
        records,
        path,
        x="length",
        x_label="L, length of the input",
        title=title(records[0]["point"]),
        name=curve_name,
        quoted=quoted,
    )
