"""The command that tries every type of model."""

from __future__ import annotations

from ..conformance import ConformanceSweep, run_sweep
from ..runs.records import Json
from ..runs.steps import Limits
from .application import app
from .options import new_console, taking


@app.command()
@taking(ConformanceSweep, Limits, time_s=120.0, memory_gib=4.0)
def conformance(how: Json, limits: Json) -> None:
    """Convert a tiny model of every type that transformers has, and judge what it computes.

    By the model's own attention where every key is kept, by dense attention over all scores where few are: forward,
    gradients, masks, caches and generation, then feed-forward networks, saving and restoring. Records are appended to
    conformance.jsonl; interrupted, the same command continues with the models that are missing. The page of supported
    models is written from all records.
    """
    run_sweep(ConformanceSweep(limits=Limits(**limits), **how), new_console())
