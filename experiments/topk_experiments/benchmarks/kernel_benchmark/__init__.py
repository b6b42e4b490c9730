"""What benchmarks of one operation share: tensors in, output and gradients out, against rivals.

subject.py    what such a benchmark is about
methods.py    their names, and which there are
benchmark.py  which points are missing, and their records
turns.py      time, method by method in alternation
checking.py   whether results are the truth, but for rounding
report.py     tables and pictures from the results
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .benchmark import KernelBenchmark, Result, run_kernel_benchmark
from .report import report
from .subject import Goal, Subject

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Goal", "KernelBenchmark", "Result", "Subject", "report", "run_and_report", "run_kernel_benchmark"]


def run_and_report(benchmark: KernelBenchmark, console: Console) -> None:
    """Measure what is missing, show everything, and say which files hold it."""
    results = run_kernel_benchmark(benchmark, console)
    for path in (benchmark.out / f"{benchmark.name}.jsonl", *report(benchmark, results, console)):
        console.print(f"Written: {path}", markup=False, highlight=False, soft_wrap=True)
