"""Which points are missing. They are measured one after another, and each is written down when it finishes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ...runs.checks import check_above_0
from ...runs.ledger import Ledger
from ...runs.memory import available_mib
from ...runs.process import Send
from ...runs.progress import say
from ...runs.records import Json
from ...runs.steps import Limits, run_within
from ...runs.timing import expected_s
from ..rounds import PointBenchmark, StepLimit, records_of
from ..tables import memory_and_time
from . import measure
from .methods import check_family
from .points import Point, settings
from .report import report

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = "topk_attention/model/1"
# Of the memory that is free when a point starts. A point that needs more runs out of memory before other programs do.
_MEMORY_FRACTION = 0.9
# Memory that other programs use varies. A point that ran out of memory runs again only with noticeably more.
_NOTICEABLY_MORE = 1.05


@dataclass(frozen=True, kw_only=True)
class ModelBenchmark(PointBenchmark):
    """Which points of whole models to measure. A point is left out if shorter inputs suggest too long a step.

    name  of the files in `out`
    """

    name: str
    enough_s: float = 300.0
    step_limit_s: StepLimit = 600.0
    limits: Limits = Limits(3600.0)  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        super().__post_init__()
        check_above_0(self, "step_limit_s")

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
    limits, ledger = benchmark.limits, benchmark.ledger(benchmark.name, SCHEMA, __name__)

    def run(point: Point, on_message: Send) -> Json:
        if left_out := _left_out(point.as_record(), benchmark, ledger):
            return left_out
        memory = {"memory_limit_mib": _memory_limit_mib(point.device, limits)}
        steps = {"repetitions": benchmark.repetitions, "enough_s": benchmark.enough_s}
        request = {"point": asdict(point), **steps, **memory}
        asked = {**memory, "time_limit_s": limits.time_s, "repetitions_asked": benchmark.repetitions}
        return asked | run_within(limits, f"{measure.__name__}:measure_step", request, str(point), on_message)

    def spares(record: Json) -> bool:
        match record["outcome"]:
            case "finished":
                return record["repetitions_asked"] >= benchmark.repetitions
            case "time limit":
                return record["time_limit_s"] >= limits.time_s
            case "out of memory":
                now_mib = _memory_limit_mib(record["point"]["device"], limits)
                return record["memory_limit_mib"] * _NOTICEABLY_MORE >= now_mib
            case _:  # left out
                again = _left_out(record["point"], benchmark, ledger)
                return again is not None and again["message"] == record["message"]

    return records_of(benchmark.points, ledger, run, spares=spares, in_words=memory_and_time, console=console)


def run_and_report(benchmark: ModelBenchmark, console: Console) -> None:
    """Measure what is missing, show the table of everything on file with the same settings, and name its files."""
    run_model_benchmark(benchmark, console)
    setting = settings(benchmark.points[0].as_record())
    for path in (benchmark.lines, *report(benchmark.lines, setting, console)):
        say(console, f"Written: {path}")


def _left_out(point: Json, benchmark: ModelBenchmark, ledger: Ledger) -> Json | None:
    """Why a point is not worth trying, as fields of its record; None where it is."""
    shorter: dict[int, float] = {}
    for other in benchmark.points:
        if other.length < point["length"] and other.as_record() | {"length": point["length"]} == point:
            record = ledger.find({"point": other.as_record()})
            shorter |= {} if record is None else {other.length: record["elapsed_s"]}
    seconds = expected_s(shorter, point["length"])
    if seconds is None or seconds <= benchmark.step_limit_s:
        return None
    return {
        "outcome": "left out",
        "message": f"a step would take about {seconds:.0f} s, more than {benchmark.step_limit_s:g} s",
        "expected_s": seconds,
        "step_limit_s": benchmark.step_limit_s,
    }


def _memory_limit_mib(device: str, limits: Limits) -> float:
    if limits.memory_gib is not None:
        return limits.memory_gib * 1024
    free_mib = torch.cuda.mem_get_info()[0] / 2**20 if device == "cuda" else available_mib()
    return free_mib * _MEMORY_FRACTION
