"""Attention that uses every key: written out, and PyTorch's own."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from topk_attention.functional.checks import check_count

from .interface import AttentionMethod, visible_keys


class VanillaAttention(AttentionMethod):
    """Vaswani et al. 2017 written out. Masked keys must be finite.

    query_chunk_size  None: the scores of all queries are in memory at once. Otherwise only those of this many queries
                      are, for all heads, and the backward pass computes them again (Gupta et al. 2021, section 2,
                      without top-k)
    """

    def __init__(self, query_chunk_size: int | None = None) -> None:
        super().__init__()
        if query_chunk_size is not None:
            check_count("query_chunk_size", query_chunk_size)
        self.query_chunk_size = query_chunk_size

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, is_causal: bool, dropout_p: float
    ) -> Tensor:
        num_queries, num_keys = query.shape[2], key.shape[2]
        scaled = query / query.shape[3] ** 0.5
        if self.query_chunk_size is None:
            offset = num_keys - num_queries if is_causal else None
            return _attend(key_mask, offset, dropout_p, scaled, key, value)
        # Written in place: separate outputs lie between the freed scores and fragment memory, and the C library finds
        # no room for the next chunk's scores (3 GiB at the end for L = 8,192, 12 heads and 64 queries a chunk).
        output = None if torch.is_grad_enabled() else value.new_empty(*query.shape[:3], value.shape[3])
        outputs = []
        for number, rows in enumerate(scaled.split(self.query_chunk_size, 2)):
            first = number * self.query_chunk_size
            offset = first + num_keys - num_queries if is_causal else None
            attend = functools.partial(_attend, key_mask, offset, dropout_p)
            if output is None:
                outputs.append(checkpoint(attend, rows, key, value, use_reentrant=False))
            else:
                output[:, :, first : first + rows.shape[2]] = attend(rows, key, value)
        return torch.cat(outputs, 2) if output is None else output


def _attend(
    key_mask: Tensor | None, offset: int | None, dropout_p: float, scaled: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """Attention of queries [B, H, C, D].

    offset  the last key that the first query sees; each further query sees one more. None: all queries see all keys
    """
    scores = scaled @ key.mT  # [B, H, C, M]
    if key_mask is None and offset is None:
        return F.dropout(scores.softmax(-1), dropout_p) @ value
    visible = visible_keys(scaled.shape[2], key.shape[2], key_mask, offset, scores.device)
    # Not -inf: a query without keys would have NaN in its gradient.
    scores = scores.masked_fill_(~visible, torch.finfo(scores.dtype).min)
    output = F.dropout(scores.softmax(-1), dropout_p) @ value
    return output.masked_fill(~visible.any(-1, keepdim=True), 0)


class SdpaAttention(AttentionMethod):
    """`torch.nn.functional.scaled_dot_product_attention`, with a mask only where it needs one."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, is_causal: bool, dropout_p: float
    ) -> Tensor:
        # PyTorch aligns causal masks top-left. With as many queries as keys that is the same.
        alone = is_causal and key_mask is None and query.shape[2] == key.shape[2]
        if alone or not is_causal:
            mask = None if key_mask is None else key_mask[:, None, None, :]
        else:
            offset = key.shape[2] - query.shape[2]
            mask = visible_keys(query.shape[2], key.shape[2], key_mask, offset, query.device)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout_p, is_causal=alone)
