"""What the ranks tell one another before a call, so that all of them raise the same error or none does.

A rank that raised alone would leave the others waiting for it. So each sends a few numbers first: whether its own
arguments are right, the lengths of its shards, and a hash of every argument that must be the same on all ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch.distributed as dist

from .ranks import Ranks, gather_numbers

_RAISED = {kind.__name__: kind for kind in (TypeError, ValueError, RuntimeError, NotImplementedError)}


def agree(
    ranks: Ranks, error: Exception | None, arguments: Mapping[str, str], numbers: Sequence[int]
) -> list[list[int]]:
    """The numbers of every rank.

    error      what is wrong with the arguments of this rank
    arguments  those that must be the same on every rank, in words; as many on each

    Raises:
        TypeError, ValueError, RuntimeError: that of the first rank that has one, on every rank.
        ValueError: an argument is another on another rank.
    """
    hashes = [_hash(text) for text in arguments.values()]
    found = gather_numbers([error is not None, *numbers, *hashes], ranks)
    if any(row[0] for row in found):
        _raise_of_all(ranks, error)
    for place, name in enumerate(arguments, start=1 + len(numbers)):
        if any(row[place] != found[0][place] for row in found):
            texts = _objects_of_all(ranks, arguments[name])
            other = next(rank for rank, row in enumerate(found) if row[place] != found[0][place])
            raise ValueError(
                f"{name} must be the same on every rank, got {texts[0]} on rank 0 and {texts[other]} on rank {other}"
            )
    return [row[1 : 1 + len(numbers)] for row in found]


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def _objects_of_all(ranks: Ranks, mine: str) -> list[str]:
    found: list[str] = [""] * ranks.size
    if ranks.size == 1:
        return [mine]
    dist.all_gather_object(found, mine, group=ranks.group)
    return found


def _raise_of_all(ranks: Ranks, error: Exception | None) -> None:
    kind = next((name for name, known in _RAISED.items() if type(error) is known), "RuntimeError")
    texts = _objects_of_all(ranks, "" if error is None else f"{kind}:{error}")
    for rank, text in enumerate(texts):
        name, _, message = text.partition(":")
        if name:
            place = f" (rank {rank} of {ranks.size})" if len(set(texts)) > 1 else ""
            raise _RAISED[name](message + place) from error
