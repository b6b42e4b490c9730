"""A training step of one long sequence: on one process, and over several that share it.

measure.py    one point: its processes, each of which measures itself
benchmark.py  the options, and which points are missing
report.py     the table from the records
"""

from .benchmark import SequenceParallelBenchmark, run_sequence_parallel
from .report import report

__all__ = ["SequenceParallelBenchmark", "report", "run_sequence_parallel"]
