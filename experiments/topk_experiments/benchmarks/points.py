"""The points of a benchmark, one after another: each is taken from the ledger, or run and written to it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..runs.ledger import Ledger, is_finished, made_when
from ..runs.process import Send
from ..runs.progress import say
from ..runs.records import Json

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status


def records_of(
    points: Sequence[Any],
    ledger: Ledger,
    run: Callable[[Any, Send], Json],
    *,
    spares: Callable[[Json], bool],
    in_words: Callable[[Json], str],
    console: Console,
) -> list[Json]:
    """The record of each point, in their order: the one on file if it spares the run, otherwise that of a new run.

    points    each has `as_record`, which identifies it; its string says what is measured
    run       the outcome and the results of a new run; it may send {"doing": what it does now}
    spares    of records of the same point, environment and code: whether one is good enough
    in_words  the results of a finished run, in a few words

    Raises:
        WorkerError: an answer is wrong, or a process died. The records of the points before it are on file.
    """
    from rich.text import Text

    records = []
    for number, point in enumerate(points, 1):
        label = f"[{number}/{len(points)}] {point}"
        configuration = {"point": point.as_record()}
        record, note = ledger.find(configuration, spares=spares), ""
        if record is not None:
            note = f" ({made_when(record)})"
        else:
            with console.status(Text(f"{label} ...")) as status:
                result = run(point, functools.partial(_show_progress, status, label))
            record = ledger.new_record(configuration) | result
            ledger.append(record)
        say(console, f"{label}: {in_words(record) if is_finished(record) else _given_up(record)}{note}")
        records.append(record)
    return records


def _show_progress(status: Status, label: str, message: Json) -> None:
    from rich.text import Text

    status.update(Text(f"{label}: {message['doing']} ..."))


def _given_up(record: Json) -> str:
    return f"{record['outcome']} ({record['message'].splitlines()[0]})"
