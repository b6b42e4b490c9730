"""Tables and pictures of methods that took turns: times beside a rival's, goals and memory. Nothing here measures."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from ..rivals.names import TOPK, kept, topk_method
from ..runs.ledger import newest, on_file
from ..runs.progress import say
from ..runs.records import Json, write_whole
from ..runs.timing import expected_s
from ..runs.turns import MODES
from ..show.plots import draw_memory_and_time
from .tables import Page, busy_notes, head

if TYPE_CHECKING:
    from rich.console import Console

_HEADINGS = ("method", "forward [s]", "times {rival}", "forward + backward [s]", "times {rival}", "peak [MiB]")
_PANELS = (
    ("forward_s", "Forward [s]", 1.0),
    ("forward_backward_s", "Forward and backward [s]", 1.0),
    ("peak_mib", "Peak memory of forward and backward [MiB]", 1.0),
)


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
    """

    axis: str
    works: Sequence[Any]
    rivals: Sequence[str]
    longest: Mapping[str, int] = {}


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


class RoundTable:
    """The tables and pictures of an operation's methods that take turns. Operations fill in what follows."""

    schema: ClassVar[str]  # of the records
    operation: ClassVar[str]  # module whose OPERATION is measured
    new_work: ClassVar[Callable[..., Any]]  # from the fields of a record; a work has a `k` and a `goal`
    methods: ClassVar[Sequence[str]]  # names of methods besides "topk-BACKEND"
    rows: ClassVar[Mapping[str, Any]]  # of the table: name -> work
    rivals: ClassVar[Sequence[str]]  # of ours in the table by default; ours is compared with the first
    rival_is: ClassVar[str]  # what the first rival is
    size: ClassVar[tuple[str, float]]  # the field on which times depend, and the power with which they grow at first
    sweeps: ClassVar[Mapping[str, Sweep]]  # field of the work -> what is measured over it
    floor: ClassVar[str]  # what is timed as the floor
    memory_note: ClassVar[str]  # what counts as memory
    # Sweep -> somebody else's numbers for the picture, as `draw_memory_and_time` takes them.
    quoted: ClassVar[Mapping[str, Mapping[str, Mapping[str, Mapping[int, float]]]]] = {}

    def why_not(self, method: str, work: Any) -> str | None:
        """Why a method cannot do this work here; None where it can."""
        raise NotImplementedError

    def title(self, work: Any, swept: str) -> str:
        """Of the picture over a field, from its first work."""
        raise NotImplementedError

    def memory_lines(self, ours: str, result: Result) -> list[str]:
        """Lines below a table: our memory beside the rival's."""
        raise NotImplementedError

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
        for name in works or ():
            if name not in self.rows:
                raise ValueError(f"works must be among {', '.join(self.rows)}, got {name!r}")
        if sweep is None:
            chosen, usual = [self.rows[name] for name in works or self.rows], self.rivals
        else:
            chosen, usual = list(self.sweeps[sweep].works), self.sweeps[sweep].rivals
            if sizes is not None:
                chosen = [replace(chosen[0], **{sweep: size}) for size in sorted(set(sizes))]
            chosen = [replace(work, **changes) for work in chosen]
        # Ours first; with backend "chunked" it is a rival of itself, named once.
        ours = topk_method(backend)
        methods = dict.fromkeys([ours, *(usual if rivals is None else rivals)])
        return sweep or "table", {
            work: tuple(name for name in methods if name == ours or self._takes_part(sweep, name, work))
            for work in chosen
        }

    def _takes_part(self, sweep: str | None, method: str, work: Any) -> bool:
        longest = {} if sweep is None else self.sweeps[sweep].longest
        return method not in longest or getattr(work, str(sweep)) <= longest[method]

    def left_out(
        self, method: str, work: Any, results: Sequence[Result], step_limit_s: float | None = None
    ) -> str | None:
        """Why a method is not measured at this work; None where it is.

        results       of works before, which say how long a step is going to take
        step_limit_s  None: unknown, and every method with an expected time took too long
        """
        reason = self.why_not(method, work)
        name, power = self.size
        size = getattr(work, name)
        same_but_for_size = {
            getattr(result.work, name): seconds
            for result in results
            if replace(result.work, **{name: size}) == work
            and (seconds := result.seconds(method, "forward_backward")) is not None
        }
        seconds = expected_s(same_but_for_size, size, power)
        if reason is not None or seconds is None or seconds <= (step_limit_s or 0.0):
            return reason
        limit = "" if step_limit_s is None else f", more than {step_limit_s:g} s"
        return f"a forward and backward pass would take about {seconds:.0f} s{limit}"

    def report(self, out: Path, name: str) -> list[Path]:
        """Write `NAME.md` and, for sweeps, `NAME.png` of all records on file in a folder; returns the files written."""
        results = self.results_on_file(out, name)
        if not results:
            return []
        table, picture = out / f"{name}.md", out / f"{name}.png"
        pages = [page.as_markdown() for page in self.pages(results)]
        write_whole(table, "\n".join(["\n".join([self._head(results), "", *self.notes(results), ""]), *pages]))
        if name not in self.sweeps or len(results) < 2:
            return [table]
        self._draw(results, name, picture)
        return [table, picture]

    def results_on_file(self, out: Path, name: str) -> list[Result]:
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
        methods = dict.fromkeys(method for _, record in times for method in record["request"]["methods"])
        results: list[Result] = []
        for work, time in times:
            peaks = {method: memory.get((measured_work(method, work), method)) for method in time["request"]["methods"]}
            if "left_out" not in time:
                time |= {"left_out": self._left_out_before(name, methods, work, time, results)}
            results.append(Result(work, time, {method: peak for method, peak in peaks.items() if peak is not None}))
        return results

    def _left_out_before(
        self, name: str, methods: Iterable[str], work: Any, time: Json, results: Sequence[Result]
    ) -> dict[str, str]:
        """Method -> why it was not measured, for records that do not say so."""
        sweep = name if name in self.sweeps else None
        missing = [name for name in methods if name not in time["request"]["methods"]]
        reasons = {
            method: self.left_out(method, work, results) for method in missing if self._takes_part(sweep, method, work)
        }
        return {method: reason for method, reason in reasons.items() if reason is not None}

    def show(self, results: Sequence[Result], console: Console) -> None:
        for page in self.pages(results):
            page.show(console)
        for line in self.notes(results):
            say(console, line)

    def _head(self, results: Sequence[Result]) -> str:
        times = [result.time for result in results]
        return head(times, threads=times[0]["request"]["threads"], dtype="float32")

    def notes(self, results: Sequence[Result]) -> list[str]:
        """How the numbers were measured."""
        if not results:
            return []
        return [
            "Time: median (fastest to slowest) of rounds in which all methods of a work took turns in one process. "
            f"Times {self.rivals[0]}: how many times as fast as {self.rival_is}, by the medians.",
            f"Peak: resident memory of the first forward and backward pass in a process of its own. {self.memory_note}",
            f"Floor: {self.floor}.",
            *busy_notes([result.time for result in results]),
        ]

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
        for mode in MODES:
            goal = getattr(result.work.goal, mode) if result.work.goal is not None and method == ours else None
            is_known = times["outcome"] == "finished"
            cells.append(
                "{median_s:.3g} ({fastest_s:.3g} to {slowest_s:.3g})".format(**times[mode])
                if is_known
                else times["outcome"]
            )
            seconds, rival_s = result.seconds(method, mode), result.seconds(self.rivals[0], mode)
            ratio = math.nan if seconds is None or rival_s is None else rival_s / seconds
            cells.append(ratio_cell(ratio, goal))
        memory, peak_mib = result.memory.get(method), result.peak_mib(method)
        return (*cells, f"{peak_mib:.1f}" if peak_mib is not None else "" if memory is None else memory["outcome"])

    def _below(self, result: Result, ours: str) -> list[str]:
        """What else is known of a work: share of the floor, memory, and which methods are missing."""
        lines = []
        forward_s = result.seconds(ours, "forward")
        if forward_s is not None:
            floor_s = result.time["floor"]["median_s"]
            lines.append(f"Floor: {floor_s:.3g} s, {floor_s / forward_s:.0%} of {ours}'s forward pass.")
        lines += self.memory_lines(ours, result)
        return lines + [f"{method} left out: {reason}." for method, reason in result.left_out.items()]

    def _draw(self, results: Sequence[Result], name: str, path: Path) -> None:
        curves: dict[str, list[Json]] = {}
        for result in results:
            for method in result.methods:
                seconds = {f"{mode}_s": result.seconds(method, mode) for mode in MODES}
                point = {name: getattr(result.work, name), "peak_mib": result.peak_mib(method), **seconds}
                known = {field: value for field, value in point.items() if value is not None}
                curves.setdefault(method, []).append(known)
        threads = results[0].time["request"]["threads"]
        draw_memory_and_time(
            curves,
            path,
            x=name,
            x_label=self.sweeps[name].axis,
            title=f"{self.title(results[0].work, name)}, float32, {threads} threads",
            panels=_PANELS,
            quoted=self.quoted.get(name, {}),
        )


def ratio_cell(ratio: float, goal: float | None) -> str:
    """How many times as fast as the rival, and whether that reaches the goal; a ratio of NaN was not measured.

    >>> ratio_cell(2.5, None), ratio_cell(2.5, 3.0), ratio_cell(float("nan"), 3.0)
    ('2.50', '2.50, goal 3: missed', 'goal 3')
    """
    verdict = "reached" if goal is not None and ratio >= goal else "missed"
    if math.isnan(ratio):
        return "" if goal is None else f"goal {goal:g}"
    return f"{ratio:.2f}" + ("" if goal is None else f", goal {goal:g}: {verdict}")


def measured_work(method: str, work: Any) -> Any:
    """The work at which a method's memory is measured: the same for all k where the method keeps everything."""
    return work if kept(method, work.k) is not None else replace(work, k=1)
