"""Options that several commands share, how they are parsed, and how errors are reported."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console

Threads = Annotated[int | None, typer.Option(help="CPU threads; by default as many as torch takes.")]
Seed = Annotated[int, typer.Option(help="Seed of random numbers.")]
Backend = Annotated[str, typer.Option(help='Backend of top-k attention; "auto" takes the best one that runs here.')]
# With build isolation the kernels would be left out.
_PIP = "pip install --no-build-isolation"


def new_console() -> Console:
    """A console for output; 120 columns wide where the output goes to a file."""
    console = Console()
    return console if console.is_terminal else Console(width=120)  # a file has no width; 80 would cut tables


def integers(name: str, listed: str, *, may_be_empty: bool = False) -> list[int]:
    """The whole numbers of a comma-separated list; `name` is the option's, for an error."""
    if may_be_empty and not listed.strip():
        return []
    try:
        numbers = [int(entry) for entry in listed.split(",") if entry.strip()]
    except ValueError:
        numbers = []
    if not numbers:
        raise ValueError(f"{name} must be whole numbers separated by commas, got {listed!r}")
    return numbers


def names(listed: str) -> list[str]:
    """The entries of a comma-separated list."""
    return [entry.strip() for entry in listed.split(",") if entry.strip()]


@contextmanager
def errors_in_words(
    kept: str = "", *, command: str = "topk-attention", install: str = f"{_PIP} '.[cli]'"
) -> Iterator[None]:
    """End with one line and status 2 at an error that a user can correct, and with status 130 at Ctrl-C.

    kept     where finished work is kept, for the message after Ctrl-C
    command  the name of the command, for the line that resumes it
    install  the command that installs a missing package, in the folder of the clone
    """
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"\ninterrupted; {kept}\nto continue: {_same_command(command)}", err=True)
        raise typer.Exit(130) from None
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        way = f"{_PIP} '.[lm-eval]'" if package == "lm_eval" else install
        typer.echo(f"error: {package} is not installed; in the folder of the clone: {way}", err=True)
        raise typer.Exit(2) from error
    except (ValueError, OSError, RuntimeError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error


def _same_command(command: str) -> str:
    arguments = [argument for argument in sys.argv[1:] if argument != "--fresh"]
    return shlex.join([command, *arguments])
