"""Conformance: every kind of model that transformers knows, tiny and random, judged as it is converted."""

from .sweep import ConformanceSweep, run_sweep

__all__ = ["ConformanceSweep", "run_sweep"]
