"""Falcon: one matrix for queries, keys and values in three arrangements; rotated, or with a bias of the key's position.

Each key head has the queries that share it before it and its value behind it: one group in multi-query models, one for
each head in the first ones, `num_kv_heads` in newer ones. The original code repeats the keys and values of a group for
every head of it, in the cache too. Here each is kept once.
"""

from __future__ import annotations

import math
import sys
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..masks import CompactMask
from ..settings import NAME
from .adapter import AdaptedLayer, attend

_HOOK = "_topk_attention_alibi_hook"


class FalconAttention(AdaptedLayer):
    @property
    def num_key_value_groups(self: Any) -> int:  # as PyTorch's attention in transformers asks
        return int(self.num_heads // _num_key_heads(self))

    def forward(
        self: Any,
        hidden_states: Tensor,
        alibi: Tensor | None,
        attention_mask: Any,
        position_ids: Tensor | None = None,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if not self.runs_topk():
            named = {"use_cache": use_cache, "output_attentions": output_attentions}
            named |= {"position_embeddings": position_embeddings} | kwargs
            return super().forward(hidden_states, alibi, attention_mask, position_ids, layer_past, **named)
        groups = self.query_key_value(hidden_states).unflatten(
            -1, (_num_key_heads(self), self.num_key_value_groups + 2, self.head_dim)
        )
        query = groups[..., :-2, :].flatten(2, 3).transpose(1, 2)
        key, value = groups[..., -2, :].transpose(1, 2), groups[..., -1, :].transpose(1, 2)
        if not self.config.alibi:
            rotate = sys.modules[self.topk_former_class.__module__].apply_rotary_pos_emb
            cos, sin = cast(tuple[Tensor, Tensor], position_embeddings)
            query, key = rotate(query, key, cos, sin)
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        bias = None
        if self.config.alibi and alibi is None:  # else the mask holds it
            bias = _alibi(self, attention_mask, key)
        output = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.inv_norm_factor,
            dropout=self.attention_dropout if self.config.alibi else None,  # as the original code, which drops no other
            position_bias=bias,
            output_attentions=output_attentions,
        )
        return self.dense(output.flatten(2)), None


def _num_key_heads(layer: Any) -> int:
    if layer.new_decoder_architecture:
        return int(layer.num_kv_heads)
    return 1 if layer.multi_query else int(layer.num_heads)


def _alibi(layer: Any, mask: Any, key: Tensor) -> Tensor:
    """The bias of each key, [B|1, H, 1, M]; positions count the tokens that are no padding."""
    shown = mask.key_padding() if isinstance(mask, CompactMask) else None
    tokens = torch.ones(1, key.shape[2], device=key.device) if shown is None else shown[:, 0, 0]
    build = sys.modules[layer.topk_former_class.__module__].build_alibi_tensor
    alibi: Tensor = build(tokens.long(), layer.num_heads, key.dtype)
    return alibi.unflatten(0, (-1, layer.num_heads)) / math.sqrt(layer.head_dim)


def leave_bias_to_layers(model: nn.Module) -> None:
    """Keep a FalconModel from writing its bias into the mask, [batch, heads, queries, keys], while it runs top-k."""
    if not hasattr(model, _HOOK):
        setattr(model, _HOOK, model.register_forward_pre_hook(_choose))
        _choose(model)


def give_bias_back(model: Any) -> None:
    """Undo `leave_bias_to_layers`."""
    if hasattr(model, _HOOK):
        getattr(model, _HOOK).remove()
        delattr(model, _HOOK)
        model.use_alibi = model.config.alibi


def _choose(model: Any, *_: object) -> None:
    model.use_alibi = model.config.alibi and model.config._attn_implementation != NAME
