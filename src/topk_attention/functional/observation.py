"""Lets another part of the library look at each call of the public operations, with its arguments and its output."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from ..backends.calls import AttentionCall, FeedForwardCall

# observer(call, output): output [B, H, N, E], or [T, O] of a feed-forward call
Observer = Callable[[AttentionCall | FeedForwardCall, Tensor], None]

_observer: Observer | None = None


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Within this context every call is shown to the observer, once its output is there."""
    global _observer
    before, _observer = _observer, observer
    try:
        yield
    finally:
        _observer = before


def show(call: AttentionCall | FeedForwardCall, output: Tensor) -> None:
    if _observer is not None:
        _observer(call, output)
