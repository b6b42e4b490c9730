"""The backward pass from the side of keys: each sums over the entries that chose it, in the order of rows.

Nothing is added by atomic operations, so two runs give the same bits. Entries are sorted by key, which keeps the order
of rows, and a key with many entries, as one that every query keeps, is cut into segments whose sums are added in order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .scores import number

# Entries that one program sums.
SEGMENT = 1024


class Segments(NamedTuple):
    """The sorted entries of T targets, cut into segments; S is how many there may be, whatever the entries are.

    order         [entries] int64, positions of the sorted entries
    bounds        [T + 1] int64, where the entries of each target begin in that order
    of_segment    [S] int64, the target of each segment, T behind the last one
    first_segment [T + 1] int64, each target's first segment
    partial       [T] int64, where the sums of a target's segments begin among those of targets with several
    num_partial   how many such sums there may be
    """

    order: Tensor
    bounds: Tensor
    of_segment: Tensor
    first_segment: Tensor
    partial: Tensor
    num_partial: int


def cut_into_segments(targets: Tensor, num_targets: int, segment: int) -> Segments:
    """Sort entries by target; entries with target num_targets belong to none."""
    ordered, order = targets.sort(stable=True)
    device = targets.device
    bounds = torch.searchsorted(ordered, torch.arange(num_targets + 1, dtype=targets.dtype, device=device))
    counts = bounds[1:] - bounds[:-1]
    num_segments = ((counts + (segment - 1)) // segment).clamp(min=1)
    first = torch.nn.functional.pad(num_segments.cumsum(0), (1, 0))
    most = num_targets + targets.shape[0] // segment
    of_segment = torch.searchsorted(first[1:], torch.arange(most, device=device), right=True)
    several = torch.where(num_segments > 1, num_segments, 0)
    # A target with n > segment entries has at most 2 n / segment segments.
    return Segments(order, bounds, of_segment, first, several.cumsum(0) - several, 2 * targets.shape[0] // segment)


@triton.jit
def sum_entries_kernel(
    row_ptr,
    result_ptr,
    partial_ptr,
    order_ptr,
    bound_ptr,
    of_segment_ptr,
    first_segment_ptr,
    partial_at_ptr,
    weight_ptr,
    source_ptr,
    row_b,
    row_h,
    row_n,
    num_queries,
    num_heads,
    num_targets,
    most_segments,
    scale_high,
    scale_low,
    acc: tl.constexpr,
    dim: tl.constexpr,
    padded_dim: tl.constexpr,
    segment: tl.constexpr,
    block_entries: tl.constexpr,
    block_segments: tl.constexpr,
):
    """result[target] = scale * sum of weight[entry] * rows[source[entry]], rows [B, H, N, dim], result [T, dim]."""
    at = tl.program_id(0) * block_segments + tl.arange(0, block_segments)
    target = tl.load(of_segment_ptr + at, mask=at < most_segments, other=num_targets)
    is_segment = target < num_targets
    first_segment = tl.load(first_segment_ptr + target, mask=is_segment, other=0)
    num_segments = tl.load(first_segment_ptr + target + 1, mask=is_segment, other=0) - first_segment
    first = tl.load(bound_ptr + target, mask=is_segment, other=0) + (at - first_segment) * segment
    last = tl.load(bound_ptr + target + 1, mask=is_segment, other=0)
    last = tl.where(is_segment, tl.minimum(last, first + segment), first)
    dims = tl.arange(0, padded_dim)
    total = tl.zeros((block_segments, padded_dim), acc)
    for begin in tl.range(0, tl.max(last - first, 0).to(tl.int32), block_entries):
        place = first[:, None] + begin + tl.arange(0, block_entries)[None, :]
        inside = place < last[:, None]
        entry = tl.load(order_ptr + place, mask=inside, other=0)
        source = tl.load(source_ptr + entry, mask=inside, other=0)
        weight = tl.load(weight_ptr + entry, mask=inside, other=0.0)
        query = source % num_queries
        head = source // num_queries % num_heads
        batch = source // num_queries // num_heads
        row = batch.to(tl.int64) * row_b + head.to(tl.int64) * row_h + query.to(tl.int64) * row_n
        numbers = tl.load(
            row_ptr + row[:, :, None] + dims[None, None, :],
            mask=inside[:, :, None] & (dims[None, None, :] < dim),
            other=0.0,
        )
        total += tl.sum(tl.where(inside[:, :, None], weight[:, :, None] * numbers.to(acc), 0.0), 1)
    total = total * number(scale_high, scale_low, acc)[:, None]
    is_only = is_segment & (num_segments == 1)
    is_part = is_segment & (num_segments > 1)
    is_dim = dims[None, :] < dim
    tl.store(
        result_ptr + target[:, None] * dim + dims[None, :],
        total.to(result_ptr.dtype.element_ty),
        mask=is_only[:, None] & is_dim,
    )
    part = tl.load(partial_at_ptr + target, mask=is_part, other=0) + at - first_segment
    tl.store(partial_ptr + part[:, None] * dim + dims[None, :], total, mask=is_part[:, None] & is_dim)


@triton.jit
def sum_scalars_kernel(
    result_ptr,
    partial_ptr,
    order_ptr,
    bound_ptr,
    of_segment_ptr,
    first_segment_ptr,
    partial_at_ptr,
    weight_ptr,
    num_targets,
    most_segments,
    acc: tl.constexpr,
    segment: tl.constexpr,
    block_entries: tl.constexpr,
    block_segments: tl.constexpr,
):
    """result[target] = sum of weight[entry], [T]: as `sum_entries_kernel`."""
    at = tl.program_id(0) * block_segments + tl.arange(0, block_segments)
    target = tl.load(of_segment_ptr + at, mask=at < most_segments, other=num_targets)
    is_segment = target < num_targets
    first_segment = tl.load(first_segment_ptr + target, mask=is_segment, other=0)
    num_segments = tl.load(first_segment_ptr + target + 1, mask=is_segment, other=0) - first_segment
    first = tl.load(bound_ptr + target, mask=is_segment, other=0) + (at - first_segment) * segment
    last = tl.load(bound_ptr + target + 1, mask=is_segment, other=0)
    last = tl.where(is_segment, tl.minimum(last, first + segment), first)
    total = tl.zeros((block_segments,), acc)
    for begin in tl.range(0, tl.max(last - first, 0).to(tl.int32), block_entries):
        place = first[:, None] + begin + tl.arange(0, block_entries)[None, :]
        inside = place < last[:, None]
        entry = tl.load(order_ptr + place, mask=inside, other=0)
        total += tl.sum(tl.load(weight_ptr + entry, mask=inside, other=0.0), 1)
    tl.store(result_ptr + target, total, mask=is_segment & (num_segments == 1))
    is_part = is_segment & (num_segments > 1)
    part = tl.load(partial_at_ptr + target, mask=is_part, other=0) + at - first_segment
    tl.store(partial_ptr + part, total, mask=is_part)


@triton.jit
def join_segments_kernel(
    result_ptr,
    partial_ptr,
    first_segment_ptr,
    partial_at_ptr,
    num_targets,
    acc: tl.constexpr,
    dim: tl.constexpr,
    padded_dim: tl.constexpr,
    block_targets: tl.constexpr,
):
    """Add the sums of the segments of targets that have several."""
    target = tl.program_id(0).to(tl.int64) * block_targets + tl.arange(0, block_targets)
    is_target = target < num_targets
    first = tl.load(first_segment_ptr + target, mask=is_target, other=0)
    count = tl.load(first_segment_ptr + target + 1, mask=is_target, other=0) - first
    most = tl.max(count, 0).to(tl.int32)
    if most > 1:
        has_parts = is_target & (count > 1)
        at = tl.load(partial_at_ptr + target, mask=has_parts, other=0)
        dims = tl.arange(0, padded_dim)
        is_dim = dims[None, :] < dim
        total = tl.zeros((block_targets, padded_dim), acc)
        for part in tl.range(0, most):
            inside = has_parts & (part < count)
            numbers = partial_ptr + (at + part)[:, None] * dim + dims[None, :]
            total += tl.load(numbers, mask=inside[:, None] & is_dim, other=0.0)
        to = result_ptr + target[:, None] * dim + dims[None, :]
        tl.store(to, total.to(result_ptr.dtype.element_ty), mask=has_parts[:, None] & is_dim)
