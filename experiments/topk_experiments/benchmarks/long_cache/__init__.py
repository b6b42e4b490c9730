"""One token at a time over a context that is larger than memory: keys and values in files, an index of keys in memory.

states.py     keys, values and queries: random, with a structure that is said there
measure.py    one point, in a process of its own
benchmark.py  the options, and which points are missing
report.py     the table from the records
"""

from .benchmark import LongCacheBenchmark, run_long_cache
from .report import report

__all__ = ["LongCacheBenchmark", "report", "run_long_cache"]
