"""Which methods take turns at which works: the table with goals, and the paper's sweep over d_ff."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ...rivals.names import topk_method
from .methods import RIVALS
from .works import D_FFS, SWEEP, TABLE, Work

Plan = dict[Work, tuple[str, ...]]
_TABLE_RIVALS = ("dense", "topk-chunked")


def make_plan(
    backend: str,
    *,
    sweep: str | None = None,
    works: Sequence[str] | None = None,
    d_ffs: Sequence[int] | None = None,
    tokens: int | None = None,
    rivals: Sequence[str] | None = None,
) -> tuple[str, Plan]:
    """The name of a benchmark and its plan: top-k on `backend` against its rivals.

    sweep          "d-ff", or None for the table
    works          rows of the table, all by default
    d_ffs, tokens  of the sweep
    """
    if works is not None and sweep is not None:
        raise ValueError("works chooses rows of the table and does not go with a sweep")
    if sweep is None and (d_ffs is not None or tokens is not None):
        raise ValueError('d_ff and tokens go with sweep "d-ff" alone')
    if sweep not in (None, "d-ff"):
        raise ValueError(f'sweep must be "d-ff", got {sweep!r}')
    usual = _TABLE_RIVALS if sweep is None else RIVALS
    methods = tuple(dict.fromkeys([topk_method(backend), *(usual if rivals is None else rivals)]))
    if sweep is None:
        return "table", {_row(name): methods for name in works or TABLE}
    base = SWEEP if tokens is None else replace(SWEEP, tokens=tokens)
    return "d_ff", {replace(base, d_ff=d_ff): methods for d_ff in sorted(set(d_ffs or D_FFS))}


def _row(name: str) -> Work:
    if name not in TABLE:
        raise ValueError(f"works must be among {', '.join(TABLE)}, got {name!r}")
    return TABLE[name]
