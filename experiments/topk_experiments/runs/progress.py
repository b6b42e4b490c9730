"""How far an experiment is, on the console."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


def progress_bar(console: Console) -> Progress:
    """What is done, a bar, per cent, and the time so far and to come."""
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
