"""DeBERTa v2 and v3: each score also has a query times a position and a key times a position (disentangled attention).

A position is one of 2 * span buckets of the distance from key to query. The products of all queries, and of all keys,
with all buckets take 2 * span numbers for each token and head, whatever the length; of the scores that are read from
them, [batch, heads, queries, keys], one chunk of queries exists at a time.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from .adapter import AdaptedLayer, attend, heads_of
from .chunks import attend_in_chunks


class DebertaV2Attention(AdaptedLayer):
    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor,
        output_attentions: bool = False,
        query_states: Tensor | None = None,
        relative_pos: Tensor | None = None,
        rel_embeddings: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        if not self.runs_topk():
            return super().forward(
                hidden_states, attention_mask, output_attentions, query_states, relative_pos, rel_embeddings
            )
        if relative_pos is not None:
            raise ValueError(
                "relative_pos must be None for a converted DeBERTa, which computes the distances of tokens itself, got "
                f"{list(relative_pos.shape)}; call topk_attention.unconvert(model) to pass others"
            )
        queries_from = hidden_states if query_states is None else query_states
        if queries_from.shape[1] != hidden_states.shape[1]:
            raise ValueError(
                f"query_states must have the {hidden_states.shape[1]} tokens of hidden_states in a converted DeBERTa, "
                f"got {queries_from.shape[1]}; call topk_attention.unconvert(model) first"
            )
        query, key, value = (
            heads_of(projection(x), self.num_attention_heads)
            for projection, x in (
                (self.query_proj, queries_from),
                (self.key_proj, hidden_states),
                (self.value_proj, hidden_states),
            )
        )
        kinds = [kind for kind in ("c2p", "p2c") if kind in self.pos_att_type]
        options: dict[str, Any] = {
            "scaling": (query.shape[-1] * (1 + len(kinds))) ** -0.5,
            "dropout": self.dropout,
            "output_attentions": output_attentions,
        }
        mask = attention_mask.bool()
        if self.relative_attention and kinds:
            positions = self.pos_dropout(rel_embeddings)[: 2 * self.pos_ebd_size]
            bias = _Bias(self, query, key, positions, kinds, options["scaling"])
            output = attend_in_chunks(self, query, key, value, mask, bias.of, **options)
        else:
            output = attend(self, query, key, value, mask, **options)
        return output.flatten(2), None


class _Bias:
    """What positions add to the scores of a call.

    B batch, H heads, L tokens, P buckets

    of_queries  [B, H, L, P]  each query times each bucket; None without "c2p"
    of_keys     [B, H, P, L]  each bucket times each key; None without "p2c"
    bucket      [2 L - 1] int64, the bucket of each distance, query - key + L - 1
    """

    def __init__(
        self, layer: Any, query: Tensor, key: Tensor, positions: Tensor, kinds: list[str], scaling: float
    ) -> None:
        num_heads, self.length = query.shape[1:3]
        self.of_queries = self.of_keys = None
        if "c2p" in kinds:
            projection = layer.key_proj if layer.share_att_key else layer.pos_key_proj
            self.of_queries = query @ (heads_of(projection(positions), num_heads) * scaling).mT
        if "p2c" in kinds:
            projection = layer.query_proj if layer.share_att_key else layer.pos_query_proj
            self.of_keys = (heads_of(projection(positions), num_heads) * scaling) @ key.mT
        distance = torch.arange(1 - self.length, self.length, device=query.device)
        if layer.position_buckets > 0:
            in_buckets = sys.modules[layer.topk_former_class.__module__].make_log_bucket_position
            distance = in_buckets(distance, layer.position_buckets, layer.max_relative_positions).long()
        span = layer.pos_ebd_size
        self.bucket = (distance + span).clamp(0, 2 * span - 1)

    def of(self, queries: range) -> Tensor:
        """The part of a range of queries, [B, H, n, L]."""
        device = self.bucket.device
        tokens = torch.arange(self.length, device=device)
        rows = torch.arange(queries.start, queries.stop, device=device)
        bucket = self.bucket[rows[:, None] - tokens + self.length - 1]  # [n, L]
        parts = []
        if self.of_queries is not None:
            products = self.of_queries[:, :, queries.start : queries.stop]
            parts.append(products.gather(3, bucket.expand(*products.shape[:2], -1, -1)))
        if self.of_keys is not None:
            parts.append(self.of_keys.gather(2, bucket.expand(*self.of_keys.shape[:2], -1, -1)))
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]


class DebertaV2Encoder(AdaptedLayer):
    """Makes no mask and no distances of [tokens, tokens]."""

    def get_attention_mask(self: Any, attention_mask: Tensor) -> Any:
        if self.runs_topk() and attention_mask.dim() <= 2:
            # The original also hides every key from padded queries, whose outputs nobody reads.
            return attention_mask[:, None, None, :]
        return super().get_attention_mask(attention_mask)  # type: ignore[misc]

    def get_rel_pos(
        self: Any, hidden_states: Tensor, query_states: Tensor | None = None, relative_pos: Tensor | None = None
    ) -> Any:
        if self.runs_topk():
            return relative_pos
        return super().get_rel_pos(hidden_states, query_states, relative_pos)  # type: ignore[misc]
