"""Options that several commands share, what is read from them, and how errors are told."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

Out = Annotated[Path, typer.Option(help="Folder for the results.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; by default as many as torch takes.")]
Seed = Annotated[int, typer.Option(help="Seed of random numbers.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Measure points again that are there already.")]
Backend = Annotated[str, typer.Option(help='Backend of top-k attention; "auto" takes the best one that runs here.')]
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


def new_console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=120)  # a file has no width; 80 would cut tables


def integers(name: str, listed: str) -> list[int]:
    try:
        return [int(entry) for entry in listed.split(",") if entry.strip()]
    except ValueError:
        raise ValueError(f"{name} must be whole numbers separated by commas, got {listed!r}") from None


def settings(attention_k: str, feed_forward_k: str, full: bool) -> list[Any]:
    """What the options of these names ask for, as `experiments.settings.Setting`."""
    from ..experiments.settings import one_at_a_time

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


def names(listed: str) -> list[str]:
    return [entry.strip() for entry in listed.split(",") if entry.strip()]


@contextmanager
def errors_in_words(kept: str = "") -> Iterator[None]:
    """What a user can put right ends with one line and status 2; Ctrl-C with 130 and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"\ninterrupted; {kept}\nto continue: {_same_command()}", err=True)
        raise typer.Exit(130) from None
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        extra = "lm-eval" if package == "lm_eval" else "experiments"
        typer.echo(f"error: {package} is not installed; pip install 'topk-attention[{extra}]'", err=True)
        raise typer.Exit(2) from error
    except (ValueError, OSError, RuntimeError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error


def _same_command() -> str:
    arguments = [argument for argument in sys.argv[1:] if argument != "--fresh"]
    return shlex.join(["topk-attention", *arguments])
