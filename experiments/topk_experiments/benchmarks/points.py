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


def records_of(
    points: Sequence[Any],
    ledger: Ledger,
    run: Callable[[Any, Send], Json],
    *,
    spares: Callable[[Json], bool],
    in_words: Callable[[Json], str],
    console: Console,
) -> list[Json]:
    """The record of each point, as `record_of` finds or makes it, in the order of the points.

    points  have `as_record`, which identifies them; their strings say what is measured
    """
    how: dict[str, Any] = {"spares": spares, "in_words": in_words, "console": console}
    return [
        record_of(
            {"point": point.as_record()},
            f"[{number}/{len(points)}] {point}",
            ledger,
            functools.partial(run, point),
            **how,
        )
        for number, point in enumerate(points, 1)
    ]


def record_of(
    configuration: Json,
    label: str,
    ledger: Ledger,
    run: Callable[[Send], Json],
    *,
    spares: Callable[[Json], bool],
    in_words: Callable[[Json], str],
    console: Console,
) -> Json:
    """The record of a configuration: the one on file if it spares the run, otherwise that of a new run.

    label     names what is measured
    run       the outcome and the results of a new run; it may send {"doing": what it does now}
    spares    of records of the same configuration, environment and code: whether one is good enough
    in_words  the results of a finished run, in a few words

    Raises:
        WorkerError: the answer is wrong, or the process died. Nothing is written for this configuration.
    """
    from rich.text import Text

    record, note = ledger.find(configuration, spares=spares), ""
    if record is None:
        with console.status(Text(f"{label} ...")) as status:
            result = run(lambda message: status.update(Text(f"{label}: {message['doing']} ...")))
        record = ledger.new_record(configuration) | result
        ledger.append(record)
    else:
        note = f" ({made_when(record)})"
    words = in_words(record) if is_finished(record) else f"{record['outcome']} ({record['message'].splitlines()[0]})"
    say(console, f"{label}: {words}{note}")
    return record
