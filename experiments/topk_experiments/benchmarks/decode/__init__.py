"""One query against a long cache of keys, as when a token is generated: the operation alone.

works.py      sizes, and which methods there are
measure.py    the check of every answer, then rounds in which the methods take turns, in one process
benchmark.py  which works are missing, and their records
report.py     table and picture from the records
"""

from .benchmark import DecodeBenchmark, run_and_show
from .report import report
from .works import METHODS, WORKS

__all__ = ["METHODS", "WORKS", "DecodeBenchmark", "report", "run_and_show"]
