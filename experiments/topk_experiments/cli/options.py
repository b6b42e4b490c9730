"""Options that several commands share, and functions that read their values."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

from topk_attention.cli import options
from topk_attention.cli.options import Backend, Seed, Threads, integers, names, new_console

__all__ = [
    "Backend",
    "Device",
    "EvaluateEvery",
    "Fresh",
    "HeadDim",
    "Heads",
    "Layers",
    "LearningRate",
    "MemoryLimit",
    "ModelSize",
    "Neurons",
    "Out",
    "PointOptions",
    "Repetitions",
    "Seed",
    "Steps",
    "Text",
    "Threads",
    "TimeLimit",
    "TrainAgain",
    "Windows",
    "errors_in_words",
    "feed_forward_neurons",
    "integers",
    "integers_or_none",
    "names",
    "names_or_none",
    "new_console",
    "settings",
    "taking",
]

Out = Annotated[Path, typer.Option(help="Folder for the results.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Measure again what is on file.")]
Device = Annotated[str, typer.Option(help='"cpu" or "cuda".')]
Repetitions = Annotated[int, typer.Option(help="Timed steps of a point; long ones get fewer.")]
TimeLimit = Annotated[float, typer.Option(help="Seconds after which a point is stopped and recorded so.")]
MemoryLimit = Annotated[
    float | None,
    typer.Option(help="GiB that a point's process may take. Default: 0.9 of what is free when it starts."),
]
Text = Annotated[Path | None, typer.Option(help="UTF-8 text file. Default: Python's own documentation topics.")]
Layers = Annotated[int, typer.Option(help="Number of layers.")]
ModelSize = Annotated[int, typer.Option(help="Model size.")]
Heads = Annotated[int, typer.Option(help="Number of heads.")]
HeadDim = Annotated[int, typer.Option(help="Size of a head.")]
Neurons = Annotated[int, typer.Option(help="Neurons of a feed-forward layer.")]
Windows = Annotated[int, typer.Option(help="Windows of a step.")]
Steps = Annotated[int, typer.Option(help="Training steps of each arm.")]
LearningRate = Annotated[
    float, typer.Option(help="Highest learning rate; it is reached after 40 steps and then falls to a tenth.")
]
EvaluateEvery = Annotated[int, typer.Option(help="Steps between two points of a curve.")]
TrainAgain = Annotated[bool, typer.Option("--fresh", help="Train all arms again.")]


def errors_in_words(kept: str = "") -> AbstractContextManager[None]:
    """As in the product, for `topk-experiments`."""
    return options.errors_in_words(kept, command="topk-experiments", install="make install")


def names_or_none(listed: str | None) -> list[str] | None:
    """`names` of an option that need not be given."""
    return None if listed is None else names(listed)


def integers_or_none(name: str, listed: str | None) -> list[int] | None:
    """`integers` of an option that need not be given."""
    return None if listed is None else integers(name, listed)


@dataclass(frozen=True)
class PointOptions:
    """Options of benchmarks whose points each have a process of their own."""

    repetitions: Repetitions = 3
    time_limit: TimeLimit = 900
    memory_limit: MemoryLimit = None
    out: Out = Path("results")
    device: Device = "cpu"
    seed: Seed = 0
    threads: Threads = None
    fresh: Fresh = False

    def settings(self) -> dict[str, Any]:
        """Of every point."""
        import torch

        return {"device": self.device, "threads": self.threads or torch.get_num_threads(), "seed": self.seed}

    def limits(self) -> Any:
        """As `Limits`."""
        from ..runs.steps import Limits

        return Limits(self.time_limit, self.memory_limit)


def taking(group: type, **defaults: object) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command the options of a group after its own; the command gets them as one argument, its first.

    group     a dataclass whose fields are options
    defaults  of this command, in place of the group's
    """
    hints = get_type_hints(group, include_extras=True)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**options: object) -> None:
            command(group(**{field.name: options.pop(field.name) for field in fields(group)}), **options)

        _, *own = inspect.signature(command, eval_str=True).parameters.values()
        given = {field.name: defaults.get(field.name, field.default) for field in fields(group)}
        shared = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints[name])
            for name, default in given.items()
        ]
        parameters = [*own, *shared]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def settings(attention_k: str, feed_forward_k: str, full: bool) -> list[Any]:
    """The settings of these options, as `models.settings.Setting`."""
    from topk_experiments.models.settings import one_at_a_time

    return one_at_a_time(_integers_or_files(attention_k), _integers_or_files(feed_forward_k), full=full)


def _integers_or_files(listed: str) -> list[int | Path]:
    return [int(entry) if entry.lstrip("+-").isdigit() else Path(entry) for entry in names(listed)]


def feed_forward_neurons(given: str | None) -> int | Literal["all"] | None:
    """The value of --feed-forward-k: a number, "all", or None if it is not given.

    Raises:
        ValueError: it is something else.
    """
    if given is None:
        return None
    if given == "all":
        return "all"
    if not given.isdecimal():
        raise ValueError(f'feed_forward_k must be a number of neurons or "all", got {given!r}')
    return int(given)
