"""One training step of a whole transformers model against its length: memory first, then time.

points.py     what is measured
shapes.py     the models, from configurations, and their inputs
methods.py    who computes their attention
random_features.py  Performer and RFA as such
check.py      whether the answer is right, at a short length
measure.py    one step, in a process of its own
benchmark.py  which points are missing, and their records
report.py     tables and pictures from the records
paper.py      the paper's numbers beside them
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .benchmark import ModelBenchmark, run_model_benchmark
from .points import ALL, Point, grid
from .report import report

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["ALL", "ModelBenchmark", "Point", "grid", "report", "run_and_report", "run_model_benchmark"]


def run_and_report(benchmark: ModelBenchmark, console: Console) -> None:
    """Measure what is missing, show everything, and say which files hold it."""
    run_model_benchmark(benchmark, console)
    for path in (benchmark.lines, *report(benchmark, console)):
        console.print(f"Written: {path}", markup=False, highlight=False, soft_wrap=True)
