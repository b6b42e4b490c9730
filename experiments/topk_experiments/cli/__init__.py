"""The command `topk-experiments`."""

from __future__ import annotations

from . import benchmarks, figures, lra, pretrained, questions, training
from .application import app

__all__ = ["app", "benchmarks", "figures", "lra", "pretrained", "questions", "training"]
