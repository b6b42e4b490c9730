"""What the tables and pictures of benchmarks of points have in common. Nothing here measures."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ..runs.points import PointBenchmark, say
from ..runs.records import Json, days_and_commits, write_whole
from ..runs.timing import busy_note

if TYPE_CHECKING:
    from rich.console import Console

# Headings above what `measured_cells` returns.
MEASURED = ("memory [GiB]", "time [s]", "fastest to slowest [s]")
PEAK_OF_LAYER = (
    "Memory is the peak of the first step above what the process held before the layer was made, with weights, input "
    "and all gradients; time: median."
)


@dataclass(frozen=True)
class Page:
    """A table with a heading and notes. The first column, which says what a row is about, is aligned to the left."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str]

    def show(self, console: Console) -> None:
        from rich.markup import escape
        from rich.table import Table

        table = Table(title=self.title, title_justify="left")
        for number, heading in enumerate(self.headings):
            table.add_column(escape(heading), justify="left" if number == 0 else "right")
        for row in self.rows:
            table.add_row(*map(escape, row))
        console.print(table)
        for line in self.notes:
            say(console, line)

    def as_markdown(self) -> str:
        parts = [f"**{self.title}**", "\n".join(markdown_table(self.headings, self.rows)), *self.notes]
        return "\n\n".join(parts) + "\n"


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """
    >>> markdown_table(["k", "s"], [["64", "0.5"]])
    ['| k | s |', '| --- | --- |', '| 64 | 0.5 |']
    """
    return [f"| {' | '.join(cells)} |" for cells in (headings, ["---"] * len(headings), *rows)]


class Reporting(Protocol):
    """A module that makes tables and pictures of one benchmark's records."""

    def report(self, out: Path) -> list[Path]:
        """Write those of all records in the folder; returns the files."""

    def pages(self, records: Sequence[Json]) -> list[Page]:
        """A table for each setting."""


def run_and_show(
    run: Callable[[PointBenchmark, Console], list[Json]],
    reporting: Reporting,
    benchmark: PointBenchmark,
    console: Console,
) -> None:
    """Measure what is missing, show the tables of the points asked for, and write the reports of all on file."""
    records = run(benchmark, console)
    for page in reporting.pages(records):
        page.show(console)
    for path in reporting.report(benchmark.out):
        say(console, f"Written: {path}")


def write_report(
    path: Path,
    records: Sequence[Json],
    settings: Sequence[str],
    page_of: Callable[[list[Json]], Page],
    draw: Callable[[list[Json], str], list[Path]],
) -> list[Path]:
    """Write the tables of records, one for each setting, and their pictures; nothing where there are no records.

    draw  (records of one setting, what distinguishes its file names) -> pictures written
    """
    if not records:
        return []
    groups = by_setting(records, settings)
    write_whole(path, "\n".join(page_of(group).as_markdown() for group in groups))
    pictures = [draw(group, "" if number == 1 else f"-{number}") for number, group in enumerate(groups, 1)]
    return [path, *itertools.chain.from_iterable(pictures)]


def measured_cells(record: Json) -> tuple[str, str, str]:
    """Peak memory, time and its spread of a record; its outcome in place of the first where it did not finish."""
    if record["outcome"] != "finished":
        return (record["outcome"], "", "")
    spread = f"{record['fastest_s']:.2f} to {record['slowest_s']:.2f} (of {record['repetitions']})"
    return (f"{record['peak_mib'] / 1024:.3f}", f"{record['elapsed_s']:.2f}", spread)


def measured_in_words(record: Json) -> str:
    """The same of a finished record, short."""
    return f"{record['peak_mib'] / 1024:.3f} GiB, {record['elapsed_s']:.2f} s"


def how_measured(records: Sequence[Json]) -> list[str]:
    """Computer, software and limits of records of one setting, and whether others were busy meanwhile."""
    point, here = records[-1]["point"], records[-1]["environment"]
    computer = f"{here['cpu']}, {point['threads']} threads" if point["device"] == "cpu" else point["device"]
    lines = [f"{computer}, PyTorch {here['torch']}, {days_and_commits(records)}."]
    given_up = [record for record in records if record["outcome"] == "out of memory"]
    limits = sorted({record["memory_limit_gib"] for record in given_up if record["memory_limit_gib"] is not None})
    if limits:
        lines.append(f"Out of memory: the process was allowed {' or '.join(f'{limit:g}' for limit in limits)} GiB.")
    busy = busy_note([record.get("other_cores") for record in records], here["num_cpus"])
    return [*lines, *([] if busy is None else [busy])]


def by_setting(records: Sequence[Json], names: Sequence[str]) -> list[list[Json]]:
    """Groups of records whose points agree in these fields.

    >>> by_setting([{"point": {"k": 8, "length": 16}}, {"point": {"k": 8, "length": 32}}], ["k"])
    [[{'point': {'k': 8, 'length': 16}}, {'point': {'k': 8, 'length': 32}}]]
    """
    groups: dict[tuple[str, ...], list[Json]] = {}
    for record in records:
        groups.setdefault(tuple(str(record["point"][name]) for name in names), []).append(record)
    return list(groups.values())


def curves_over(
    x: str, records: Sequence[Json], name: Callable[[Json], str]
) -> tuple[dict[str, list[Json]], dict[str, Json]]:
    """Curves and levels for `draw_memory_and_time`: by name of the point, and those of points without x.

    name  of a record's point

    >>> curves_over("k", [{"point": {"k": 8}}, {"point": {"k": None}}], lambda point: f"{point['k']}")
    ({'8': [{'point': {'k': 8}, 'k': 8}]}, {'None': {'point': {'k': None}}})
    """
    curves: dict[str, list[Json]] = {}
    levels: dict[str, Json] = {}
    for record in records:
        point = record["point"]
        if point[x] is None:
            levels[name(point)] = record
        else:
            curves.setdefault(name(point), []).append(record | {x: point[x]})
    return curves, levels


def with_several(x: str, records: Sequence[Json]) -> list[Json]:
    """The records of points that were measured at several x, all else being equal.

    >>> with_several("k", [{"point": {"k": k, "length": length}} for k, length in ((8, 16), (16, 16), (8, 32))])
    [{'point': {'k': 8, 'length': 16}}, {'point': {'k': 16, 'length': 16}}]
    """
    rest = [record["point"] | {x: None} for record in records]
    return [record for record, same in zip(records, rest, strict=True) if rest.count(same) > 1]


def size_with_most(x: str, records: Sequence[Json], size: str) -> int | None:
    """The size of points at which most different x were measured, the largest of several; None where nowhere two were.

    >>> size_with_most("k", [{"point": {"k": k, "length": 64}} for k in (8, 16, None)], "length")
    64
    """
    swept: dict[int, set[int]] = {}
    for record in records:
        if record["point"][x] is not None:
            swept.setdefault(record["point"][size], set()).add(record["point"][x])
    best = max(swept, key=lambda at: (len(swept[at]), at), default=None)
    return best if best is not None and len(swept[best]) > 1 else None


def quoted_by_field(papers: dict[str, dict[int, tuple[float, float]]]) -> dict[str, dict[str, dict[int, float]]]:
    """Somebody's (GiB, seconds) for `draw_memory_and_time`: name -> {x: ...} becomes field -> name -> {x: value}.

    >>> quoted_by_field({"theirs": {64: (2.0, 0.5)}})
    {'peak_mib': {'theirs': {64: 2.0}}, 'elapsed_s': {'theirs': {64: 0.5}}}
    """
    return {
        field: {name: {x: numbers[axis] for x, numbers in points.items()} for name, points in papers.items()}
        for axis, field in enumerate(("peak_mib", "elapsed_s"))
    }
