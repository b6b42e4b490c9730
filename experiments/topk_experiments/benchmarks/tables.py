"""The one maker of tables, on the console and in markdown, and of pictures over a size. Nothing here measures."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..runs.ledger import newest, on_file
from ..runs.progress import say
from ..runs.records import Json, days_and_commits, write_whole
from ..runs.timing import busy_note
from ..show.plots import MEMORY_AND_TIME, draw_memory_and_time

if TYPE_CHECKING:
    from rich.console import Console

# Headings above what `measured_cells` returns.
MEASURED = ("memory [GiB]", "time [s]", "fastest to slowest [s]")


@dataclass(frozen=True)
class Page:
    """A table with a heading and notes. The first column, which names the row, is aligned to the left.

    has_list  notes are the points of a list instead of paragraphs
    head      line between the heading and the table, in markdown alone
    """

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str]
    has_list: bool = False
    head: str = ""

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
        notes = ["\n".join(f"- {line}" for line in self.notes)] if self.has_list else self.notes
        parts = [f"**{self.title}**", *([self.head] if self.head else [])]
        parts += ["\n".join(markdown_table(self.headings, self.rows)), *notes]
        return "\n\n".join(parts).rstrip() + "\n"


class PointTable:
    """The tables and pictures of points that each have a process of their own. Benchmarks fill in what follows."""

    name: ClassVar[str]  # of the files
    schema: ClassVar[str]  # of the records
    operation: ClassVar[str]  # module whose OPERATION is measured
    settings: ClassVar[Sequence[str]]  # fields of a point in which all points of one table agree
    size: ClassVar[tuple[str, str, str]]  # the field that a table is about, its heading, its label in a picture
    k_axis: ClassVar[str] = ""  # label of k in the picture over k, where there is one
    methods: ClassVar[str] = "method"  # heading of the methods' names
    memory_note: ClassVar[str] = (
        "Memory is the peak of the first step above what the process held before the layer was made, with weights, "
        "input and all gradients; time: median."
    )
    panels: ClassVar[Sequence[tuple[str, str, float]]] = MEMORY_AND_TIME
    paper_headings: ClassVar[Sequence[str]] = ()  # of columns with the paper's numbers beside ours
    paper_note: ClassVar[str] = ""  # where the paper's numbers come from

    def title(self, point: Json) -> str:
        """What all points of a table share."""
        raise NotImplementedError

    def picture_title(self, point: Json) -> str:
        """What all points of a picture share."""
        return self.title(point)

    def label(self, point: Json) -> str:
        """What a table or a picture calls a method with its settings."""
        raise NotImplementedError

    def order(self, point: Json) -> Any:
        """Sorts the rows of a table."""
        return point[self.size[0]]

    def curve_order(self, point: Json) -> int:
        """Sorts the curves of a picture, which otherwise stand as they were measured."""
        return 0

    def k_label(self, point: Json) -> str:
        """`label` in the picture over k, where k is no setting; empty: not in that picture."""
        return self.label(point | {"k": None})

    def paper(self, point: Json) -> tuple[str, Mapping[int, tuple[float, float]]]:
        """What the paper calls the method, and its size -> (GiB, seconds) where the point has the paper's settings."""
        return ("", {})

    def paper_rows(self, point: Json) -> list[tuple[str, ...]]:
        """The paper's numbers below the table of points like this one."""
        return []

    def paper_columns(self, point: Json) -> tuple[str, ...]:
        """The paper's numbers for a point, under `paper_headings`."""
        return ()

    def page(self, records: Sequence[Json]) -> Page:
        """The table of records of one setting."""
        records = sorted(records, key=lambda record: self.order(record["point"]))
        rows: list[tuple[str, ...]] = []
        for record in records:
            point, size = record["point"], record["point"][self.size[0]]
            number = "" if size is None else f"{size:,}"
            rows.append((self.label(point), number, *measured_cells(record), *self.paper_columns(point)))
        quoted = self.paper_rows(records[0]["point"])
        is_quoted = bool(quoted) or any(row[len(MEASURED) + 2 :] and row[-1] for row in rows)
        notes = [
            *how_measured(records),
            self.memory_note,
            *([self.paper_note] if is_quoted and self.paper_note else []),
        ]
        headings = (self.methods, self.size[1], *MEASURED, *self.paper_headings)
        return Page(self.title(records[0]["point"]), headings, rows + quoted, notes)

    def pages(self, records: Sequence[Json]) -> list[Page]:
        """A table for each setting."""
        return [self.page(group) for group in by_setting(records, self.settings)]

    def report(self, out: Path) -> list[Path]:
        """Write the tables and pictures of all records on file in a folder; returns the files written."""
        records = on_file(out / f"{self.name}.jsonl", self.schema)
        records = newest(records, lambda record: json.dumps(record["point"], sort_keys=True))
        if not records:
            return []
        table = out / f"{self.name}.md"
        write_whole(table, "\n".join(page.as_markdown() for page in self.pages(records)))
        written = [table]
        for number, group in enumerate(by_setting(records, self.settings), 1):
            written += self._draw(group, out, "" if number == 1 else f"-{number}")
        return written

    def _draw(self, records: Sequence[Json], out: Path, suffix: str) -> list[Path]:
        """Over the size, and over k at the size at which most k were measured."""
        records = sorted(records, key=lambda record: self.curve_order(record["point"]))
        size, _, axis = self.size
        title = self.picture_title(records[0]["point"])
        swept = with_several(size, records)
        swept += [record for record in records if swept and record["point"][size] is None]
        quoted: dict[str, Quoted] = {}
        for record in swept:
            label, numbers = self.paper(record["point"])
            if numbers:
                quoted.setdefault(label, Quoted(numbers, like=self.label(record["point"])))
        pictures = draw_sweep(
            swept,
            out / f"{self.name}{suffix}.png",
            x=size,
            x_label=axis,
            title=title,
            name=self.label,
            quoted=quoted,
            panels=self.panels,
        )
        over_k = at_size_with_most("k", records, size) if self.k_axis else []
        over_k = [record for record in over_k if self.k_label(record["point"])]
        if over_k:
            pictures += draw_sweep(
                over_k,
                out / f"{self.name}-k{suffix}.png",
                x="k",
                x_label=self.k_axis,
                title=f"{title}, {self.size[1]} = {over_k[0]['point'][size]:,}",
                name=self.k_label,
            )
        return pictures


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """
    >>> markdown_table(["k", "s"], [["64", "0.5"]])
    ['| k | s |', '| --- | --- |', '| 64 | 0.5 |']
    """
    return [f"| {' | '.join(cells)} |" for cells in (headings, ["---"] * len(headings), *rows)]


def head(records: Sequence[Json], *, threads: int, device: str = "cpu", dtype: str = "") -> str:
    """The line above or below a table: computer, software, days and commits.

    device  as in the records of points: "cpu", or the name of a GPU
    dtype   where the title does not name it
    """
    last = records[-1]["environment"]
    computer = f"{last['cpu']}, {threads} threads" if device == "cpu" else device
    parts = [computer, *([dtype] if dtype else []), f"PyTorch {last['torch']}", days_and_commits(records)]
    return f"{', '.join(parts)}."


def busy_notes(records: Sequence[Json]) -> list[str]:
    """A note where other processes were busy while the records were made."""
    busy = busy_note([record.get("other_cores") for record in records], records[-1]["environment"]["num_cpus"])
    return [] if busy is None else [busy]


def computed_on(point: Json) -> str:
    """What computed a point, for a title: its CPU threads, or its GPU."""
    return f"{point['threads']} CPU threads" if point["device"] == "cpu" else point["device"]


def how_measured(records: Sequence[Json]) -> list[str]:
    """Computer, software and limits of records of one setting, and whether other processes were busy meanwhile."""
    point = records[-1]["point"]
    lines = [head(records, threads=point["threads"], device=point["device"])]
    stopped = [record for record in records if record["outcome"] == "out of memory"]
    limits = sorted({record["memory_limit_gib"] for record in stopped if record["memory_limit_gib"] is not None})
    if limits:
        lines.append(f"Out of memory: the process was allowed {' or '.join(f'{limit:g}' for limit in limits)} GiB.")
    return [*lines, *busy_notes(records)]


def measured_cells(record: Json) -> tuple[str, str, str]:
    """Peak memory, time and its spread of a record; its outcome in place of the first where it did not finish."""
    if record["outcome"] != "finished":
        return (record["outcome"], "", "")
    spread = f"{record['fastest_s']:.2f} to {record['slowest_s']:.2f} (of {record['repetitions']})"
    return (f"{record['peak_mib'] / 1024:.3f}", f"{record['elapsed_s']:.2f}", spread)


def memory_and_time(record: Json) -> str:
    """Peak memory and time of a finished record on one line."""
    return f"{record['peak_mib'] / 1024:.3f} GiB, {record['elapsed_s']:.2f} s"


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


def at_size_with_most(x: str, records: Sequence[Json], size: str) -> list[Json]:
    """The records of the size at which most different x were measured, the largest of several sizes.

    Records without x are among them. None where at no size two different x were measured.

    >>> at_size_with_most("k", [{"point": {"k": k, "length": 64}} for k in (8, 16, None)], "length")[2:]
    [{'point': {'k': None, 'length': 64}}]
    """
    swept: dict[int, set[int]] = {}
    for record in records:
        if record["point"][x] is not None:
            swept.setdefault(record["point"][size], set()).add(record["point"][x])
    best = max(swept, key=lambda at: (len(swept[at]), at), default=None)
    if best is None or len(swept[best]) < 2:
        return []
    return [record for record in records if record["point"][size] == best]


@dataclass(frozen=True)
class Quoted:
    """Somebody else's numbers for a curve.

    numbers  x -> (GiB, seconds)
    like     name of the curve whose colour and marker they take
    """

    numbers: Mapping[int, tuple[float, float]]
    like: str


def draw_sweep(
    records: Sequence[Json],
    path: Path,
    *,
    x: str,
    x_label: str,
    title: str,
    name: Callable[[Json], str],
    quoted: Mapping[str, Quoted] | None = None,
    panels: Sequence[tuple[str, str, float]] = MEMORY_AND_TIME,
) -> list[Path]:
    """Draw memory and time of points over one of their fields; returns the file, or none where no point finished.

    name    of a record's point
    quoted  label -> numbers beside the curves
    """
    if not any(record["outcome"] == "finished" for record in records):
        return []
    curves, levels = curves_over(x, records, name)
    quoted = quoted or {}
    draw_memory_and_time(
        curves,
        path,
        x=x,
        x_label=x_label,
        title=title,
        levels=levels,
        panels=panels,
        quoted=quoted_by_field({label: about.numbers for label, about in quoted.items()}),
        quoted_like={label: about.like for label, about in quoted.items()},
    )
    return [path]


def quoted_by_field(
    papers: Mapping[str, Mapping[int, tuple[float, float]]], fields: tuple[str, str] = ("peak_mib", "elapsed_s")
) -> dict[str, dict[str, dict[int, float]]]:
    """Somebody's (GiB, seconds) for `draw_memory_and_time`: name -> {x: ...} becomes field -> name -> {x: value}.

    >>> quoted_by_field({"theirs": {64: (2.0, 0.5)}})
    {'peak_mib': {'theirs': {64: 2.0}}, 'elapsed_s': {'theirs': {64: 0.5}}}
    """
    return {
        field: {name: {x: numbers[axis] for x, numbers in points.items()} for name, points in papers.items()}
        for axis, field in enumerate(fields)
    }
