"""Peak memory of each way through a converted model against length, forward and a training step, beside eager.

works.py      the ways: a model of one layer or two for each, and what is converted of it
measure.py    one way and method in a process of its own, at every length
benchmark.py  which are missing, and their records
report.py     the table from the records
"""

from .benchmark import PathBenchmark, run_and_show
from .report import report
from .works import PATHS

__all__ = ["PATHS", "PathBenchmark", "report", "run_and_show"]
