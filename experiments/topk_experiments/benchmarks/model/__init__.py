"""One training step of a whole transformers model against its length: memory first, then time.

points.py     what is measured
shapes.py     the models, from configurations, and their inputs
methods.py    who computes their attention
check.py      whether the answer is right, at a short length
measure.py    one step, in a process of its own
benchmark.py  which points are missing, and their records
report.py     tables and pictures from the records
"""

from .benchmark import ModelBenchmark, run_and_report, run_model_benchmark
from .points import METHODS, Point, grid
from .report import redraw, report

__all__ = ["METHODS", "ModelBenchmark", "Point", "grid", "redraw", "report", "run_and_report", "run_model_benchmark"]
