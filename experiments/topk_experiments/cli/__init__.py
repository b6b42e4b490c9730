"""The command `topk-experiments`."""

from __future__ import annotations

from . import benchmarks, conformance, lra, pretrained, questions, training, versions
from .application import app

__all__ = ["app", "benchmarks", "conformance", "lra", "pretrained", "questions", "training", "versions"]
