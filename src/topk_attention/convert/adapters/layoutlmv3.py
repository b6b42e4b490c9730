"""LayoutLMv3 before transformers 5.24: biases of distances in the text and on the page, in buckets.

A document's boxes may lie anywhere, so that the bias of two tokens depends on both and no table of distances holds it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .adapter import AdaptedLayer, attend, heads_of
from .chunks import attend_in_chunks


class _Positions(NamedTuple):
    """Positions [B, L] along one axis, with the table [buckets, H] for their distances."""

    positions: Tensor
    table: Tensor
    max_distance: int
    encoder: Any

    def bias(self, queries: range) -> Tensor:
        """[B, H, n, L]"""
        rows = slice(queries.start, queries.stop)
        distance = self.positions[:, None, :] - self.positions[:, rows, None]
        bucket = self.encoder.relative_position_bucket(
            distance, num_buckets=len(self.table), max_distance=self.max_distance
        )
        return self.table[bucket].permute(0, 3, 1, 2)


class LayoutLMv3Attention(AdaptedLayer):
    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Any = None,
        rel_pos: Any = None,
        rel_2d_pos: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if not self.runs_topk():
            return super().forward(hidden_states, attention_mask, rel_pos, rel_2d_pos, **kwargs)
        query, key, value = (
            heads_of(projection(hidden_states), self.num_attention_heads)
            for projection in (self.query, self.key, self.value)
        )
        axes: Sequence[_Positions] = ()
        if self.has_relative_attention_bias:  # without it the original code reads neither
            axes = (*rel_pos, *rel_2d_pos) if self.has_spatial_attention_bias else rel_pos
        scaling = 1 / math.sqrt(self.attention_head_size)
        options: dict[str, Any] = {"scaling": scaling, "dropout": self.dropout, "is_causal": False}
        if not axes:
            return attend(self, query, key, value, attention_mask, **options).flatten(2), None

        def bias_of(queries: range) -> Tensor:
            return scaling * reduce(torch.add, (axis.bias(queries) for axis in axes))

        return attend_in_chunks(self, query, key, value, attention_mask, bias_of, **options).flatten(2), None


class LayoutLMv3Encoder(AdaptedLayer):
    """Hands positions and tables on, from which each layer makes what it needs. As in the original code, tables get no
    gradient."""

    def _cal_1d_pos_emb(self: Any, position_ids: Tensor) -> Any:
        if not self.runs_topk():
            return super()._cal_1d_pos_emb(position_ids)  # type: ignore[misc]
        return [_Positions(position_ids, self.rel_pos_bias.weight.detach().t(), self.max_rel_pos, self)]

    def _cal_2d_pos_emb(self: Any, bbox: Tensor) -> Any:
        if not self.runs_topk():
            return super()._cal_2d_pos_emb(bbox)  # type: ignore[misc]
        tables = {0: self.rel_pos_x_bias, 3: self.rel_pos_y_bias}
        return [
            _Positions(bbox[..., side], linear.weight.detach().t(), self.max_rel_2d_pos, self)
            for side, linear in tables.items()
        ]
