"""The options, and which points are missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch.distributed as dist

from ...runs.checks import check_at_least
from ...runs.process import Send, failures_named
from ...runs.progress import say
from ...runs.records import Json
from ..rounds import Benchmark, records_of
from . import measure
from .measure import Point
from .report import NAME, SCHEMA, in_words, report, show

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, kw_only=True)
class SequenceParallelBenchmark(Benchmark):
    """Which points to measure."""

    points: Sequence[Point]
    out: Annotated[Path, "Folder for the results."] = Path("results/sequence-parallel")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.points:
            raise ValueError("there is no point to measure: give at least one number of processes")
        for point in self.points:
            names = ("processes", "threads", "tokens", "k", "layers", "hidden", "heads", "key_heads", "neurons")
            check_at_least(1, point, *names, "vocabulary")
            if point.hidden % (2 * point.heads):
                raise ValueError(f"hidden must be an even multiple of heads, got {point.hidden} and {point.heads}")
            if point.heads % point.key_heads:
                raise ValueError(f"heads must be a multiple of key_heads, got {point.heads} and {point.key_heads}")
            if point.method not in ("auto", "heads", "keys"):
                raise ValueError(f'method must be "auto", "heads" or "keys", got {point.method!r}')
            if point.method == "heads" and point.heads % point.processes:
                raise ValueError(
                    f'method="heads" needs processes that divide heads, got {point.processes} and {point.heads}'
                )


def run_sequence_parallel(benchmark: SequenceParallelBenchmark, console: Console) -> list[Json]:
    """Measure every point that is not on file yet, append each to `sequence-parallel.jsonl`, and show them.

    Raises:
        RuntimeError: this torch has no gloo.
        WorkerError: gradients are wrong, or a process died or exceeded a limit.
    """
    if not dist.is_available() or not dist.is_gloo_available():
        raise RuntimeError("processes without a GPU talk with gloo, which this torch lacks; install another build")
    ledger = benchmark.ledger(NAME, SCHEMA, __name__)

    def run(point: Point, on_message: Send) -> Json:
        with failures_named(str(point)):
            measured = measure.measure_point(point, benchmark.repetitions, benchmark.limits, on_message)
        return {"outcome": "finished"} | measured

    spares = benchmark.limits.spare
    records = records_of(benchmark.points, ledger, run, spares=spares, in_words=in_words, console=console)
    show(records, console)
    for path in report(benchmark.out):
        say(console, f"Written: {path}")
    say(console, f"Records: {ledger.path}")
    return records
