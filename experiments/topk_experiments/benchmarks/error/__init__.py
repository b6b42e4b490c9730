"""The column that the paper's figures lack: how far each method is from dense attention on a real model's queries, keys
and values, beside its time and its memory. `settings` says what is asked for, `capture` gets the tensors, `methods` and
`measure` compute one point, `benchmark` measures what is missing, `report` shows it."""

from .benchmark import run_error_benchmark
from .settings import ErrorBenchmark

__all__ = ["ErrorBenchmark", "run_error_benchmark"]
