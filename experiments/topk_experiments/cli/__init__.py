"""The command `topk-experiments`."""

from __future__ import annotations

from . import benchmarks, lra, pretrained, questions, training
from .application import app

__all__ = ["app", "benchmarks", "lra", "pretrained", "questions", "training"]
