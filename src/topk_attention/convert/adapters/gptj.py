"""GPT-J before transformers 5.24: rotated queries and keys, whose scores it computes in float32, as all kernels do."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .adapter import AdaptedLayer, attend


class GPTJAttention(AdaptedLayer):
    def _attn(
        self: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None
    ) -> tuple[Tensor, Tensor | None]:
        if not self.runs_topk():
            return super()._attn(query, key, value, attention_mask)  # type: ignore[misc]
        output = attend(self, query, key, value, attention_mask, scaling=1 / self.scale_attn, dropout=self.attn_dropout)
        return output.transpose(1, 2), None
