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


def line_printer(console: Console) -> Say:
    """A function that prints a line on the console as it is: no markup, no colours, no line breaks of its own."""
    return lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True)
