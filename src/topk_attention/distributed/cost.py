"""What sequence-parallel attention sends and keeps, counted on paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..backends.calls import accumulation_dtype
from ..functional.checks import as_k, check_count
from .spans import Order, check_order, num_tokens, spans_of

# Numbers of 8 bytes that every rank sends to every other before a call, see `agreement.py`.
NUMBERS_COMPARED = 23


@dataclass(frozen=True)
class Shape:
    """A call in numbers; queries and keys that each rank holds."""

    batch_size: int
    num_heads: int
    num_key_heads: int
    head_dim: int
    value_dim: int
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    element_size: int

    @property
    def num_ranks(self) -> int:
        return len(self.queries)


@dataclass(frozen=True)
class SequenceParallelCost:
    """What one call of `sequence_parallel_attention` costs one rank.

    method          the one that is taken: "heads" or "keys"
    forward_bytes   bytes that this rank sends to others in the forward pass
    backward_bytes  the same in the backward pass
    exchanged_bytes  memory of the queries, keys and values that are exchanged, kept until the backward pass
    selection_bytes  memory of the kept indices and weights, kept until the backward pass
    output_bytes    memory of the outputs that are computed here
    """

    method: str
    forward_bytes: int
    backward_bytes: int
    exchanged_bytes: int
    selection_bytes: int
    output_bytes: int

    @property
    def kept_bytes(self) -> int:
        """Memory that the backward pass needs, beside the inputs of the call."""
        return self.exchanged_bytes + self.selection_bytes


def sequence_parallel_cost(
    length: int,
    *,
    num_ranks: int,
    num_heads: int,
    k: int | Sequence[int],
    head_dim: int,
    num_key_heads: int | None = None,
    value_dim: int | None = None,
    batch_size: int = 1,
    dtype: torch.dtype = torch.float32,
    is_masked: bool = False,
    order: Order = "zigzag",
    method: str = "auto",
    rank: int = 0,
) -> SequenceParallelCost:
    """What one call of `sequence_parallel_attention` sends and keeps on one rank; nothing is run.

    length         tokens of the whole sequence, which are queries and keys
    num_ranks      P
    num_key_heads  as many as num_heads by default
    value_dim      head_dim by default
    is_masked      whether there is a boolean mask of padding
    rank           whose cost; ranks differ by a token or two where P (or 2P) does not divide the length

    While tensors are exchanged there are up to two copies more of the largest of them.

    Raises:
        ValueError, TypeError: a number is below 1, or the method cannot be.

    >>> cost = sequence_parallel_cost(
    ...     1_000_000, num_ranks=8, num_heads=32, num_key_heads=8, head_dim=128, k=64, dtype=torch.bfloat16
    ... )
    >>> cost.method, round(cost.forward_bytes / 1e9, 2)
    ('heads', 2.24)
    """
    check_order(order)
    num_key_heads, value_dim = num_key_heads or num_heads, value_dim or head_dim
    counts = {"length": length, "num_ranks": num_ranks, "num_heads": num_heads, "head_dim": head_dim}
    counts |= {"num_key_heads": num_key_heads, "value_dim": value_dim, "batch_size": batch_size}
    for name, count in counts.items():
        check_count(name, count)
    if not 0 <= rank < num_ranks:
        raise ValueError(f"rank must be from 0 to {num_ranks - 1}, got {rank}")
    lengths = tuple(num_tokens(spans_of(length, r, num_ranks, order)) for r in range(num_ranks))
    shape = Shape(batch_size, num_heads, num_key_heads, head_dim, value_dim, lengths, lengths, dtype.itemsize)
    if method == "auto":
        method = choose_method(shape)
    elif method not in ("heads", "keys") or (method == "heads" and num_heads % num_ranks):
        raise ValueError(f'method must be "auto", "keys" or, where ranks divide heads, "heads", got {method!r}')
    by_heads = method == "heads"
    forward, backward = _tensor_bytes(shape, rank, by_heads)
    if num_ranks > 1:
        forward += (num_ranks - 1) * 8 * NUMBERS_COMPARED
        forward += (num_ranks - 1) * batch_size * max(lengths) * is_masked
    own, of_keys = (
        heads_on_ranks(num_heads, num_ranks, by_heads),
        key_heads_on_ranks(num_heads, num_key_heads, num_ranks, by_heads),
    )
    queries = length if by_heads else lengths[rank]
    rows = batch_size * len(own[rank]) * queries
    keys = batch_size * len(of_keys[rank]) * length * (head_dim + value_dim) * dtype.itemsize
    kept = as_k("k", k)
    largest_k = min(length, max(kept) if isinstance(kept, tuple) else kept or length)
    return SequenceParallelCost(
        method=method,
        forward_bytes=forward,
        backward_bytes=backward,
        exchanged_bytes=keys + rows * head_dim * dtype.itemsize * by_heads,
        selection_bytes=rows * largest_k * (4 + accumulation_dtype(dtype).itemsize),
        output_bytes=rows * value_dim * dtype.itemsize,
    )


def choose_method(shape: Shape) -> str:
    """The method that sends fewer bytes, over all ranks, forward and backward; "keys" where they are as many."""
    if shape.num_heads == 0 or shape.num_heads % shape.num_ranks:
        return "keys"
    heads, keys = (
        sum(sum(_tensor_bytes(shape, rank, by_heads)) for rank in range(shape.num_ranks)) for by_heads in (True, False)
    )
    return "heads" if heads < keys else "keys"


def heads_on_ranks(num_heads: int, num_ranks: int, by_heads: bool) -> tuple[range, ...]:
    """The heads that each rank computes."""
    if not by_heads:
        return (range(num_heads),) * num_ranks
    share = num_heads // num_ranks
    return tuple(range(rank * share, (rank + 1) * share) for rank in range(num_ranks))


def key_heads_on_ranks(num_heads: int, num_key_heads: int, num_ranks: int, by_heads: bool) -> tuple[range, ...]:
    """The key heads that each rank needs for these."""
    if not by_heads:
        return (range(num_key_heads),) * num_ranks
    group = num_heads // num_key_heads
    return tuple(
        range(heads.start // group, -(-heads.stop // group)) for heads in heads_on_ranks(num_heads, num_ranks, True)
    )


def _tensor_bytes(shape: Shape, rank: int, by_heads: bool) -> tuple[int, int]:
    """Bytes of tensors, and of their gradients, that a rank sends to the others."""
    num_ranks, unit = shape.num_ranks, shape.batch_size * shape.element_size
    others = [other for other in range(num_ranks) if other != rank]
    of_keys = key_heads_on_ranks(shape.num_heads, shape.num_key_heads, num_ranks, by_heads)
    both = shape.head_dim + shape.value_dim
    sent_key_heads = sum(len(of_keys[other]) for other in others)
    other_keys = sum(shape.keys[other] for other in others)
    # A gather sends shards of one length.
    gathers = all(heads == range(shape.num_key_heads) for heads in of_keys)
    own_keys = max(shape.keys) if gathers else shape.keys[rank]
    forward = sent_key_heads * own_keys * both
    backward = len(of_keys[rank]) * other_keys * both
    if by_heads:
        own = shape.num_heads // num_ranks
        other_queries = sum(shape.queries[other] for other in others)
        to_heads = (shape.num_heads - own) * shape.queries[rank]
        to_tokens = own * other_queries
        forward += to_heads * shape.head_dim + to_tokens * shape.value_dim
        backward += to_tokens * shape.head_dim + to_heads * shape.value_dim
    return forward * unit, backward * unit
