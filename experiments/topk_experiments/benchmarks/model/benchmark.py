"""Which points are missing. They are measured one after another, and each is written down when it finishes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ...runs.checks import check_at_least
from ...runs.ledger import Ledger
from ...runs.memory import available_mib
from ...runs.process import Send
from ...runs.records import Json
from ...runs.steps import Limits, run_within
from ...runs.timing import expected_s
from ..points import record_of
from . import measure
from .points import Point
from .random_features import check_family

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = "topk_attention/model/1"
DEFAULT_OUT = Path("results/model")
# Of the memory that is free when a point starts. A point that needs more runs out of memory before other programs do.
_MEMORY_FRACTION = 0.9
# Memory that other programs use varies. A point that ran out of memory runs again only with noticeably more.
_NOTICEABLY_MORE = 1.05


@dataclass(frozen=True)
class ModelBenchmark:
    """Which points to measure and how.

    name          of its files in `out`
    repetitions   timed steps of a point; fewer where they would take longer than `enough_s` together
    step_limit_s  a point is left out if shorter inputs suggest that its step takes longer
    limits        of a point's process; memory: by default 0.9 of what is free
    fresh         whether to measure points again that are on file
    """

    name: str
    points: Sequence[Point]
    out: Path = DEFAULT_OUT
    repetitions: int = 3
    enough_s: float = 300.0
    step_limit_s: float = 600.0
    limits: Limits = Limits(time_s=3600.0)  # noqa: RUF009 - frozen
    fresh: bool = False

    def __post_init__(self) -> None:
        check_at_least(1, self, "repetitions")
        if not self.points:
            raise ValueError("there is no point to measure: give at least one length and one method")

    @property
    def lines(self) -> Path:
        return self.out / f"{self.name}.jsonl"


def run_model_benchmark(benchmark: ModelBenchmark, console: Console) -> list[Json]:
    """Measure every point that is not on file yet and append each to `NAME.jsonl` when it finishes.

    Returns the records of all points asked for, in their order. A point that ran out of memory or time, or was left
    out, has a record too.

    Raises:
        ValueError: a method does not fit the model; nothing was measured.
        WorkerError: a point's answer is wrong, or its process died; the points before it are kept.
    """
    for point in {point.method: point for point in benchmark.points}.values():
        check_family(point)
    ledger = Ledger(benchmark.lines, schema=SCHEMA, folder=Path(__file__).parent, fresh=benchmark.fresh)
    records: list[Json] = []
    for number, point in enumerate(benchmark.points, 1):
        asked = {
            "memory_limit_mib": _memory_limit_mib(point, benchmark.limits),
            "time_limit_s": benchmark.limits.time_s,
            "repetitions_asked": benchmark.repetitions,
        }
        left_out = _left_out(point, records, benchmark)
        record = record_of(
            point,
            f"[{number}/{len(benchmark.points)}] {point}",
            ledger,
            functools.partial(_run, benchmark, point, asked, left_out),
            spares=functools.partial(_spares, asked=asked, left_out=left_out),
            in_words=lambda record: f"{record['peak_mib'] / 1024:.2f} GiB, {record['elapsed_s']:.1f} s",
            console=console,
        )
        records.append(record)
    return records


def _spares(record: Json, asked: Json, left_out: Json | None) -> bool:
    """Whether a record of the same point spares a run: it has as many steps, or was given up with as much allowed."""
    match record["outcome"]:
        case "finished":
            return record["repetitions_asked"] >= asked["repetitions_asked"]
        case "time limit":
            return record["time_limit_s"] >= asked["time_limit_s"]
        case "out of memory":
            return record["memory_limit_mib"] * _NOTICEABLY_MORE >= asked["memory_limit_mib"]
        case _:
            return left_out is not None and record["message"] == left_out["message"]


def _left_out(point: Point, records: Sequence[Json], benchmark: ModelBenchmark) -> Json | None:
    """Why a point is not worth trying, as fields of its record; None where it is."""
    shorter = {
        record["point"]["length"]: record["elapsed_s"]
        for record in records
        if record["outcome"] == "finished"
        and replace(point, length=record["point"]["length"]).as_record() == record["point"]
    }
    seconds = expected_s(shorter, point.length)
    if seconds is None or seconds <= benchmark.step_limit_s:
        return None
    return {
        "outcome": "left out",
        "message": f"a step would take about {seconds:.0f} s, more than {benchmark.step_limit_s:g} s",
        "expected_s": seconds,
        "step_limit_s": benchmark.step_limit_s,
    }


def _run(benchmark: ModelBenchmark, point: Point, asked: Json, left_out: Json | None, on_message: Send) -> Json:
    """What a new record of a point holds beside the point."""
    if left_out is not None:
        return left_out
    request = {
        "point": asdict(point),
        "repetitions": benchmark.repetitions,
        "enough_s": benchmark.enough_s,
        "memory_limit_mib": asked["memory_limit_mib"],
    }
    return asked | run_within(benchmark.limits, f"{measure.__name__}:measure_step", request, str(point), on_message)


def _memory_limit_mib(point: Point, limits: Limits) -> float:
    if limits.memory_gib is not None:
        return limits.memory_gib * 1024
    free_mib = torch.cuda.mem_get_info()[0] / 2**20 if point.device == "cuda" else available_mib()
    return free_mib * _MEMORY_FRACTION
