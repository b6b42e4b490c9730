"""Checks of configurations that several experiments share, and what those of answers have in common."""

from __future__ import annotations

import math
from collections.abc import Sequence

from topk_attention.backends import choose_backend
from topk_attention.functional.checks import check_count

# Entries whose k-th and next rank are closer than this may be chosen either way in float32, and are left out.
NEAR_TIE = 1e-5
# As `check_count` has it: what counts anything here must fit int32.
_TOO_MANY = 2**31


class CheckFailedError(ValueError):
    """A method does not compute what it should."""


def check_at_least(least: int, config: object, *names: str) -> None:
    """Look at the numbers of these names; None, where a field may be None, passes.

    Raises:
        ValueError: one is smaller, no number, or larger than anything that can be counted; the message names it.
    """
    for name in names:
        number = getattr(config, name)
        if number is not None and not number >= least:  # of nan nothing is true
            raise ValueError(f"{name} must be at least {least}, got {number}")
        if number is not None and number >= _TOO_MANY:
            raise ValueError(f"{name} must be below 2^31, got {number}")


def check_above_0(config: object, *names: str) -> None:
    """Look at the numbers of these names, such as rates and limits.

    Raises:
        ValueError: one is 0 or less, no number, or not finite; the message names it.
    """
    for name in names:
        number = getattr(config, name)
        if not number > 0:
            raise ValueError(f"{name} must be above 0, got {number}")
        if number == math.inf:
            raise ValueError(f"{name} must be finite, got {number}")


def check_one_of(allowed: Sequence[str], config: object, name: str) -> None:
    """Look at the word of this name.

    Raises:
        ValueError: it is none of those allowed.
    """
    word = getattr(config, name)
    if word not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {word!r}")


def check_runs(ks: Sequence[int], backend: str) -> None:
    """One run for each k, no two the same, on a backend that runs here.

    Raises:
        ValueError: the message names the option.
        RuntimeError: the backend cannot run here.

    >>> check_runs([16, 32, 16], "auto")
    Traceback (most recent call last):
    ValueError: k must not hold a number twice, got 16, 32, 16
    """
    if not ks:
        raise ValueError("k must hold at least one number, got none")
    check_ks("k", ks)
    choose_backend(backend)


def check_ks(name: str, ks: Sequence[int]) -> None:
    """Numbers of keys or neurons, no two the same.

    Raises:
        ValueError: the message names the option.
    """
    for k in ks:
        check_count(name, k)
    check_different(name, ks)


def check_different(name: str, entries: Sequence[object], what: str = "number") -> None:
    """Raise ValueError unless no two entries of a list are the same; the message names the option.

    >>> check_different("methods", ["topk", "topk"], "method")
    Traceback (most recent call last):
    ValueError: methods must not hold a method twice, got topk, topk
    """
    if len(set(entries)) != len(entries):
        raise ValueError(f"{name} must not hold a {what} twice, got {', '.join(map(str, entries))}")
