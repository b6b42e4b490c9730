"""Tables and pictures of methods that took turns: times beside a rival's, goals and memory. Nothing here measures."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from ..rivals.names import TOPK, kept, topk_method
from ..runs.ledger import newest, on_file
from ..runs.records import Json, reads, write_whole
from ..runs.timing import expected_s
from ..runs.turns import MODES
from .tables import Page, Quoted, busy_notes, draw_sweep, head

_HEADINGS = ("method", "forward [s]", "times {rival}", "forward + backward [s]", "times {rival}", "peak [MiB]")
_PANELS = (
    ("forward_s", "Forward [s]", 1.0),
    ("forward_backward_s", "Forward and backward [s]", 1.0),
    ("peak_mib", "Peak memory of forward and backward [MiB]", 1.0),
)

_BEATEN = 1.25  # share of the floor


class Goal(NamedTuple):
    """How many times as fast as the rival, and at most what share of its memory; None where no goal was set."""

    forward: float | None
    forward_backward: float | None
    peak: float | None = None


class Sweep(NamedTuple):
    """Works that differ in one field.

    axis     label of the field
    works    smallest first
    rivals   of ours, unless others are asked for
    longest  rival -> the largest size at which it is measured
    quoted   somebody else's numbers for the picture
    """

    axis: str
    works: Sequence[Any]
    rivals: Sequence[str]
    longest: Mapping[str, int] = {}
    quoted: Mapping[str, Quoted] = {}


@dataclass
class Result:
    """What is known of one work: its records, as on file."""

    work: Any
    time: Json
    memory: dict[str, Json] = field(default_factory=dict)

    @property
    def methods(self) -> list[str]:
        """Those that were measured."""
        return self.time["request"]["methods"]

    @property
    def left_out(self) -> dict[str, str]:
        """Method -> why it was not measured."""
        return self.time.get("left_out", {})

    def time_of(self, method: str) -> Json:
        """The method's outcome, message and times."""
        return self.time if self.time["outcome"] != "finished" else self.time["methods"][method]

    def seconds(self, method: str, mode: str) -> float | None:
        """The median; None where there is none."""
        return self.time.get("methods", {}).get(method, {}).get(mode, {}).get("median_s")

    def peak_mib(self, method: str) -> float | None:
        return self.memory.get(method, {}).get("peak_mib")


@dataclass(frozen=True, kw_only=True)
class RoundTable:
    """The tables and pictures of an operation's methods that take turns.

    schema       of the records
    operation    module whose OPERATION is measured
    new_work     from the fields of a record; a work has a `k`
    methods      names of methods besides "topk-BACKEND"
    rows         of the table: name -> work
    goals        work -> what our method should reach
    rivals       of ours in the table by default; ours is compared with the first
    rival_is     what the first rival is
    size         the field on which times depend, and the power with which they grow at first
    sweeps       field of the work -> what is measured over it
    floor        what is timed as the floor
    beaten       why a forward pass can take much less than the floor
    memory_note  what counts as memory
    why_not      (method, work) -> why a method cannot do this work here; None where it can
    title        (first work, field) -> of the picture over a field
    memory_line  (result, ours, our peak, the first rival's) -> what a table says of them; None: nothing
    """

    schema: str
    operation: str
    new_work: Callable[..., Any]
    methods: Sequence[str]
    rows: Mapping[str, Any]
    goals: Mapping[Any, Goal]
    rivals: Sequence[str]
    rival_is: str
    size: tuple[str, float]
    sweeps: Mapping[str, Sweep]
    floor: str
    beaten: str = ""
    memory_note: str
    why_not: Callable[[str, Any], str | None]
    title: Callable[[Any, str], str]
    memory_line: Callable[[Result, str, float, float], str | None]

    def plan(
        self,
        backend: str,
        *,
        sweep: str | None = None,
        works: Sequence[str] | None = None,
        sizes: Sequence[int] | None = None,
        rivals: Sequence[str] | None = None,
        **changes: Any,
    ) -> tuple[str, dict[Any, tuple[str, ...]]]:
        """The name of a benchmark and its plan: top-k on `backend` against its rivals.

        sweep    name of a sweep; None: the table
        works    rows of the table, all by default
        sizes    of the sweep, instead of its own
        changes  of the sweep's works; None: no change

        Raises:
            ValueError: there is no such row or sweep, or an option does not go with it.
        """
        changes = {name: value for name, value in changes.items() if value is not None}
        if works is not None and sweep is not None:
            raise ValueError("works chooses rows of the table and does not go with a sweep")
        if sweep is None and (sizes is not None or changes):
            raise ValueError(f"{', '.join(changes) or 'sizes'} must go with a sweep")
        if sweep is not None and sweep not in self.sweeps:
            raise ValueError(f"sweep must be among {', '.join(self.sweeps)}, got {sweep!r}")
        for row in works or ():
            if row not in self.rows:
                raise ValueError(f"works must be among {', '.join(self.rows)}, got {row!r}")
        if sweep is None:
            chosen, usual = [self.rows[row] for row in works or self.rows], self.rivals
        else:
            chosen, usual = list(self.sweeps[sweep].works), self.sweeps[sweep].rivals
            if sizes is not None:
                chosen = [replace(chosen[0], **{sweep: size}) for size in sorted(set(sizes))]
        name = sweep or "table"
        chosen = [replace(work, **changes) for work in chosen]
        plan = self.methods_of(chosen, backend, usual if rivals is None else rivals)
        ours = topk_method(backend)
        return name, {
            work: tuple(method for method in methods if method == ours or self._takes_part(name, method, work))
            for work, methods in plan.items()
        }

    def methods_of(self, works: Sequence[Any], backend: str, rivals: Sequence[str]) -> dict[Any, tuple[str, ...]]:
        """Top-k on `backend` against the same rivals at each work."""
        # Ours first; with backend "chunked" it is a rival of itself, named once.
        return dict.fromkeys(works, tuple(dict.fromkeys([topk_method(backend), *rivals])))

    def _takes_part(self, name: str, method: str, work: Any) -> bool:
        """Whether a rival is measured at a work of a sweep, or of the table."""
        longest = self.sweeps[name].longest if name in self.sweeps else {}
        return method not in longest or getattr(work, name) <= longest[method]

    def left_out(
        self, methods: Sequence[str], work: Any, results: Sequence[Result], step_limit_s: float | None = None
    ) -> dict[str, str]:
        """Of these methods those that are not measured at this work, and why.

        results       of works before, which say how long a step is going to take
        step_limit_s  None: unknown, and every method with an expected time took too long
        """
        name, power = self.size
        size = getattr(work, name)
        before = [result for result in results if replace(result.work, **{name: size}) == work]
        limit = "" if step_limit_s is None else f", more than {step_limit_s:g} s"
        reasons = {method: self.why_not(method, work) for method in methods}
        for method in (method for method, reason in reasons.items() if reason is None):
            times = {getattr(result.work, name): result.seconds(method, "forward_backward") for result in before}
            seconds = expected_s({at: known for at, known in times.items() if known is not None}, size, power)
            if seconds is not None and seconds > (step_limit_s or 0.0):
                reasons[method] = f"a forward and backward pass would take about {seconds:.0f} s{limit}"
        return {method: reason for method, reason in reasons.items() if reason is not None}

    def report(self, out: Path, name: str) -> list[Path]:
        """Write `NAME.md` and, for sweeps, `NAME.png` of all records on file in a folder; returns the files written."""
        return reads(f"{name}.jsonl")(self._report)(out, name)

    def _report(self, out: Path, name: str) -> list[Path]:
        results = self._on_file(out, name)
        if not results:
            return []
        times = [result.time for result in results]
        threads = times[0]["request"]["threads"]
        others = {getattr(result.work, "dtype", "float32") for result in results} - {"float32"}
        dtype = "float32 unless said" if others else "float32"
        above = [head(times, threads=threads, dtype=dtype), "", *self.notes(results), ""]
        table, picture = out / f"{name}.md", out / f"{name}.png"
        write_whole(table, "\n".join(["\n".join(above), *(page.as_markdown() for page in self.pages(results))]))
        if name not in self.sweeps or len(results) < 2:
            return [table]
        records: list[Json] = []
        for result in results:
            for method in result.methods:
                numbers = {f"{mode}_s": result.seconds(method, mode) for mode in MODES}
                numbers["peak_mib"] = result.peak_mib(method)
                known = {field: number for field, number in numbers.items() if number is not None}
                point = {"method": method, name: getattr(result.work, name)}
                records.append({"point": point, "outcome": "finished", **known})
        return [
            table,
            *draw_sweep(
                records,
                picture,
                x=name,
                x_label=self.sweeps[name].axis,
                title=f"{self.title(results[0].work, name)}, float32, {threads} threads",
                name=lambda point: point["method"],
                quoted=self.sweeps[name].quoted,
                panels=_PANELS,
            ),
        ]

    def _on_file(self, out: Path, name: str) -> list[Result]:
        """The newest result of each work with the threads and the seed of the last record, sweeps by their size."""
        records = on_file(out / f"{name}.jsonl", self.schema)
        of_all = ("threads", "seed")
        records = newest(
            [r for r in records if all(r["request"][setting] == records[-1]["request"][setting] for setting in of_all)],
            lambda record: json.dumps([record["measured"], record["request"]["work"], record["request"].get("method")]),
        )
        works = [(self.new_work(**record["request"]["work"]), record) for record in records]
        times = [(work, record) for work, record in works if record["measured"] == "time_methods"]
        memory = {(work, record["request"].get("method")): record for work, record in works}
        if name in self.sweeps:
            times.sort(key=lambda work_and_record: getattr(work_and_record[0], name))
        all_methods = dict.fromkeys(method for _, record in times for method in record["request"]["methods"])
        results: list[Result] = []
        for work, time in times:
            measured = time["request"]["methods"]
            if "left_out" not in time:  # a record of a time when they did not say so
                missing = [m for m in all_methods if m not in measured and self._takes_part(name, m, work)]
                time |= {"left_out": self.left_out(missing, work, results)}
            peaks = {method: memory.get((measured_work(method, work), method)) for method in measured}
            results.append(Result(work, time, {method: peak for method, peak in peaks.items() if peak is not None}))
        return results

    def notes(self, results: Sequence[Result]) -> list[str]:
        """How the numbers were measured."""
        if not results:
            return []
        return [
            "Time: median (fastest to slowest) of rounds in which all methods of a work took turns in one process. "
            f"Times {self.rivals[0]}: how many times as fast as {self.rival_is}, by the medians.",
            f"Peak: resident memory of the first forward and backward pass in a process of its own. {self.memory_note}",
            f"Floor: {self.floor}.",
            *([f"Above 100 %: {self.beaten}."] if self._is_floor_beaten(results) else []),
            *busy_notes([result.time for result in results]),
        ]

    def _is_floor_beaten(self, results: Sequence[Result]) -> bool:
        """Whether a forward pass of ours took clearly less: two products of one kind differ by a tenth."""
        shares = (
            result.time["floor"]["median_s"] / seconds
            for result in results
            for method in result.methods
            if method.startswith(TOPK) and (seconds := result.seconds(method, "forward")) is not None
        )
        return bool(self.beaten) and any(share > _BEATEN for share in shares)

    def pages(self, results: Sequence[Result]) -> list[Page]:
        """A table for each work: a row for each method that was measured."""
        headings = [heading.format(rival=self.rivals[0]) for heading in _HEADINGS]
        # Ours stands first in every plan, unless it was left out.
        ours = next((name for result in results for name in result.methods if name.startswith(TOPK)), "")
        return [
            Page(
                str(result.work),
                headings,
                [self._row(method, result, ours) for method in result.methods],
                self._below(result, ours),
                has_list=True,
            )
            for result in results
        ]

    def _row(self, method: str, result: Result, ours: str) -> tuple[str, ...]:
        cells, times = [method], result.time_of(method)
        goal = self.goals.get(result.work) if method == ours else None
        for mode in MODES:
            spread, is_known = "{median_s:.3g} ({fastest_s:.3g} to {slowest_s:.3g})", times["outcome"] == "finished"
            seconds, rival_s = (result.seconds(name, mode) for name in (method, self.rivals[0]))
            ratio = None if seconds is None or rival_s is None else rival_s / seconds
            cells.append(spread.format(**times[mode]) if is_known else times["outcome"])
            cells.append(ratio_cell(ratio, getattr(goal, mode, None)))
        memory, peak_mib = result.memory.get(method, {"outcome": ""}), result.peak_mib(method)
        return (*cells, memory["outcome"] if peak_mib is None else f"{peak_mib:.1f}")

    def _below(self, result: Result, ours: str) -> list[str]:
        """What else is known of a work: share of the floor, memory, and which methods are missing."""
        lines: list[str | None] = []
        forward_s = result.seconds(ours, "forward")
        if forward_s is not None:
            floor_s = result.time["floor"]["median_s"]
            lines.append(f"Floor: {floor_s:.3g} s, {floor_s / forward_s:.0%} of {ours}'s forward pass.")
        mine, rivals = result.peak_mib(ours), result.peak_mib(self.rivals[0])
        if mine is not None and rivals is not None:
            lines.append(self.memory_line(result, ours, mine, rivals))
        lines += [f"{method} left out: {reason}." for method, reason in result.left_out.items()]
        return [line for line in lines if line is not None]


def ratio_cell(ratio: float | None, goal: float | None) -> str:
    """How many times as fast as the rival, and whether that reaches the goal; a ratio of None was not measured."""
    parts = [] if ratio is None else [f"{ratio:.2f}"]
    if goal is not None:
        verdict = "" if ratio is None else f": {'reached' if ratio >= goal else 'missed'}"
        parts.append(f"goal {goal:g}{verdict}")
    return ", ".join(parts)


def measured_work(method: str, work: Any) -> Any:
    """The work at which a method's memory is measured: the same for all k where the method keeps everything."""
    return work if kept(method, work.k) is not None else replace(work, k=1)
