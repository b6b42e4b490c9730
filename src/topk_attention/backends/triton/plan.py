"""How a call is cut into slabs of rows, tiles and splits, and how much memory that takes. Nothing here needs Triton."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch

# Memory of one slab's scratch. A slab should have a few tiles for each of some 132 processors; not measured.
SLAB_BYTES = 256 * 2**20
# Entries of the selection that one part of the backward pass sorts; a part has at least the rows of one key head.
SORTED_ENTRIES = 32 * 2**20
# Of an entry there: score gradient, weight after dropout, source, target, sorted target, order, and the sort's own.
SORTED_BYTES = 48
MAX_K = 1024
MAX_DIM = 256
_MOST_CANDIDATES = 8192
_FEW_CANDIDATES = 512


def power_of_2(number: int) -> int:
    """The smallest power of 2 that is not below a number of at least 1."""
    return 1 << (number - 1).bit_length()


class Plan(NamedTuple):
    """The sizes of one call's programs. A slab has `slab_tiles` tiles of `tile_rows` rows of one key head.

    tile_keys     keys of a tile of scores
    group_keys    keys of which one maximum is stored
    num_groups    maxima of a row, with those of keys behind the last one
    num_words     words of bits of a row, likewise
    capacity      candidates of a row that are listed
    few           capacity of the kernel for rows with few candidates
    has_maxima    whether some row may have k groups, so that thresholds say something
    splits        parts of the keys that programs of their own score
    """

    tile_rows: int
    tile_keys: int
    num_warps: int
    group_keys: int
    num_groups: int
    num_words: int
    capacity: int
    few: int
    has_maxima: bool
    num_tiles: int
    slab_tiles: int
    splits: int
    keys_of_split: int
    padded_k: int
    padded_dim: int
    bytes_of_row: int

    @property
    def scratch_bytes(self) -> int:
        """What a call holds beside its inputs and results, except a number and a norm for each key."""
        return self.slab_tiles * self.tile_rows * self.bytes_of_row


def make_plan(
    batch: int,
    num_heads: int,
    num_key_heads: int,
    num_queries: int,
    num_keys: int,
    head_dim: int,
    largest_k: int,
    *,
    itemsize: int,
    adds: bool,
    saves: bool,
    processors: int,
    slab_bytes: int | None = None,
    interpreted: bool = False,
) -> Plan:
    """
    itemsize    of query and key
    adds        whether masks or biases are read in the tiles
    processors  of the device, whose number of programs the keys are split for
    interpreted  smaller tiles, groups and lists: tests with a dozen keys then go through every kernel
    """
    rows = num_queries * (num_heads // num_key_heads)
    padded_dim = max(16, power_of_2(head_dim))
    most_rows, tile_keys, num_warps = 128, 128, 8
    if padded_dim > 128 or adds:
        tile_keys = 64
    if itemsize > 2:
        most_rows, tile_keys, num_warps = 64, 64, 4
        if padded_dim > 128:
            tile_keys = 32
    if interpreted:
        tile_keys = 32
    tile_rows = max(16, min(most_rows, power_of_2(rows)))
    if tile_rows < 64:
        num_warps = 4
    # As long as no more than half of the keys are candidates, larger groups save memory. A row has at most k groups
    # that reach its threshold, and others of the same maximum.
    group_keys = 32
    fewest, least_capacity = (2, 4) if interpreted else (8, 16)
    while group_keys > fewest and (4 * largest_k * group_keys > num_keys or largest_k * group_keys > _MOST_CANDIDATES):
        group_keys //= 2
    blocks = -(-num_keys // tile_keys)
    num_groups, num_words = blocks * tile_keys // group_keys, blocks * tile_keys // 32
    capacity = max(least_capacity, power_of_2(min(num_keys, largest_k * group_keys)))
    padded_k = max(16, power_of_2(largest_k))
    few = min(capacity, max(_FEW_CANDIDATES, padded_k))
    number = max(4, itemsize)
    # Maxima, bits, the list with its scores, threshold and count, and the selection where the call does not save it.
    bytes_of_row = number * num_groups + 4 * num_words + (4 + number) * capacity + number + 4
    if not saves:
        bytes_of_row += (4 + number) * padded_k
    num_tiles = batch * num_key_heads * -(-rows // tile_rows)
    slab_tiles = max(1, min(num_tiles, (slab_bytes or SLAB_BYTES) // (tile_rows * bytes_of_row)))
    # Two programs for each processor, with two tiles of keys or more.
    splits = max(1, min(2 * processors // slab_tiles, blocks // 2))
    blocks_of_split = -(-blocks // splits)
    return Plan(
        tile_rows=tile_rows,
        tile_keys=tile_keys,
        num_warps=num_warps,
        group_keys=group_keys,
        num_groups=num_groups,
        num_words=num_words,
        capacity=capacity,
        few=few,
        has_maxima=-(-num_keys // group_keys) >= largest_k,
        num_tiles=num_tiles,
        slab_tiles=slab_tiles,
        splits=-(-blocks // blocks_of_split),
        keys_of_split=blocks_of_split * tile_keys,
        padded_k=padded_k,
        padded_dim=padded_dim,
        bytes_of_row=bytes_of_row,
    )


class PartOfBackward(NamedTuple):
    """Key heads, numbered b * G + g, that one part of the backward pass differentiates, and their entries."""

    key_heads: range
    entries: range


def parts_of_backward(head_k: Sequence[int], batch: int, num_key_heads: int, num_queries: int) -> list[PartOfBackward]:
    """Consecutive key heads whose entries together stay below SORTED_ENTRIES, one at least."""
    group_size = len(head_k) // num_key_heads
    sizes = [num_queries * sum(head_k[g * group_size : (g + 1) * group_size]) for g in range(num_key_heads)] * batch
    parts, first_head, first, entries = [], 0, 0, 0
    for head, size in enumerate(sizes):
        if head > first_head and entries + size - first > SORTED_ENTRIES:
            parts.append(PartOfBackward(range(first_head, head), range(first, entries)))
            first_head, first = head, entries
        entries += size
    if entries > first:
        parts.append(PartOfBackward(range(first_head, len(sizes)), range(first, entries)))
    return parts


@cache
def k_tables(head_k: tuple[int, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """[H] int32 and int64: each head's k, and the sum of those before. Kept, as each copy to a device is waited for."""
    starts = [sum(head_k[:head]) for head in range(len(head_k))]
    return (
        torch.tensor(head_k, dtype=torch.int32, device=device),
        torch.tensor(starts, dtype=torch.int64, device=device),
    )
