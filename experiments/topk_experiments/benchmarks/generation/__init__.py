"""Whole models that generate after a long prompt: this library beside transformers' caches and llama.cpp.

methods.py    who generates, and which of them are there
measure.py    one method at one length, in a process of its own: the check, reading the prompt, then token after token
llama.py      the same by llama.cpp
benchmark.py  which points are missing; every round measures each method once
report.py     table and picture from the records
"""

from .benchmark import GenerationBenchmark, run_and_show
from .methods import METHODS
from .report import report

__all__ = ["METHODS", "GenerationBenchmark", "report", "run_and_show"]
