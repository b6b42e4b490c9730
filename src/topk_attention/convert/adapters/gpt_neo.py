"""GPT-Neo: scores without a scale, and layers in which a query sees the last `window_size` keys alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..masks import CompactMask, compact_mask
from .adapter import AdaptedLayer, attend


class GPTNeoAttention(AdaptedLayer):
    def _attn(
        self: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None
    ) -> tuple[Tensor, Tensor | None]:
        if not self.runs_topk():
            return super()._attn(query, key, value, attention_mask)  # type: ignore[misc]
        num_queries, num_keys = query.shape[2], key.shape[2]
        if attention_mask is None:
            attention_mask = compact_mask(
                len(query), num_queries, num_keys, num_keys - num_queries, device=query.device
            )
        if self.attention_type == "local" and num_keys > self.config.window_size:
            attention_mask = _windowed(attention_mask, self.config.window_size)
        output = attend(self, query, key, value, attention_mask, scaling=1.0, dropout=self.attn_dropout)
        return output.transpose(1, 2), None


def _windowed(mask: CompactMask | Tensor, window: int) -> CompactMask | Tensor:
    """The mask that also hides all but the last keys of each query."""
    from transformers.masking_utils import and_masks, sliding_window_overlay

    if isinstance(mask, CompactMask):
        return replace(mask, mask_function=and_masks(mask.mask_function, sliding_window_overlay(window)))
    num_queries, num_keys = mask.shape[-2:]
    queries = torch.arange(num_keys - num_queries, num_keys, device=mask.device)[:, None]
    is_near = torch.arange(num_keys, device=mask.device) > queries - window
    return mask & is_near if mask.dtype == torch.bool else mask.masked_fill(~is_near, -torch.inf)
