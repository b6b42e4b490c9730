"""Checks that configurations of several experiments share."""

from __future__ import annotations


def check_at_least(least: int, config: object, *names: str) -> None:
    """Look at the numbers of these names; None, where a field may be None, passes.

    Raises:
        ValueError: one is smaller; the message names it.

    >>> check_at_least(1, slice(1, None, 0), "start", "stop", "step")
    Traceback (most recent call last):
    ValueError: step must be at least 1, got 0
    """
    for name in names:
        number = getattr(config, name)
        if number is not None and number < least:
            raise ValueError(f"{name} must be at least {least}, got {number}")
