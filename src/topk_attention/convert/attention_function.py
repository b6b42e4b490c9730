"""The attention function that transformers calls for `attn_implementation="topk"`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..functional import topk_attention
from .masks import CompactMask
from .position_bias import Bias, NoBias, TableBias, computes_bias, keeps_bias_small
from .settings import LayerSettings, layer_settings

# Arguments that change what attention computes. Leaving one out would change results without a word.
_UNSUPPORTED = {
    "softcap": "a soft cap on scores",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "block_indices": "key blocks chosen by the model's own selector",
    "cache": "a paged cache",
}
# Queries per mask tile for mask patterns that are neither causal nor full.
_MASK_CHUNK = 512

PositionBias = Tensor | TableBias | None


def topk_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: CompactMask | Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    position_bias: PositionBias | NoBias = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers v5 hands it over.

    B batch, H heads, G key heads, N queries, M keys

    query [B, H, N, D]; key [B, G, M, D]; value [B, G, M, E]; position_bias [1|B, H, N, M] or a description
    Returns output [B, N, H, E] and None in place of weights.
    """
    for name, meaning in _UNSUPPORTED.items():
        if kwargs.get(name) is not None:
            raise ValueError(f'attn_implementation="topk" does not support {name}= ({meaning}); use "eager"')
    if kwargs.get("output_attentions"):
        warnings.warn('attn_implementation="topk" returns no attention weights; use "eager" for them', stacklevel=2)
    if isinstance(position_bias, NoBias):
        position_bias = None
    if isinstance(position_bias, Tensor) and computes_bias(module) and not keeps_bias_small(module):
        warnings.warn(
            f"{type(module).__name__} computes its position bias in full, {list(position_bias.shape)} numbers; "
            "topk_attention.convert(model, attention_k=...) reads it from its table instead",
            stacklevel=2,
        )
    settings = layer_settings(module)
    if (indices := kwargs.get("indices")) is not None:
        output = _attend_to_chosen(
            settings, query, key, value, attention_mask, indices, position_bias, scaling, dropout
        )
        return output.transpose(1, 2).contiguous(), None
    if settings.k is None and (position_bias is None or isinstance(position_bias, Tensor)):
        return _ordinary_attention(
            module, query, key, value, attention_mask, scaling, dropout, is_causal, position_bias, kwargs
        )
    if attention_mask is None:
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        window = kwargs.get("sliding_window")
        if window is not None and key.shape[2] > window:
            raise ValueError('attn_implementation="topk" got sliding_window= without a mask that applies it')
        output = _attend(settings, query, key, value, None, position_bias, causal, scaling, dropout)
    elif isinstance(attention_mask, CompactMask):
        output = _attend_compact(settings, query, key, value, attention_mask, position_bias, scaling, dropout)
    else:
        mask = _hide_lowest(attention_mask)
        output = _attend(settings, query, key, value, mask, position_bias, False, scaling, dropout)
    return output.transpose(1, 2).contiguous(), None


def _attend(
    settings: LayerSettings,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    position_bias: PositionBias,
    is_causal: bool,
    scaling: float | None,
    dropout: float,
) -> Tensor:
    if query.shape[0] != key.shape[0]:  # queries that the whole batch shares
        query = query.expand(key.shape[0], -1, -1, -1)
    if isinstance(position_bias, TableBias):
        bias: Tensor | Bias | None = position_bias.at(query.shape[2], key.shape[2])
    else:
        bias = position_bias
    return topk_attention(
        query,
        key,
        value,
        k=settings.kept_keys,
        attn_mask=attn_mask,
        bias=bias,
        is_causal=is_causal,
        dropout_p=dropout,
        scale=scaling,
        enable_gqa=key.shape[1] != query.shape[1],
        backend=settings.backend,
    )


def _attend_compact(
    settings: LayerSettings,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: CompactMask,
    position_bias: PositionBias,
    scaling: float | None,
    dropout: float,
) -> Tensor:
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    if mask.mask_function is bidirectional_mask_function:
        return _attend(settings, query, key, value, mask.key_padding(), position_bias, False, scaling, dropout)
    if mask.mask_function is causal_mask_function and not _offset_is_unknown(mask):
        # A static cache has room for keys that are yet to come. Without them the last query sees the last key, which
        # is what is_causal means here, in prefill as in decoding.
        num_keys = int(mask.q_offset) + mask.q_length - mask.kv_offset
        padding = mask.key_padding()
        key, value = key[:, :, :num_keys], value[:, :, :num_keys]
        padding = None if padding is None else padding[..., :num_keys]
        if isinstance(position_bias, Tensor):
            position_bias = position_bias[..., :num_keys]
        return _attend(settings, query, key, value, padding, position_bias, True, scaling, dropout)
    return _attend_in_mask_chunks(settings, query, key, value, mask.dense, position_bias, scaling, dropout)


def _attend_to_chosen(
    settings: LayerSettings,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: CompactMask | Tensor | None,
    indices: Tensor,
    position_bias: PositionBias,
    scaling: float | None,
    dropout: float,
) -> Tensor:
    """Attend to keys that the model's own selector chose, as far as the mask shows them; with a k below their number to
    the k best of these.

    indices [B, N, K] int, for all heads; negative ones choose nothing
    """
    if attention_mask is None:
        raise ValueError("indices= needs an attention mask: it alone tells which of the chosen keys a query may see")
    num_keys = key.shape[2]
    k, num_chosen = settings.kept_keys, indices.shape[-1]
    if isinstance(k, tuple):
        settings = replace(settings, k=tuple(min(one, num_chosen) for one in k))
    else:
        settings = replace(settings, k=num_chosen if k is None else min(k, num_chosen))

    def chosen_and_visible(queries: range | None = None) -> Tensor:
        part = slice(None) if queries is None else slice(queries.start, queries.stop)
        chosen = indices[:, part].long()
        # One column more takes what chooses nothing.
        mask = torch.zeros(*chosen.shape[:2], num_keys + 1, dtype=torch.bool, device=chosen.device)
        mask = mask.scatter(-1, torch.where(chosen < 0, num_keys, chosen), True)[:, None, :, :num_keys]
        if isinstance(attention_mask, CompactMask):
            return attention_mask.dense(queries) & mask
        visible = _hide_lowest(attention_mask[:, :, part])
        return visible & mask if visible.dtype == torch.bool else visible.masked_fill(~mask, -torch.inf)

    return _attend_in_mask_chunks(settings, query, key, value, chosen_and_visible, position_bias, scaling, dropout)


def _offset_is_unknown(mask: CompactMask) -> bool:
    """A static cache counts in a tensor, whose value compiled code cannot read."""
    return isinstance(mask.q_offset, Tensor) and torch.compiler.is_compiling()


def _attend_in_mask_chunks(
    settings: LayerSettings,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask_of: Callable[[range | None], Tensor],
    position_bias: PositionBias,
    scaling: float | None,
    dropout: float,
) -> Tensor:
    """Any mask pattern (sliding windows, packed sequences, custom ones), written out one chunk of queries at a time.

    With gradients each chunk is a checkpoint where the backward pass would otherwise keep its part of the mask.
    """
    num_queries, num_keys = query.shape[2], key.shape[2]
    k = settings.kept_keys
    smallest_k = k if isinstance(k, int) else min(k or (num_keys,))
    backward_needs_mask = torch.is_grad_enabled() and smallest_k >= num_keys
    if num_queries <= _MASK_CHUNK and not backward_needs_mask:
        # One chunk, without a loop: compiled code then serves every such length.
        return _attend(settings, query, key, value, mask_of(None), position_bias, False, scaling, dropout)

    def attend(start: int) -> Tensor:
        queries = range(start, min(start + _MASK_CHUNK, num_queries))
        part = slice(queries.start, queries.stop)
        bias = position_bias
        if isinstance(bias, TableBias):
            bias = bias.from_query(start)
        elif bias is not None and bias.shape[2] != 1:
            bias = bias[:, :, part]
        return _attend(settings, query[:, :, part], key, value, mask_of(queries), bias, False, scaling, dropout)

    starts = range(0, num_queries, _MASK_CHUNK)
    if backward_needs_mask:
        return torch.cat([checkpoint(attend, start, use_reentrant=False) for start in starts], dim=2)
    return torch.cat([attend(start) for start in starts], dim=2)


def _ordinary_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: CompactMask | Tensor | None,
    scaling: float | None,
    dropout: float,
    is_causal: bool | None,
    position_bias: Tensor | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, None]:
    """PyTorch's own attention, for layers that `convert(where=...)` left out."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    if isinstance(attention_mask, CompactMask):
        compact = attention_mask
        plain = compact.key_padding() is None
        if plain and compact.mask_function is bidirectional_mask_function:
            attention_mask, is_causal = None, False
        elif (
            plain
            and compact.mask_function is causal_mask_function
            and not isinstance(compact.q_offset, Tensor)
            and compact.q_offset == 0
            and compact.q_length == compact.kv_length
        ):
            attention_mask, is_causal = None, True
        else:
            attention_mask = compact.dense()
    return sdpa_attention_forward(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=dropout,
        scaling=scaling,
        is_causal=is_causal,
        position_bias=position_bias,
        **kwargs,
    )


def _hide_lowest(mask: Tensor) -> Tensor:
    """transformers writes the lowest finite number where it means "hidden"; such a key must not be chosen."""
    if not mask.is_floating_point():
        return mask
    return mask.masked_fill(mask <= torch.finfo(mask.dtype).min, -torch.inf)
