"""How the operations are computed. Backends never import one another; this file knows their names alone."""

from __future__ import annotations

from typing import NamedTuple

BACKENDS = {
    "chunked": "plain PyTorch in query chunks and key blocks, memory linear in length, any device",
    "reference": "dense scores, memory quadratic in length: the specification that the others are tested against",
}


class Choice(NamedTuple):
    name: str
    reason: str


def choose_backend(requested: str) -> Choice:
    """The backend that runs, and why. Only "auto" chooses; any other name is taken at its word."""
    if requested == "auto":
        return Choice("chunked", "the only backend with memory linear in length")
    if requested not in BACKENDS:
        names = ", ".join(f'"{name}"' for name in ("auto", *BACKENDS))
        raise ValueError(f"backend must be one of {names}, got {requested!r}")
    return Choice(requested, "asked for by name")
