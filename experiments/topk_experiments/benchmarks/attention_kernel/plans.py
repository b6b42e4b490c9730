"""Which methods take turns at which works: the table with goals, and sweeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ...rivals.names import topk_method
from .methods import RIVALS
from .works import KS, LENGTHS, TABLE, Work

Plan = dict[Work, tuple[str, ...]]

# In the sweep over length; what plain PyTorch does beyond is known well enough.
_LONGEST = {"topk-chunked": 16384}
_SWEEP_RIVALS = ("sdpa", "topk-chunked", "performer")


def make_plan(
    backend: str,
    *,
    sweep: str | None = None,
    works: Sequence[str] | None = None,
    lengths: Sequence[int] | None = None,
    rivals: Sequence[str] | None = None,
) -> tuple[str, Plan]:
    """The name of a benchmark and its plan: top-k attention on `backend` against its rivals.

    sweep    "length", "k", or None for the table
    works    rows of the table, all by default
    lengths  of the sweep over length
    """
    if works is not None and sweep is not None:
        raise ValueError("works chooses rows of the table and does not go with a sweep")
    if lengths is not None and sweep != "length":
        raise ValueError('lengths goes with sweep "length" alone')
    match sweep:
        case None:
            return "table", {_row(name): _methods(backend, RIVALS, rivals) for name in works or TABLE}
        case "length":
            chosen = LENGTHS if lengths is None else [replace(LENGTHS[0], length=length) for length in sorted(lengths)]
            ours = topk_method(backend)
            methods = _methods(backend, _SWEEP_RIVALS, rivals)
            return "length", {
                work: tuple(name for name in methods if name == ours or work.length <= _LONGEST.get(name, work.length))
                for work in chosen
            }
        case "k":
            return "k", {work: _methods(backend, _SWEEP_RIVALS, rivals) for work in KS}
    raise ValueError(f'sweep must be "length" or "k", got {sweep!r}')


def _row(name: str) -> Work:
    if name not in TABLE:
        raise ValueError(f"works must be among {', '.join(TABLE)}, got {name!r}")
    return TABLE[name]


def _methods(backend: str, usual: Sequence[str], chosen: Sequence[str] | None) -> tuple[str, ...]:
    """Ours first; with backend "chunked" it is a rival of itself, named once."""
    return tuple(dict.fromkeys([topk_method(backend), *(usual if chosen is None else chosen)]))
