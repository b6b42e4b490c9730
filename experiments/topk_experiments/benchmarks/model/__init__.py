"""One training step of a whole transformers model against its length: memory first, then time.

points.py     what is measured
shapes.py     the models, from configurations, and their inputs
methods.py    who computes their attention
check.py      whether the answer is right, at a short length
measure.py    one step, in a process of its own
benchmark.py  which points are missing, and their records
report.py     tables and pictures from the records
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ...runs.progress import say
from .benchmark import ModelBenchmark, run_model_benchmark
from .points import METHODS, Point, grid, settings
from .report import report

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["METHODS", "ModelBenchmark", "Point", "grid", "redraw", "report", "run_and_report", "run_model_benchmark"]


def run_and_report(benchmark: ModelBenchmark, console: Console) -> None:
    """Measure what is missing, show the table of everything on file with the same settings, and name its files."""
    run_model_benchmark(benchmark, console)
    setting = settings(benchmark.points[0].as_record())
    for path in (benchmark.lines, *report(benchmark.lines, setting, console)):
        say(console, f"Written: {path}")


def redraw(results: Path) -> list[Path]:
    """Draw the tables and pictures of all records in `results/model` again. Nothing is measured."""
    return [written for lines in sorted((results / "model").glob("*.jsonl")) for written in report(lines)]
