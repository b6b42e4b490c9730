"""Attention that uses every key: written out, and PyTorch's own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .interface import Baseline, visible_keys


class VanillaAttention(Baseline):
    """Vaswani et al. 2017 written out: all scores of all heads are in memory at once. Masked keys have to be finite."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, is_causal: bool, dropout_p: float
    ) -> Tensor:
        scores = query / query.shape[-1] ** 0.5 @ key.mT  # [B, H, N, M]
        if key_mask is None and not is_causal:
            return F.dropout(scores.softmax(-1), dropout_p) @ value
        visible = visible_keys(query.shape[2], key.shape[2], key_mask, is_causal, query)
        # Not -inf: a query without keys would have NaN in its gradient.
        scores = scores.masked_fill_(~visible, torch.finfo(scores.dtype).min)
        output = F.dropout(scores.softmax(-1), dropout_p) @ value
        return output.masked_fill(~visible.any(-1, keepdim=True), 0)


class SdpaAttention(Baseline):
    """`torch.nn.functional.scaled_dot_product_attention`, without a mask where it can do without."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, is_causal: bool, dropout_p: float
    ) -> Tensor:
        # PyTorch aligns causal masks top-left, which is the same for as many queries as keys.
        alone = is_causal and key_mask is None and query.shape[2] == key.shape[2]
        if alone or not is_causal:
            mask = None if key_mask is None else key_mask[:, None, None, :]
        else:
            mask = visible_keys(query.shape[2], key.shape[2], key_mask, is_causal, query)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout_p, is_causal=alone)
