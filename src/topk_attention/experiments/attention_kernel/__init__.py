"""Time and memory of the attention operation itself, tensors in, output and gradients out, against its rivals.

works.py      what is computed, and the goals
methods.py    who computes it
plans.py      who computes what
check.py      whether the answer is right
measure.py    time and memory, in processes of their own
benchmark.py  which points are missing, and their records
report.py     tables and pictures from the results
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .benchmark import KernelBenchmark, Result, run_kernel_benchmark
from .plans import make_plan
from .report import report

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["KernelBenchmark", "Result", "make_plan", "run_and_report", "run_kernel_benchmark"]


def run_and_report(benchmark: KernelBenchmark, console: Console) -> None:
    """Measure what is missing, show everything, and say which files hold it."""
    results = run_kernel_benchmark(benchmark, console)
    for path in (benchmark.out / f"{benchmark.name}.jsonl", *report(benchmark, results, console)):
        console.print(f"Written: {path}", markup=False, highlight=False, soft_wrap=True)
