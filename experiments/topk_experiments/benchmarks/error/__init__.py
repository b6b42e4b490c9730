"""The error that the paper's figures leave out: how far each method is from dense attention, with its time and memory.

Queries, keys and values are those of a real model reading a real text.

capture.py    the tensors
measure.py    the methods, and one point in a process of its own
benchmark.py  the options, and which points are missing
report.py     tables and pictures from the records
"""

from .benchmark import ErrorBenchmark, run_error_benchmark
from .report import report

__all__ = ["ErrorBenchmark", "report", "run_error_benchmark"]
