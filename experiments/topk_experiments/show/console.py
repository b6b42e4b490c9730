"""What the console shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def print_table(console: Console, title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table of plain text. The first column, which names the row, is aligned to the left."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left")
    for number, heading in enumerate(headings):
        table.add_column(escape(heading), justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)
