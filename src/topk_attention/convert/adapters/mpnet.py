"""MPNet: a bias of relative positions, [heads, tokens, tokens], that the encoder computes for all of its layers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...functional import BucketedBias
from ..position_bias import TableBias
from .adapter import AdaptedLayer, attend, heads_of


class MPNetAttention(AdaptedLayer):
    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Any = None,
        position_bias: Tensor | TableBias | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        if not self.runs_topk():
            return super().forward(hidden_states, attention_mask, position_bias, output_attentions, **kwargs)
        query, key, value = (
            heads_of(projection(hidden_states), self.num_attention_heads) for projection in (self.q, self.k, self.v)
        )
        output = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=1 / math.sqrt(self.attention_head_size),
            dropout=self.dropout,
            position_bias=position_bias,
            output_attentions=output_attentions,
        )
        output = self.o(output.flatten(2))
        return (output, None) if output_attentions else (output,)


class MPNetEncoder(AdaptedLayer):
    """Hands its table of biases on, from which attention reads what it needs."""

    def compute_position_bias(self: Any, x: Tensor, position_ids: Tensor | None = None, num_buckets: int = 32) -> Any:
        if not self.runs_topk() or position_ids is not None:
            return super().compute_position_bias(x, position_ids, num_buckets)  # type: ignore[misc]
        table = self.relative_attention_bias(torch.arange(num_buckets, device=x.device))
        return TableBias(BucketedBias(table, bidirectional=True, max_distance=128), 0)
