"""The feed-forward network of a layer in the shapes of real models, with experts or fused weights, against dense ones.

works.py      which networks, and the methods
layers.py     a model of one layer, and copies of it that share its weights
measure.py    the checks of every answer, then rounds in which the methods take turns, in one process for each network
benchmark.py  which networks are missing, and their records
report.py     the table from the records
"""

from .benchmark import NetworkBenchmark, run_and_show
from .report import report
from .works import NETWORKS

__all__ = ["NETWORKS", "NetworkBenchmark", "report", "run_and_show"]
