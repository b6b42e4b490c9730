"""What a benchmark of one operation is about.

Its works are frozen dataclasses with a `k` and a size on which times depend.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .benchmark import Result

Quoted = Mapping[str, Mapping[str, Mapping[int, float]]]


@dataclass(frozen=True)
class Goal:
    """How many times as fast as the rival, and at most what share of its memory; None where nothing was set."""

    forward: float | None
    forward_backward: float | None
    peak: float | None = None


@dataclass(frozen=True)
class Subject:
    """
    schema        of the records
    measure       module of the functions `time_methods` and `measure_memory`, called in processes of their own
    check_method  raises where there is no such method
    why_not       (method, work) -> why the method cannot do this work here, None where it can
    keeps_all     (method, work) -> whether k is nothing to the method
    size          the field of a work that tells how a time grows, and with which power where only one is known
    rival         the method that ours is held against, and what it is called in full
    goals         work -> goal
    floor         what cannot be done without, timed in the same rounds
    memory_note   what counts as memory
    below         (our method, result) -> more lines below a table
    sweeps        name of a sweep, which is a field of the work -> label of its axis
    title         (first work, field that is swept) -> title of the picture
    quoted        sweep -> somebody else's numbers for the picture, as `draw_memory_and_time` takes them
    """

    schema: str
    measure: str
    check_method: Callable[[str], None]
    why_not: Callable[[str, Any], str | None]
    keeps_all: Callable[[str, Any], bool]
    size: tuple[str, float]
    rival: tuple[str, str]
    goals: Mapping[Any, Goal]
    floor: str
    memory_note: str
    below: Callable[[str, Result], Sequence[str]]
    sweeps: Mapping[str, str]
    title: Callable[[Any, str], str]
    quoted: Mapping[str, Quoted] = field(default_factory=dict)
