"""Options that several commands share, and what is read from them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from topk_attention.cli import options
from topk_attention.cli.options import Backend, Seed, Threads, integers, names, new_console

__all__ = [
    "Backend",
    "EvaluateEvery",
    "Fresh",
    "Heads",
    "Layers",
    "LearningRate",
    "ModelSize",
    "Neurons",
    "Out",
    "Seed",
    "Steps",
    "Text",
    "Threads",
    "TrainAgain",
    "Windows",
    "errors_in_words",
    "feed_forward_neurons",
    "integers",
    "names",
    "new_console",
    "settings",
]

Out = Annotated[Path, typer.Option(help="Folder for the results.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Measure points again that are there already.")]
Text = Annotated[Path | None, typer.Option(help="UTF-8 text file. Default: Python's own documentation topics.")]
Layers = Annotated[int, typer.Option(help="Number of layers.")]
ModelSize = Annotated[int, typer.Option(help="Model size.")]
Heads = Annotated[int, typer.Option(help="Number of heads.")]
Neurons = Annotated[int, typer.Option(help="Neurons of a feed-forward layer.")]
Windows = Annotated[int, typer.Option(help="Windows of a step.")]
Steps = Annotated[int, typer.Option(help="Training steps of an arm.")]
LearningRate = Annotated[float, typer.Option(help="The highest; it rises for 40 steps and falls to a tenth.")]
EvaluateEvery = Annotated[int, typer.Option(help="Steps between two points of a curve.")]
TrainAgain = Annotated[bool, typer.Option("--fresh", help="Train all arms again.")]


def errors_in_words(kept: str = "") -> AbstractContextManager[None]:
    """As the product's, for `topk-experiments`."""
    return options.errors_in_words(kept, command="topk-experiments", extra=None)


def settings(attention_k: str, feed_forward_k: str, full: bool) -> list[Any]:
    """What the options of these names ask for, as `models.settings.Setting`."""
    from topk_experiments.models.settings import one_at_a_time

    return one_at_a_time(_integers_or_files(attention_k), _integers_or_files(feed_forward_k), full=full)


def _integers_or_files(listed: str) -> list[int | Path]:
    return [int(entry) if entry.lstrip("+-").isdigit() else Path(entry) for entry in names(listed)]


def feed_forward_neurons(given: str | None) -> int | Literal["all"] | None:
    if given is None:
        return None
    if given == "all":
        return "all"
    if not given.isdecimal():
        raise ValueError(f'feed_forward_k must be a number of neurons or "all", got {given!r}')
    return int(given)
