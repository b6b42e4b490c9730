"""Attention with a bias of its own for every query and key, of which one chunk of queries exists at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..masks import CompactMask
from .adapter import attend

# Queries whose bias exists at a time: [batch, heads, 128, keys]. At 16,384 keys a head's part takes 8 MiB.
_CHUNK = 128


def attend_in_chunks(
    layer: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: CompactMask | Tensor | None,
    bias_of: Callable[[range], Tensor],
    **options: Any,
) -> Tensor:
    """Attention as the settings of the layer say, [B, N, H, E].

    mask     [B, 1, 1|N, M], bool or added to scores
    bias_of  the bias of a range of queries, [B|1, H, n, M]
    options  those of `attend`

    Where gradients are needed each chunk is a checkpoint: its bias is computed again in the backward pass.
    """

    def part(start: int) -> Tensor:
        queries = range(start, min(start + _CHUNK, query.shape[2]))
        rows = slice(queries.start, queries.stop)
        return attend(
            layer, query[:, :, rows], key, value, _rows_of(mask, queries), position_bias=bias_of(queries), **options
        )

    starts = range(0, query.shape[2], _CHUNK)
    if len(starts) == 1:
        return part(0)
    if torch.is_grad_enabled():
        return torch.cat([checkpoint(part, start, use_reentrant=False) for start in starts], dim=1)
    first = part(0)
    # One place for all: parts that wait to be joined lie between what each call frees, which the C library then keeps.
    output = first.new_empty(first.shape[0], query.shape[2], *first.shape[2:])
    output[:, :_CHUNK] = first
    for start in starts[1:]:
        output[:, start : start + _CHUNK] = part(start)
    return output


def _rows_of(mask: CompactMask | Tensor | None, queries: range) -> Tensor | None:
    """What these queries may see."""
    if isinstance(mask, CompactMask):
        return mask.key_padding() if mask.is_bidirectional else mask.dense(queries)
    return mask if mask is None or mask.shape[2] == 1 else mask[:, :, queries.start : queries.stop]
