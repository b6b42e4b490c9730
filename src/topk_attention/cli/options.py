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


def not_installed(package: str, extra: str | None) -> str:
    """Says that a package is missing, and how to install it from a clone of the repository.

    extra  the extra of topk-attention that brings it; None for the packages of the experiments
    """
    way = "make install" if extra is None else f"pip install --no-build-isolation '.[{extra}]'"
    return f"{package} is not installed; in the folder of the clone: {way}"


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
def errors_in_words(kept: str = "", *, command: str = "topk-attention", extra: str | None = "cli") -> Iterator[None]:
    """End with one line and status 2 at an error that a user can correct, and with status 130 at Ctrl-C.

    kept     where finished work is kept, for the message after Ctrl-C
    command  the name of the command, for the line that resumes it
    extra    the extra of topk-attention that installs a missing package; None for the experiments
    """
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"\ninterrupted; {kept}\nto continue: {_same_command(command)}", err=True)
        raise typer.Exit(130) from None
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        typer.echo(f"error: {not_installed(package, 'lm-eval' if package == 'lm_eval' else extra)}", err=True)
        raise typer.Exit(2) from error
    except (ValueError, OSError, RuntimeError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error


def _same_command(command: str) -> str:
    arguments = [argument for argument in sys.argv[1:] if argument != "--fresh"]
    return shlex.join([command, *arguments])
