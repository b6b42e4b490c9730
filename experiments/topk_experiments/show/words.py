"""Numbers in sentences."""

from __future__ import annotations


def counted(number: int, noun: str, plural: str = "s") -> str:
    """
    >>> counted(1, "layer"), counted(0, "set"), counted(2_000, "process", "es")
    ('1 layer', '0 sets', '2,000 processes')
    """
    return f"{number:,} {noun}{'' if number == 1 else plural}"
