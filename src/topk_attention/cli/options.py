"""Options that several commands share, how they are parsed, and how errors are reported."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..files import check_writable

# More threads than any processor has; torch would try to start them.
_MOST_THREADS = 4096
# What counts anything fits int32, as indices do.
_MOST = 2**31 - 1
# torch takes seeds below this.
_SEEDS = 2**63


def _checking(check: Callable[[str, Any], None]) -> Callable[[typer.CallbackParam, Any], Any]:
    """A callback of an option. It looks at the value before the command starts, so no command can forget to.

    check  gets the name of the option and its value, unless that is None; what it raises ends the command
    """

    def callback(parameter: typer.CallbackParam, value: Any) -> Any:
        if value is not None:
            with errors_in_words():
                check(parameter.opts[0].lstrip("-"), value)
        return value

    return callback


def at_least(least: int, most: int = _MOST) -> Callable[[typer.CallbackParam, Any], Any]:
    """A callback of an option whose number must be at least, and at most, these."""

    def check(name: str, number: int) -> None:
        if number < least:
            raise ValueError(f"{name} must be at least {least}, got {number}")
        if number > most:
            raise ValueError(f"{name} must be at most {most:,}, got {number:,}")

    return _checking(check)


def _check_folder(name: str, folder: str | Path) -> None:
    check_writable(name, Path(folder), is_folder=True)


def _check_folder_to_fill(name: str, folder: str | Path) -> None:
    if not Path(folder).is_dir():
        _check_folder(name, folder)


# Callbacks of options: `typer.Option(help=..., callback=...)`.
written_file = _checking(lambda name, file: check_writable(name, Path(file)))
written_folder = _checking(_check_folder)
# One that is only written where it lacks something: it may be there already and be read alone.
folder_to_fill = _checking(_check_folder_to_fill)
number_of_threads = at_least(1, _MOST_THREADS)
seed_of_numbers = at_least(0, _SEEDS - 1)

Threads = Annotated[
    int | None, typer.Option(help="CPU threads; by default as many as torch takes.", callback=number_of_threads)
]
Seed = Annotated[int, typer.Option(help="Seed of random numbers.", callback=seed_of_numbers)]
Backend = Annotated[str, typer.Option(help='Backend of top-k attention; "auto" takes the best one that runs here.')]
# With build isolation the kernels would be left out.
_PIP = "pip install --no-build-isolation"


def new_console() -> Console:
    """A console for output; 120 columns wide where the output goes to a file."""
    console = Console()
    return console if console.is_terminal else Console(width=120)  # a file has no width; 80 would cut tables


def write_at_once(text: str) -> None:
    """Write to standard output without waiting for the end of a line."""
    sys.stdout.write(text)
    sys.stdout.flush()


def note_on_stderr(line: str) -> None:
    """A line beside the output."""
    typer.echo(line, err=True)


def next_message() -> str | None:
    """The next line that the user writes; None at the end of the input, or for /exit."""
    if sys.stdin.isatty():
        sys.stderr.write("> ")
        sys.stderr.flush()
    line = sys.stdin.readline()
    return None if not line or line.strip() == "/exit" else line.rstrip("\n")


def integers(name: str, listed: str, *, may_be_empty: bool = False, least: int = 1, bits: int = 31) -> list[int]:
    """The whole numbers of a comma-separated list; `name` is the option's, for an error.

    Raises:
        ValueError: the list holds something else, or a number that is not from `least` on and below 2^bits.
    """
    if may_be_empty and not listed.strip():
        return []
    try:
        numbers = [int(entry) for entry in listed.split(",") if entry.strip()]
    except ValueError:
        numbers = []
    if not numbers:
        raise ValueError(f"{name} must be whole numbers separated by commas, got {listed!r}")
    for number in numbers:
        if not least <= number < 2**bits:
            raise ValueError(f"{name} must be at least {least} and below 2^{bits}, got {number}")
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
