"""The error that the paper's figures leave out: how far each method is from dense attention, with its time and memory.

Queries, keys and values are those of a real model reading a real text.

capture.py    the tensors
methods.py    the methods, and their errors
measure.py    one point, in a process of its own
benchmark.py  the options, and which points are missing
report.py     tables and pictures from the records
"""

from pathlib import Path

from .benchmark import ErrorBenchmark, run_error_benchmark
from .report import report as _report

__all__ = ["ErrorBenchmark", "redraw", "run_error_benchmark"]


def redraw(results: Path) -> list[Path]:
    """Draw the tables and the picture of the records in `results/attention-error` again. Nothing is measured."""
    return _report(results / "attention-error")
