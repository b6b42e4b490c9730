"""Points of a benchmark: each is measured once, in a process of its own, and written down as it finishes."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from topk_attention.environment import environment

from .checks import check_at_least
from .devices import device_name, limit_memory_on, peak_meter, synchronize
from .memory import limit_memory
from .process import Send, WorkerError, run_in_fresh_process
from .records import Json, append_json_line, read_json_lines
from .timing import Stopwatch

if TYPE_CHECKING:
    from rich.console import Console

# A number from another processor or another PyTorch is no reason to skip a point.
_SAME_ENVIRONMENT = ("topk_attention", "torch", "cpu")
# Of what is free when a point starts. Beyond it the point is out of memory, before others on the machine suffer.
_MEMORY_FRACTION = 0.9


class Point(Protocol):
    """A dataclass with fields `threads` and `seed` among others; its string says what is measured."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def as_record(self) -> Json:
        """What tells this point from others."""


@dataclass(frozen=True)
class Limits:
    """Beyond these a point is given up, which is recorded as its outcome.

    memory_gib  of the whole process, or on a GPU of what it takes there; None: 0.9 of what is free when it starts, or
                all of a GPU's
    """

    time_s: float = 900.0
    memory_gib: float | None = None

    def __post_init__(self) -> None:
        for name, limit in (("time-limit", self.time_s), ("memory-limit", self.memory_gib)):
            if limit is not None and not limit > 0:
                raise ValueError(f"{name} must be above 0, got {limit:g}")

    def allow_more_than(self, record: Json) -> bool:
        """Whether a point that was given up could come further now."""
        if record["outcome"] == "time limit":
            return self.time_s > record["time_limit_s"]
        before = record.get("memory_limit_gib")
        return before is not None and (self.memory_gib is None or self.memory_gib > before)


@dataclass(frozen=True)
class PointBenchmark:
    """Which points to measure and how.

    repetitions  timed steps of a point; fewer where they would take longer than `enough_s` together
    limits       beyond them a point is given up and recorded so
    """

    points: Sequence[Any]
    out: Path
    repetitions: int = 3
    enough_s: float = 240.0
    limits: Limits = Limits()
    fresh: bool = False

    def __post_init__(self) -> None:
        check_at_least(1, self, "repetitions")
        if not self.points:
            raise ValueError("there is no point to measure: give at least one of each kind of setting")

    def file(self, name: str, *, schema: str, function: str) -> PointFile:
        """The records of this benchmark in its folder."""
        return PointFile(self.out / name, schema=schema, function=function, limits=self.limits, fresh=self.fresh)

    @property
    def request(self) -> Json:
        """What `measure_step` needs to know."""
        return {"repetitions": self.repetitions, "enough_s": self.enough_s}


class PointFile:
    """The records of a benchmark's points, one a line.

    function  "package.module:name", called as `function({"point": ..., "memory_limit_gib": ..., **request}, send)` in a
              fresh process; what it returns becomes part of the record. `start_point` is for its beginning.
    """

    def __init__(self, lines: Path, *, schema: str, function: str, limits: Limits, fresh: bool) -> None:
        self.lines = lines
        self._schema, self._function, self._limits = schema, function, limits
        self._here = environment()
        self._before = [] if fresh else read_json_lines(lines)

    def measure(
        self, points: Sequence[Point], request: Json, in_words: Callable[[Json], str], console: Console
    ) -> list[Json]:
        """The records of the points, in their order; those that are not there yet are measured.

        in_words  the result of a finished record, short

        Raises:
            WorkerError: a point's answer is wrong, or its process died; the points before it are kept.
        """
        from rich.text import Text

        records = []
        for number, point in enumerate(points, 1):
            told = f"[{number}/{len(points)}] {point}"
            record = self.find(point)
            if record is not None:
                made = record["environment"]
                note = f" (there already, of {made['date']}, commit {made['commit']})"
            else:
                with console.status(Text(f"{told} ...")):
                    record = self._measured(point, request)
                append_json_line(self.lines, record)
                self._before.append(record)
                note = ""
            result = in_words(record) if record["outcome"] == "finished" else _given_up(record)
            say(console, f"{told}: {result}{note}")
            records.append(record)
        return records

    def find(self, point: Point) -> Json | None:
        """The newest record of this point that was made with this software on this processor."""
        for record in reversed(self._before):
            if record.get("point") != point.as_record() or not self.is_of_here(record):
                continue
            # A point that was given up gets another chance where it is allowed more.
            if record["outcome"] == "finished" or not self._limits.allow_more_than(record):
                return record
        return None

    def is_of_here(self, record: Json) -> bool:
        there = record.get("environment", {})
        return record.get("schema") == self._schema and all(
            there.get(name) == self._here[name] for name in _SAME_ENVIRONMENT
        )

    def _measured(self, point: Point, request: Json) -> Json:
        record: Json = {"schema": self._schema, "point": point.as_record(), "environment": environment()}
        whole = {"point": asdict(point), "memory_limit_gib": self._limits.memory_gib, **request}
        try:
            result = run_in_fresh_process(self._function, whole, time_limit_s=self._limits.time_s)
        except WorkerError as error:
            if error.outcome not in ("out of memory", "time limit"):
                raise WorkerError(error.outcome, f"{point} failed ({error.outcome}): {error}") from error
            limits = {"time_limit_s": self._limits.time_s, "memory_limit_gib": self._limits.memory_gib}
            return record | {"outcome": error.outcome, "message": str(error), **limits}
        return record | {"outcome": "finished"} | result


def newest_records(lines: Path, schema: str) -> list[Json]:
    """The newest record of each point on file, in the order in which points were first measured.

    Only those of the software and processor of the last one: numbers of different machines do not belong in one table.
    """
    records = [record for record in read_json_lines(lines) if record.get("schema") == schema]
    newest: dict[str, Json] = {}
    for record in records:
        if all(record["environment"].get(name) == records[-1]["environment"].get(name) for name in _SAME_ENVIRONMENT):
            newest[json.dumps(record["point"], sort_keys=True)] = record
    return list(newest.values())


def start_point(request: Json) -> None:
    """First thing in a process that measures a point."""
    import torch

    torch.set_num_threads(request["point"]["threads"])
    torch.manual_seed(request["point"]["seed"])
    limit_gib = request["memory_limit_gib"]
    if request["point"].get("device", "cpu") == "cpu":
        limit_memory(_MEMORY_FRACTION, limit_gib)
    elif limit_gib is not None:
        limit_memory_on(request["point"]["device"], 1024 * limit_gib)


class Times:
    """Times of one thing done again and again.

    device  "cpu" or "cuda"
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._elapsed_s: list[float] = []
        self._other_cores: list[float] = []

    def take(self, function: Callable[[], object]) -> float:
        """Seconds that a call takes."""
        synchronize(self._device)
        with Stopwatch() as stopwatch:
            function()
            synchronize(self._device)
        self._elapsed_s.append(stopwatch.elapsed_s)
        if stopwatch.other_cores is not None:
            self._other_cores.append(stopwatch.other_cores)
        return stopwatch.elapsed_s

    def take_more(self, function: Callable[[], object], number: int, enough_s: float) -> None:
        """So many times more, unless another call like the last one would go beyond enough_s."""
        for _ in range(number):
            if self._elapsed_s[-1] > enough_s:
                return
            enough_s -= self.take(function)

    @property
    def seconds(self) -> float:
        """All of them together."""
        return sum(self._elapsed_s)

    def as_record(self) -> Json:
        return {
            "elapsed_s": statistics.median(self._elapsed_s),
            "fastest_s": min(self._elapsed_s),
            "slowest_s": max(self._elapsed_s),
            "repetitions": len(self._elapsed_s),
            "other_cores": max(self._other_cores, default=None),
        }


def measure_step(new_step: Callable[[], Callable[[], object]], device: str, request: Json, send: Send) -> Json:
    """Times of a step done again and again, and the peak of memory while it is made and done for the first time."""
    times = Times(device)
    with peak_meter(device) as first_meter:
        step = new_step()
        times.take(step)
    send({"step": 1})
    with peak_meter(device) as later_meter:
        times.take_more(step, request["repetitions"] - 1, request["enough_s"] - times.seconds)
    memory, later_memory = first_meter.read(), later_meter.read()
    return {
        **times.as_record(),
        "peak_mib": memory.peak_mib,
        "baseline_mib": memory.baseline_mib,
        "total_peak_mib": memory.total_peak_mib,
        # Memory that the allocator keeps between steps is in this one.
        "peak_of_later_steps_mib": later_memory.total_peak_mib - memory.baseline_mib,
        "memory_method": memory.method,
        "device_name": device_name(device),
    }


def say(console: Console, line: str) -> None:
    """A line as it is, however long."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _given_up(record: Json) -> str:
    return f"{record['outcome']} ({record['message'].splitlines()[0]})"
