"""Lets another part of the library observe each call of the public operations, with its arguments and its output."""

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
    """Within this context the observer gets every call, after its output is computed."""
    global _observer
    before, _observer = _observer, observer
    try:
        yield
    finally:
        _observer = before


def notify_observer(call: AttentionCall | FeedForwardCall, output: Tensor) -> None:
    """Give a call and its output to the observer, if there is one."""
    if _observer is not None:
        _observer(call, output)


def is_observed() -> bool:
    """Whether there is an observer."""
    return _observer is not None
