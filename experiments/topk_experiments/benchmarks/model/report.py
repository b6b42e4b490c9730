"""Tables and pictures from the records of a file. Nothing here measures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from topk_attention.environment import environment

from ...runs.records import Json, days_and_commits, read_json_lines, write_whole
from ...runs.timing import busy_note
from ...show.plots import draw_memory_and_time
from . import paper
from .benchmark import ModelBenchmark, is_comparable
from .points import METHODS, RANDOM, Point, curve_name, settings

if TYPE_CHECKING:
    from rich.console import Console

_HEADINGS = (
    "L",
    "method",
    "peak [GiB]",
    "held after forward [GiB]",
    "step [s]",
    "forward [s]",
    "backward [s]",
    "paper [GiB]",
    "paper [s]",
)


class Curve(NamedTuple):
    """The newest records of one method in one setting, by length."""

    name: str
    method: str
    records: dict[int, Json]


def report(benchmark: ModelBenchmark, console: Console) -> list[Path]:
    """Show all points on file that share the settings of those asked for, and write `NAME.md` and `NAME.png`.

    Returns the files written.
    """
    curves = curves_on_file(benchmark)
    if not curves:
        return []
    _show(benchmark, curves, console)
    page = benchmark.out / f"{benchmark.name}.md"
    write_whole(page, as_markdown(benchmark, curves))
    if not any(record["outcome"] == "finished" for record in _records(curves)):
        return [page]
    picture = benchmark.out / f"{benchmark.name}.png"
    _draw(benchmark, curves, picture)
    return [page, picture]


def curves_on_file(benchmark: ModelBenchmark) -> list[Curve]:
    """In the order of METHODS, and of the file within a method. The page names the commits they are of."""
    here, wanted = environment(), settings(benchmark.points[0].as_record())
    curves: dict[str, Curve] = {}
    for record in read_json_lines(benchmark.lines):
        point = record["point"]
        if settings(point) != wanted or not is_comparable(record, here):
            continue
        name = curve_name(point)
        curves.setdefault(name, Curve(name, point["method"], {})).records[point["length"]] = record
    return sorted(curves.values(), key=lambda curve: list(METHODS).index(curve.method))


def as_markdown(benchmark: ModelBenchmark, curves: Sequence[Curve]) -> str:
    """Heading, table, and how its numbers came about."""
    records = _records(curves)
    here = records[-1]["environment"]
    headings, rows = _table(benchmark, curves)
    lines = [
        f"**{title(benchmark.points[0])}**",
        "",
        f"{here['cpu']}, PyTorch {here['torch']}, transformers {here['transformers']}, {days_and_commits(records)}.",
        "",
        _row(headings),
        _row(["---"] * len(headings)),
        *map(_row, rows),
        "",
        *(f"- {line}" for line in notes(benchmark, curves)),
    ]
    return "\n".join(lines) + "\n"


def title(point: Point) -> str:
    """What all points of a table share."""
    parts = [
        f"One training step of {point.shape}, batch 1",
        point.dtype,
        f"dropout {point.dropout_p:g}",
        "gradient checkpointing" if point.checkpointing else "no gradient checkpointing",
    ]
    parts.append("GPU" if point.device == "cuda" else f"{point.threads} CPU thread{'s' if point.threads > 1 else ''}")
    return ", ".join(parts)


def notes(benchmark: ModelBenchmark, curves: Sequence[Curve]) -> list[str]:
    """How the numbers came about, what was checked, and what is missing and why."""
    records = _records(curves)
    finished = [record for record in records if record["outcome"] == "finished"]
    lines = [
        "Peak: of the first step, above what the process held before the model was made: weights, their gradients, "
        "activations and all between. Step: median (fastest to slowest) where there were several.",
        *(f"{curve.name}: {line}" for curve in curves for line in [*_check_lines(curve), *_dropout_lines(curve)]),
    ]
    if finished:
        weights = sorted({round(record["weights_mib"] / 1024, 2) for record in finished})
        told = f"{weights[0]:.2f}" if len(weights) == 1 else f"{weights[0]:.2f} to {weights[-1]:.2f}"
        lines.append(f"Weights take {told} GiB of it, and their gradients as much.")
    for curve in curves:
        for length, record in sorted(curve.records.items()):
            if record["outcome"] != "finished":
                message = record["message"].splitlines()[0]
                limit = f", of {record['memory_limit_mib'] / 1024:.1f} GiB" if "memory_limit_mib" in record else ""
                lines.append(f"L = {length:,}, {curve.name}: {record['outcome']}{limit} ({message}).")
    busy = busy_note([record["other_cores"] for record in finished], records[-1]["environment"]["num_cpus"])
    lines += [] if busy is None else [busy]
    return [*lines, paper.NOTE] if _is_the_papers(benchmark.points[0]) else lines


def _check_lines(curve: Curve) -> list[str]:
    checks = [record["check"] for record in curve.records.values() if record["outcome"] == "finished"]
    checks = [check for check in checks if check["compared_with"] is not None]
    if not checks:
        return []
    loss, gradient = (max(check[name] for check in checks) for name in ("loss_error", "gradient_error"))
    activation = f" and with {checks[0]['activation']}" if "activation" in checks[0] else ""
    line = (
        f"checked at {checks[0]['length']} tokens without dropout{activation} against {checks[0]['compared_with']}; "
        f"largest errors "
        f"{loss:.0e} and {gradient:.0e} of a gradient's largest entry"
    )
    if "loss_error_below_length" in checks[0]:
        below = max(check["loss_error_below_length"] for check in checks)
        line += f"; with k = {checks[0]['k']} against {checks[0]['compared_with_below_length']}, {below:.0e}"
    return [f"{line}."]


def _dropout_lines(curve: Curve) -> list[str]:
    if curve.method not in RANDOM or all(record["point"]["dropout_p"] == 0 for record in curve.records.values()):
        return []
    return ["no dropout of attention weights, which it never forms; every other dropout of the model acts."]


def _table(benchmark: ModelBenchmark, curves: Sequence[Curve]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for length in sorted({length for curve in curves for length in curve.records}):
        for curve in curves:
            if length in curve.records:
                rows.append([f"{length:,}", curve.name, *_cells(benchmark.points[0], curve, length)])
    # The paper's columns are there where it has a number for one of the rows.
    used = [number for number, name in enumerate(_HEADINGS) if "paper" not in name or any(row[number] for row in rows)]
    return [_HEADINGS[number] for number in used], [[row[number] for number in used] for row in rows]


def _cells(point: Point, curve: Curve, length: int) -> list[str]:
    record = curve.records[length]
    quoted = [
        numbers.get(curve.method, {}).get(length) if _is_the_papers(point) and _is_its_size(record["point"]) else None
        for numbers in (paper.PEAK_GIB, paper.SECONDS)
    ]
    of_paper = ["" if number is None else f"{number:g}" for number in quoted]
    if record["outcome"] != "finished":
        return [record["outcome"], "", "", "", "", *of_paper]
    return [
        f"{record['peak_mib'] / 1024:.2f}",
        f"{record['held_after_forward_mib'] / 1024:.2f}",
        f"{record['elapsed_s']:.1f} ({record['fastest_s']:.1f} to {record['slowest_s']:.1f})"
        if record["repetitions"] > 1
        else f"{record['elapsed_s']:.1f} (one step, the first)",
        f"{record['forward_s']:.1f}",
        f"{record['backward_s']:.1f}",
        *of_paper,
    ]


def _is_the_papers(point: Point) -> bool:
    """Whether the paper measured a model of these settings."""
    return (point.shape, point.dropout_p, point.checkpointing, point.dtype) == ("bert-base", 0.1, False, "float32")


def _is_its_size(point: Json) -> bool:
    """Whether a method kept as many keys, or drew as many features, as the paper's."""
    return {"topk": point["k"] == 64, "performer": point.get("num_features") == 256}.get(point["method"], True)


def _show(benchmark: ModelBenchmark, curves: Sequence[Curve], console: Console) -> None:
    from rich.markup import escape
    from rich.table import Table

    headings, rows = _table(benchmark, curves)
    table = Table(title=escape(title(benchmark.points[0])), title_justify="left")
    for heading in headings:
        table.add_column(escape(heading), justify="left" if heading == "method" else "right")
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)
    for line in notes(benchmark, curves):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _draw(benchmark: ModelBenchmark, curves: Sequence[Curve], path: Path) -> None:
    point = benchmark.points[0]
    quoted, like = {}, {}
    if _is_the_papers(point):
        names = {method: f"{METHODS[method]}, Gupta et al. 2021 (quoted, GPU)" for method in paper.PEAK_GIB}
        quoted = {
            field: {names[method]: numbers for method, numbers in of_paper.items()}
            for field, of_paper in (("peak_mib", paper.PEAK_GIB), ("elapsed_s", paper.SECONDS))
        }
        like = {
            names[curve.method]: curve.name
            for curve in reversed(curves)
            if curve.method in names and _is_its_size(next(iter(curve.records.values()))["point"])
        }
    draw_memory_and_time(
        {
            curve.name: [record | {"length": length} for length, record in sorted(curve.records.items())]
            for curve in curves
        },
        path,
        x="length",
        x_label="L, length of the input",
        title=title(point),
        quoted=quoted,
        quoted_like=like,
    )


def _records(curves: Iterable[Curve]) -> list[Json]:
    return [record for curve in curves for record in curve.records.values()]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
