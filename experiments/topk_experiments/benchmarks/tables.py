"""The one maker of tables, on the console and in markdown, and of pictures over a size. Nothing here measures."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runs.ledger import is_finished, newest, on_file
from ..runs.progress import say
from ..runs.records import Json, days_and_commits, reads, write_whole
from ..runs.timing import busy_note
from ..show.console import print_table
from ..show.markdown import markdown_table
from ..show.plots import MEMORY_AND_TIME, draw_memory_and_time

if TYPE_CHECKING:
    from rich.console import Console

Numbers = Mapping[int, tuple[float, float]]  # size -> (GiB, seconds)
Panels = Sequence[tuple[str, str, float]]
# Field of a panel -> which of (GiB, seconds) it shows, and how many of its unit that number has.
_QUOTED = {"peak_mib": (0, 1024.0), "elapsed_s": (1, 1.0), "forward_backward_s": (1, 1.0)}
Columns = Mapping[str, Callable[[Json], str]]  # heading -> cell of a finished record
MEASURED: Columns = {
    "memory [GiB]": lambda record: f"{record['peak_mib'] / 1024:.3f}",
    "time [s]": lambda record: f"{record['elapsed_s']:.2f}",
    "fastest to slowest [s]": lambda record: "{fastest_s:.2f} to {slowest_s:.2f} (of {repetitions})".format_map(record),
}


@dataclass(frozen=True)
class Page:
    """A table with a heading and notes.

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
        print_table(console, self.title, self.headings, self.rows)
        for line in self.notes:
            say(console, line)

    def as_markdown(self) -> str:
        notes = ["\n".join(f"- {line}" for line in self.notes)] if self.has_list else self.notes
        parts = [f"**{self.title}**", *([self.head] if self.head else [])]
        parts += [markdown_table(self.headings, self.rows), *notes]
        return "\n\n".join(parts).rstrip() + "\n"


@dataclass(frozen=True, kw_only=True)
class PointTable:
    """The tables and pictures of points that each have a process of their own; functions are of a record's point.

    name            of the files
    schema          of the records
    operation       module whose OPERATION is measured
    settings        fields of a point in which all points of one table agree
    size            the field that a table is about, its heading, its label in a picture
    title           what all points of a table share
    picture_adds    to that title in a picture
    label           what a table or a picture calls a method with its settings
    order           sorts the rows of a table
    curve_order     sorts the curves of a picture, which otherwise stand as they were measured
    over_k          label of k in a picture over k, and what that picture calls a method ("": not in it); None: no such
                    picture
    methods         heading of the methods' names
    paper           what a picture calls the paper's curve of the method, and its size -> (GiB, seconds) where the point
                    has the paper's settings
    paper_headings  of columns with these numbers beside ours
    paper_rows      curves of the paper in rows below the table of such points: name -> size -> (GiB, seconds)
    paper_note      where they come from
    """

    name: str
    schema: str
    operation: str
    settings: Sequence[str]
    size: tuple[str, str, str]
    title: Callable[[Json], str]
    picture_adds: Callable[[Json], str] = lambda _: ""
    label: Callable[[Json], str]
    order: Callable[[Json], Any]
    curve_order: Callable[[Json], int] = lambda _: 0
    over_k: tuple[str, Callable[[Json], str]] | None = None
    methods: str = "method"
    memory_note: str = (
        "Memory is the peak of the first step above what the process held before the layer was made, with weights, "
        "input and all gradients; time: median."
    )
    panels: Panels = MEMORY_AND_TIME
    paper: Callable[[Json], tuple[str, Numbers]]
    paper_headings: Sequence[str] = ()
    paper_rows: Callable[[Json], Mapping[str, Numbers]] = lambda _: {}
    paper_note: str = ""

    def pages(self, records: Sequence[Json]) -> list[Page]:
        """A table for each setting."""
        return [self._page(group) for group in by_setting(records, self.settings)]

    def report(self, out: Path) -> list[Path]:
        """Write the tables and pictures of all records on file in a folder; returns the files written."""
        return reads(f"{self.name}.jsonl")(self._report)(out)

    def _report(self, out: Path) -> list[Path]:
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

    def _page(self, records: Sequence[Json]) -> Page:
        records = sorted(records, key=lambda record: self.order(record["point"]))
        rows: list[tuple[str, ...]] = []
        for record in records:
            point, size = record["point"], record["point"][self.size[0]]
            beside = self.paper(point)[1].get(size, ("",) * 2) if self.paper_headings else ()
            numbers = [number if number == "" else f"{number:.2f}" for number in beside]
            rows.append((self.label(point), "" if size is None else f"{size:,}", *cells(record, MEASURED), *numbers))
        below: list[tuple[str, ...]] = [
            (name, f"{size:,}", f"{gib:.2f}", f"{seconds:.2f}", "")
            for name, numbers in self.paper_rows(records[0]["point"]).items()
            for size, (gib, seconds) in numbers.items()
        ]
        is_quoted = below or (self.paper_headings and any(row[-1] for row in rows))
        notes = [*how_measured(records), self.memory_note, *([self.paper_note] if is_quoted else [])]
        headings = (self.methods, self.size[1], *MEASURED, *self.paper_headings)
        return Page(self.title(records[0]["point"]), headings, rows + below, notes)

    def _draw(self, records: Sequence[Json], out: Path, suffix: str) -> list[Path]:
        """Over the size, and over k at the size at which most k were measured."""
        records = sorted(records, key=lambda record: self.curve_order(record["point"]))
        size, heading, axis = self.size
        title = self.title(records[0]["point"]) + self.picture_adds(records[0]["point"])
        # Over the size stand points that were measured at several sizes, all else being equal.
        rest = [record["point"] | {size: None} for record in records]
        swept = [record for record, same in zip(records, rest, strict=True) if rest.count(same) > 1]
        swept += [record for record in records if swept and record["point"][size] is None]
        quoted: dict[str, Quoted] = {}
        for record in swept:
            label, numbers = self.paper(record["point"])
            if numbers:
                quoted.setdefault(label, Quoted(numbers, like=self.label(record["point"])))
        picture = out / f"{self.name}{suffix}.png"
        options: Json = {"title": title, "quoted": quoted, "panels": self.panels}
        pictures = draw_sweep(swept, picture, x=size, x_label=axis, name=self.label, **options)
        if self.over_k is None:
            return pictures
        axis, name = self.over_k
        ks: dict[int, set[int]] = {}
        for point in (record["point"] for record in records if record["point"]["k"] is not None):
            ks.setdefault(point[size], set()).add(point["k"])
        most = max(ks, key=lambda at: (len(ks[at]), at), default=None)
        if most is None or len(ks[most]) == 1:
            return pictures
        over_k = [record for record in records if record["point"][size] == most and name(record["point"])]
        picture, title = out / f"{self.name}-k{suffix}.png", f"{title}, {heading} = {most:,}"
        return pictures + draw_sweep(over_k, picture, x="k", x_label=axis, title=title, name=name)


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


def cells(record: Json, columns: Columns) -> tuple[str, ...]:
    """The cells of a record in these columns; its outcome in the first of them where it did not finish."""
    if not is_finished(record):
        return (record["outcome"], *[""] * (len(columns) - 1))
    return tuple(cell(record) for cell in columns.values())


def memory_and_time(record: Json) -> str:
    """Peak memory and time of a finished record on one line."""
    return f"{record['peak_mib'] / 1024:.3f} GiB, {record['elapsed_s']:.2f} s"


def by_setting(records: Sequence[Json], names: Sequence[str]) -> list[list[Json]]:
    """Groups of records whose points agree in these fields."""
    groups: dict[tuple[str, ...], list[Json]] = {}
    for record in records:
        groups.setdefault(tuple(str(record["point"][name]) for name in names), []).append(record)
    return list(groups.values())


@dataclass(frozen=True)
class Quoted:
    """Somebody else's numbers for a curve.

    numbers  x -> (GiB, seconds)
    like     name of the curve whose colour and marker they take
    """

    numbers: Numbers
    like: str = ""


def draw_sweep(
    records: Sequence[Json],
    path: Path,
    *,
    x: str,
    x_label: str,
    title: str,
    name: Callable[[Json], str],
    quoted: Mapping[str, Quoted] | None = None,
    panels: Panels = MEMORY_AND_TIME,
) -> list[Path]:
    """Draw memory and time of points over one of their fields; returns the file, or none where no point finished.

    name    of a record's point: that of its curve, or of its level where it does not have the field
    quoted  label -> numbers beside the curves, in the panels of peak memory and of whole steps
    panels  as `draw_memory_and_time` takes them
    """
    if not any(record["outcome"] == "finished" for record in records):
        return []
    curves: dict[str, list[Json]] = {}
    levels: dict[str, Json] = {}
    for record in records:
        label, at = name(record["point"]), record["point"][x]
        if at is None:
            levels[label] = record
        else:
            curves.setdefault(label, []).append(record | {x: at})
    quoted = quoted or {}
    by_field: dict[str, dict[str, dict[int, float]]] = {}
    for field, _, factor in panels:
        if field in _QUOTED:
            axis, unit = _QUOTED[field]
            by_field[field] = {
                label: {at: pair[axis] * unit * factor for at, pair in about.numbers.items()}
                for label, about in quoted.items()
            }
    draw_memory_and_time(
        curves,
        path,
        x=x,
        x_label=x_label,
        title=title,
        levels=levels,
        panels=panels,
        quoted=by_field,
        quoted_like={label: about.like for label, about in quoted.items()},
    )
    return [path]
