"""Which points are missing, measured one after another, each written down as it finishes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from topk_attention.environment import environment

from ...runs.checks import check_at_least
from ...runs.memory import available_mib
from ...runs.process import WorkerError, run_in_fresh_process
from ...runs.records import Json, append_json_line, read_json_lines
from ..kernel_benchmark.benchmark import expected_s
from . import measure
from .points import OURS, Point
from .random_features import check_family

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = "topk_attention/model/1"
DEFAULT_OUT = Path("results/model")
# Of what is free at the start. Beyond it a point is out of memory, before others on the machine suffer.
_MEMORY_FRACTION = 0.9
# Others' memory comes and goes; a point that ran out is worth another try only with noticeably more.
_NOTICEABLY_MORE = 1.05
# Points of other software, or of another processor, do not belong in one table. The library's code matters for its own
# methods alone.
_SAME_ENVIRONMENT = ("torch", "transformers", "cpu")
_SAME_ENVIRONMENT_OF_OURS = ("topk_attention", "product_sha256", *_SAME_ENVIRONMENT)


@dataclass(frozen=True)
class ModelBenchmark:
    """Which points to measure and how.

    name              of its files in `out`
    repetitions       timed steps of a point; fewer where they would take longer than `enough_s` together
    step_limit_s      a point whose step is expected to take longer, going by shorter inputs, is left out
    time_limit_s      a process that is not done by then is recorded as such
    memory_limit_gib  a process that wants more is recorded as out of memory; by default most of what is free
    """

    name: str
    points: Sequence[Point]
    out: Path = DEFAULT_OUT
    repetitions: int = 3
    enough_s: float = 300.0
    step_limit_s: float = 600.0
    time_limit_s: float = 3600.0
    memory_limit_gib: float | None = None
    fresh: bool = False

    def __post_init__(self) -> None:
        check_at_least(1, self, "repetitions")
        if self.memory_limit_gib is not None and not self.memory_limit_gib > 0:
            raise ValueError(f"memory_limit must be above 0 GiB, got {self.memory_limit_gib}")
        if not self.points:
            raise ValueError("there is no point to measure: give at least one length and one method")

    @property
    def lines(self) -> Path:
        return self.out / f"{self.name}.jsonl"


def run_model_benchmark(benchmark: ModelBenchmark, console: Console) -> list[Json]:
    """Measure every point that is not there yet and append each to `NAME.jsonl` as it finishes.

    Returns the records of all points asked for, in their order. A point that ran out of memory or time, or was left
    out, is one of them.

    Raises:
        ValueError: a method does not fit the model; nothing was measured.
        WorkerError: a point's answer is wrong, or its process died; the points before it are kept.
    """
    for point in {point.method: point for point in benchmark.points}.values():
        check_family(point)
    on_file = read_json_lines(benchmark.lines)
    before = [] if benchmark.fresh else on_file
    here = environment()
    records: list[Json] = []
    for number, point in enumerate(benchmark.points, 1):
        told = f"[{number}/{len(benchmark.points)}] {point}"
        record = _find(before, point, here, benchmark)
        if record is not None:
            made = record["environment"]
            _say(console, f"{told}: {in_words(record)} (there already, of {made['date']}, commit {made['commit']})")
        else:
            record = _left_out(point, records, benchmark) or _measure(benchmark, point, told, console)
            if not _is_repeated(record, on_file):
                append_json_line(benchmark.lines, record)
            _say(console, f"{told}: {in_words(record)}")
        records.append(record)
    return records


def in_words(record: Json) -> str:
    """One line on what came of a point."""
    if record["outcome"] != "finished":
        return f"{record['outcome']} ({record['message'].splitlines()[0]})"
    return f"{record['peak_mib'] / 1024:.2f} GiB, {record['elapsed_s']:.1f} s"


def is_comparable(record: Json, here: Json) -> bool:
    """Whether a record was made with the same packages on the same kind of processor."""
    return all(record["environment"].get(name) == here[name] for name in _SAME_ENVIRONMENT)


def is_current(record: Json, here: Json) -> bool:
    """Whether a record spares a measurement: of a method of the library's own only one of its code as it is."""
    names = _SAME_ENVIRONMENT_OF_OURS if record["point"]["method"] in OURS else _SAME_ENVIRONMENT
    return all(record["environment"].get(name) == here[name] for name in names)


def _find(records: Sequence[Json], point: Point, here: Json, benchmark: ModelBenchmark) -> Json | None:
    """The newest record that spares this point a measurement."""
    for record in reversed(records):
        if record.get("point") != point.as_record() or not is_current(record, here):
            continue
        match record["outcome"]:
            case "finished":
                if record["repetitions_asked"] >= benchmark.repetitions:
                    return record
            case "time limit":
                if record["time_limit_s"] >= benchmark.time_limit_s:
                    return record
            case "out of memory":
                if record["memory_limit_mib"] * _NOTICEABLY_MORE >= _memory_limit_mib(point, benchmark):
                    return record
    return None


def _left_out(point: Point, records: Sequence[Json], benchmark: ModelBenchmark) -> Json | None:
    """A record that says why a point is not worth trying, None where it is."""
    shorter = {
        record["point"]["length"]: record["elapsed_s"]
        for record in records
        if record["outcome"] == "finished"
        and replace(point, length=record["point"]["length"]).as_record() == record["point"]
    }
    seconds = expected_s(shorter, point.length)
    if seconds is None or seconds <= benchmark.step_limit_s:
        return None
    return _new_record(point) | {
        "outcome": "left out",
        "message": f"a step would take about {seconds:.0f} s, more than {benchmark.step_limit_s:g} s",
        "expected_s": seconds,
        "step_limit_s": benchmark.step_limit_s,
    }


def _is_repeated(record: Json, on_file: Sequence[Json]) -> bool:
    """Whether the last line about this point says the same: that it was left out, and why."""
    last = next((old for old in reversed(on_file) if old.get("point") == record["point"]), None)
    return record["outcome"] == "left out" and last is not None and last.get("message") == record["message"]


def _measure(benchmark: ModelBenchmark, point: Point, told: str, console: Console) -> Json:
    from rich.text import Text

    limits = {"memory_limit_mib": _memory_limit_mib(point, benchmark), "time_limit_s": benchmark.time_limit_s}
    request = {
        "point": asdict(point),
        "repetitions": benchmark.repetitions,
        "enough_s": benchmark.enough_s,
        "memory_limit_mib": limits["memory_limit_mib"],
    }
    record = _new_record(point) | limits | {"repetitions_asked": benchmark.repetitions}
    with console.status(Text(f"{told} ...")) as status:
        try:
            result = run_in_fresh_process(
                f"{measure.__name__}:measure_step",
                request,
                time_limit_s=benchmark.time_limit_s,
                on_message=lambda message: status.update(Text(f"{told}: {message['doing']} ...")),
            )
        except WorkerError as error:
            if error.outcome not in ("out of memory", "time limit"):
                raise WorkerError(error.outcome, f"{point} failed ({error.outcome}): {error}") from error
            return record | {"outcome": error.outcome, "message": str(error)}
    return record | {"outcome": "finished"} | result


def _new_record(point: Point) -> Json:
    return {"schema": SCHEMA, "point": point.as_record(), "environment": environment()}


def _memory_limit_mib(point: Point, benchmark: ModelBenchmark) -> float:
    if benchmark.memory_limit_gib is not None:
        return benchmark.memory_limit_gib * 1024
    if point.device == "cuda":
        import torch

        return torch.cuda.mem_get_info()[0] / 2**20 * _MEMORY_FRACTION
    return available_mib() * _MEMORY_FRACTION


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
