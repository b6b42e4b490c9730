"""How a call is cut into steps whose temporary tensors fit a memory budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Bytes of one score tile. Measured at N = M = 8,192, D = 64, k = 64: 1 MiB is 25 to 50 % slower, 2 MiB 30 %, and from
# 4 to 32 MiB speed is flat.
TILE_BYTES = 4 * 2**20
# With a block narrower than a few k most of the time would go into merging instead of scoring.
_KEY_BLOCK_PER_K = 8
_QUERY_CHUNK_BEFORE_KEYS_ARE_BLOCKED = 128
# The backward pass holds about this much for each kept entry: sort keys, order, row numbers, weights.
BACKWARD_BYTES_PER_ENTRY = 48


class HeadGroup(NamedTuple):
    """Query heads that share one k and the key heads they read."""

    query_heads: range
    key_heads: range
    k: int
    first_entry: int  # where this group's [B, heads, N, k] block starts in the flat selection

    @property
    def queries_per_key_head(self) -> int:
        return len(self.query_heads) // len(self.key_heads)


class Step(NamedTuple):
    """One block of rows: batches x heads x queries."""

    batches: range
    key_heads: range
    query_heads: range
    queries: range

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batches, key heads, query heads per key head, queries)"""
        return (
            len(self.batches),
            len(self.key_heads),
            len(self.query_heads) // len(self.key_heads),
            len(self.queries),
        )

    @property
    def num_rows(self) -> int:
        return len(self.batches) * len(self.query_heads) * len(self.queries)


def head_groups(head_k: Sequence[int], batch: int, num_key_heads: int, num_queries: int) -> list[HeadGroup]:
    """All heads at once where they share one k, otherwise head by head."""
    num_heads = len(head_k)
    if len(set(head_k)) == 1:
        return [HeadGroup(range(num_heads), range(num_key_heads), head_k[0], 0)]
    queries_per_key_head = num_heads // num_key_heads
    groups, first_entry = [], 0
    for head, k in enumerate(head_k):
        key_head = head // queries_per_key_head
        groups.append(HeadGroup(range(head, head + 1), range(key_head, key_head + 1), k, first_entry))
        first_entry += batch * num_queries * k
    return groups


def num_entries(head_k: Sequence[int], batch: int, num_queries: int) -> int:
    """Length of the flat selection: one entry per kept key."""
    return batch * num_queries * sum(head_k)


def entries_of(selection: Tensor, group: HeadGroup, batch: int, num_queries: int) -> Tensor:
    """The group's part of a flat selection as [B, heads, N, k], a view."""
    shape = (batch, len(group.query_heads), num_queries, group.k)
    return selection.narrow(0, group.first_entry, shape[0] * shape[1] * shape[2] * shape[3]).view(shape)


class TileShape(NamedTuple):
    query_chunk: int  # queries of one head
    key_block: int
    rows_per_step: int  # queries of all heads that share a step


def tile_shape(group: HeadGroup, num_queries: int, num_keys: int, itemsize: int, query_chunk: int | None) -> TileShape:
    """Chunk and block sizes with which one step's scores take about TILE_BYTES; a given query_chunk is kept."""
    tile_scores = TILE_BYTES // itemsize
    rows_of_a_query = group.queries_per_key_head
    rows = min(query_chunk or _QUERY_CHUNK_BEFORE_KEYS_ARE_BLOCKED, num_queries) * rows_of_a_query
    key_block = min(num_keys, max(tile_scores // rows, _KEY_BLOCK_PER_K * group.k))
    rows_per_step = max(tile_scores // key_block, 1)
    query_chunk = query_chunk or max(rows_per_step // rows_of_a_query, 1)
    return TileShape(min(query_chunk, num_queries), key_block, rows_per_step)


def steps(group: HeadGroup, batch: int, num_queries: int, query_chunk: int, rows_per_step: int) -> Iterator[Step]:
    """Cut batches x heads x queries into steps. Short sequences share a step, up to rows_per_step."""
    queries_per_key_head = group.queries_per_key_head
    heads_per_step = batches_per_step = 1
    if query_chunk >= num_queries:
        rows_of_key_head = queries_per_key_head * num_queries
        heads_per_step = max(1, min(rows_per_step // rows_of_key_head, len(group.key_heads)))
        if heads_per_step == len(group.key_heads):
            batches_per_step = max(1, rows_per_step // (rows_of_key_head * heads_per_step))
    for batches in split(range(batch), batches_per_step):
        for heads in split(range(len(group.key_heads)), heads_per_step):
            key_heads = group.key_heads[heads.start : heads.stop]
            query_heads = group.query_heads[heads.start * queries_per_key_head : heads.stop * queries_per_key_head]
            for queries in split(range(num_queries), query_chunk):
                yield Step(batches, key_heads, query_heads, queries)


def backward_rows(num_keys: int, k: int) -> int:
    """Rows of one backward step.

    Each step adds one [num_keys, D] block to the key gradient. So a step needs at least about one entry per key;
    with fewer entries the additions alone would cost O(N * M).
    """
    entries = max(TILE_BYTES // BACKWARD_BYTES_PER_ENTRY, num_keys)
    return max(entries // k, 1)


def split(whole: range, size: int) -> Iterator[range]:
    """Consecutive parts of this size; the last one may be shorter."""
    for start in range(whole.start, whole.stop, size):
        yield range(start, min(start + size, whole.stop))


def narrow(tensor: Tensor, step: Step, keys: range) -> Tensor:
    """The part of a broadcastable [B|1, H|1, N|1, M|1] tensor that a tile needs, as [b, g, r, n, m], never expanded."""
    for dim, part in enumerate((step.batches, step.query_heads, step.queries, keys)):
        if tensor.shape[dim] != 1:
            tensor = tensor.narrow(dim, part.start, len(part))
    _, key_heads, queries_per_key_head, _ = step.shape
    heads = (key_heads, queries_per_key_head) if tensor.shape[1] != 1 else (1, 1)
    return tensor.unflatten(1, heads)


def rows_of(tensor: Tensor, step: Step) -> Tensor:
    """The step's part of a [B, H, N, X] tensor as [rows, X], rows in the order batch, head, query."""
    part = tensor[step.batches.start : step.batches.stop, step.query_heads.start : step.query_heads.stop]
    return part[:, :, step.queries.start : step.queries.stop].reshape(step.num_rows, tensor.shape[-1])


def rows_of_heads(per_head: Tensor, step: Step) -> Tensor:
    """The numbers [H] of query heads as [rows, 1], rows in the order batch, head, query."""
    heads = per_head[step.query_heads.start : step.query_heads.stop].view(1, -1, 1)
    return heads.expand(len(step.batches), -1, len(step.queries)).reshape(step.num_rows, 1)


def write_rows(tensor: Tensor, step: Step, rows: Tensor) -> None:
    """The inverse of `rows_of`."""
    part = tensor[step.batches.start : step.batches.stop, step.query_heads.start : step.query_heads.stop]
    part = part[:, :, step.queries.start : step.queries.stop]
    part.copy_(rows.view(part.shape))


def row_numbers(step: Step, num_heads: int, num_queries: int, device: torch.device) -> Tensor:
    """For each row of the step its number (b * H + h) * N + i in the whole call, int64 [rows]."""
    batches = torch.arange(step.batches.start, step.batches.stop, device=device)[:, None, None]
    heads = torch.arange(step.query_heads.start, step.query_heads.stop, device=device)[:, None]
    queries = torch.arange(step.queries.start, step.queries.stop, device=device)
    return ((batches * num_heads + heads) * num_queries + queries).flatten()
