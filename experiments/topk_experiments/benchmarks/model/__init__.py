"""One training step of a whole transformers model against its length: memory first, then time.

points.py     what is measured
methods.py    the models, from configurations, and who computes their attention
measure.py    the check of an answer, and one step, in a process of its own
benchmark.py  which points are missing, and their records
report.py     tables and pictures from the records
"""

from .benchmark import ModelBenchmark, run_and_report, run_model_benchmark
from .points import METHODS, Point, grid
from .report import redraw, report

__all__ = ["METHODS", "ModelBenchmark", "Point", "grid", "redraw", "report", "run_and_report", "run_model_benchmark"]
