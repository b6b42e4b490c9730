"""Which tokens of a sequence each rank holds: numbers alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Order = Literal["zigzag", "contiguous"]
ORDERS = ("zigzag", "contiguous")


def check_order(order: object) -> None:
    """Raise unless this names an order of tokens."""
    if order not in ORDERS:
        raise ValueError(f'order must be "zigzag" or "contiguous", got {order!r}')


def spans_of(length: int, rank: int, num_ranks: int, order: str) -> tuple[range, ...]:
    """The tokens of a rank, as it holds them one behind the other: ranges of positions, none of them empty.

    contiguous  P parts, one for each rank
    zigzag      2P parts; rank r holds part r and part 2P - 1 - r. Under causality a later query sees more keys, so
                every rank then has about as much to compute.

    Parts are as long as one another, or one token longer where the length is no multiple of their number.
    """
    num_parts = num_ranks if order == "contiguous" else 2 * num_ranks
    parts = (rank,) if order == "contiguous" else (rank, num_parts - 1 - rank)
    spans: list[range] = []
    for part in parts:
        span = range(part * length // num_parts, (part + 1) * length // num_parts)
        if spans and spans[-1].stop == span.start:
            span = range(spans.pop().start, span.stop)
        if span:
            spans.append(span)
    return tuple(spans)


def num_tokens(spans: Sequence[range]) -> int:
    """How many tokens these are."""
    return sum(map(len, spans))
