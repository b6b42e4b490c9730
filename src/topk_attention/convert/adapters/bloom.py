"""BLOOM: a linear bias of the key's position (ALiBi), [batch * heads, 1, keys], that the model computes."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import dropout

from .adapter import AdaptedLayer, attend


class BloomAttention(AdaptedLayer):
    @staticmethod
    def why_not(layer: Any) -> str | None:
        if layer.pretraining_tp > 1 and layer.slow_but_exact:
            return "its output is computed in slices (pretraining_tp with slow_but_exact)"
        return None

    def forward(
        self: Any,
        hidden_states: Tensor,
        residual: Tensor,
        alibi: Tensor,
        attention_mask: Any,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if not self.runs_topk():
            return super().forward(
                hidden_states, residual, alibi, attention_mask, layer_past, use_cache, output_attentions, **kwargs
            )
        query, key, value = self._reshape(self.query_key_value(hidden_states))
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        output = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.inv_norm_factor,
            dropout=self.attention_dropout,
            # The same for all queries: a key's own position differs from its distance by what the softmax takes out.
            position_bias=alibi.unflatten(0, (-1, self.num_heads)),
            output_attentions=output_attentions,
        )
        output = dropout(self.dense(output.flatten(2)), self.hidden_dropout, self.training)
        return output + residual, None
