"""Progress and plain lines on the console."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

Say = Callable[[str], None]


def progress_bar(console: Console) -> Progress:
    """A progress bar with a description, per cent, time elapsed and time left."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("elapsed, left"),
        TimeRemainingColumn(),
        console=console,
    )


def say(console: Console, line: str) -> None:
    """Print a line as it is, however long, without markup."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def line_printer(console: Console) -> Say:
    """`say` for this console, as a function of the line alone."""
    return lambda line: say(console, line)
