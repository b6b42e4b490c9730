"""Which points of layers are measured; the rounds are planned by their table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .. import rounds
from .works import LAYER_METHODS, Point

DEFAULT = ("topk", "topk-chunked", *LAYER_METHODS)


def grid(d_ffs: Iterable[int], methods: Iterable[str], ks: Sequence[int] = (512,), **settings: Any) -> list[Point]:
    """Points of layers: one for each number of neurons and method, and for top-k for each k; fewest neurons first.

    methods  names of LAYER_METHODS, "topk-BACKEND", or "topk" on the best backend

    >>> [(point.d_ff, point.method, point.k) for point in grid([128], ["vanilla", "topk-chunked"], [32, 16])]
    [(128, 'vanilla', 16), (128, 'topk-chunked', 16), (128, 'topk-chunked', 32)]
    """
    return rounds.grid(Point, "d_ff", d_ffs, methods, ks, **settings)
