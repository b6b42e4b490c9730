"""The attention function that transformers calls for `attn_implementation="topk"`."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..functional import Completion, KeySums, topk_attention
from ..functional.shared_sequence import shared_sequence
from .cache_in_graph import layer_in_graph, layer_of
from .cached_index import index_of_cached
from .cached_sums import sums_of_cached
from .masks import CompactMask
from .position_bias import Bias, NoBias, TableBias, computes_bias, keeps_bias_small
from .settings import LayerSettings, layer_settings, left_alone
from .shared_sequence import attend_to_shared
from .tensor_parallel import of_own_heads

# Arguments that change what attention computes. To ignore one would silently change results.
_UNSUPPORTED = {
    "block_indices": "key blocks chosen by the model's own selector",
    "cache": "a paged cache",
}
# Queries per mask tile, for masks that are neither causal nor full.
_MASK_CHUNK = 512


@dataclass(frozen=True, eq=False)
class _LayerCall:
    """One call of a layer's attention, as transformers passes it.

    B batch, H heads, G key heads, N queries, M keys

    query          [B, H, N, D]
    key            [B, G, M, D]
    value          [B, G, M, E]
    position_bias  [1|B, H, N, M], or the table that it is made from
    sinks          [H]
    """

    settings: LayerSettings
    query: Tensor
    key: Tensor
    value: Tensor
    mask: CompactMask | Tensor | None
    position_bias: Tensor | TableBias | None
    scale: float | None
    dropout_p: float
    sinks: Tensor | None = None
    softcap: float | None = None

    def is_plain(self) -> bool:
        """Whether PyTorch's attention computes the softmax of these scores."""
        has_table = self.position_bias is not None and not isinstance(self.position_bias, Tensor)
        return not has_table and self.sinks is None and self.softcap is None

    def of_first_keys(self, num_keys: int) -> _LayerCall:
        """The same call with its first keys alone; the mask stays as it is."""
        if num_keys == self.key.shape[2]:
            return self  # with the sums that hang on this very key tensor
        bias = self.position_bias[..., :num_keys] if isinstance(self.position_bias, Tensor) else self.position_bias
        return replace(self, key=self.key[:, :, :num_keys], value=self.value[:, :, :num_keys], position_bias=bias)

    def of_queries(self, queries: range) -> _LayerCall:
        """The same call for a range of its queries; the mask stays as it is."""
        part = slice(queries.start, queries.stop)
        bias = self.position_bias
        if isinstance(bias, TableBias):
            bias = bias.from_query(queries.start)
        elif bias is not None and bias.shape[2] != 1:
            bias = bias[:, :, part]
        return replace(self, query=self.query[:, :, part], position_bias=bias)


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
    position_bias: Tensor | TableBias | NoBias | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention with the arguments that transformers v5 passes.

    B batch, H heads, G key heads, N queries, M keys

    query          [B, H, N, D]
    key            [B, G, M, D]
    value          [B, G, M, E]
    position_bias  [1|B, H, N, M], or the table that it is made from
    s_aux          [H], attention sinks
    sinks          [B, H, N, 1], attention sinks that differ from query to query (Inkling 2)

    Returns output [B, N, H, E] and None in place of weights; weights come from a layer left on its own attention.

    Raises:
        ValueError: an argument asks for what top-k attention does not compute.
    """
    shared = shared_sequence(module)
    if (own := left_alone(module)) is not None:
        if shared is not None:
            raise ValueError(
                f"{type(module).__name__} cannot share a sequence with other processes (sequence_parallel): it was not "
                "converted"
            )
        call = _LayerCall(LayerSettings(None), query, key, value, attention_mask, None, scaling, dropout)
        beside: dict[str, Any] = {"is_causal": is_causal, "position_bias": position_bias, "softcap": softcap}
        beside |= {"s_aux": s_aux, "sinks": sinks}
        return _own_attention(own, module, call, kwargs | beside)
    for name, meaning in _UNSUPPORTED.items():
        if kwargs.get(name) is not None:
            raise ValueError(f'attn_implementation="topk" does not support {name}= ({meaning}); use "eager"')
    if kwargs.get("output_attentions"):
        warnings.warn('attn_implementation="topk" returns no attention weights; use "eager" for them', stacklevel=2)
    if isinstance(position_bias, Tensor) and computes_bias(module) and not keeps_bias_small(module):
        warnings.warn(
            f"{type(module).__name__} computes its position bias in full, {list(position_bias.shape)} numbers; "
            "topk_attention.convert(model, attention_k=...) reads it from its table instead",
            stacklevel=2,
        )
    settings = _of_own_heads(module, layer_settings(module), query.shape[1])
    bias = None if isinstance(position_bias, NoBias) else position_bias
    call = _LayerCall(settings, query, key, value, attention_mask, bias, scaling, dropout, s_aux, softcap)
    if sinks is not None:
        call = _with_sinks_of_queries(call, sinks)
    if shared is not None:
        causal = _is_causal(module, is_causal)
        output = attend_to_shared(shared, module, call, is_causal=causal, beside=kwargs)
    elif (indices := kwargs.get("indices")) is not None:
        output = _attend_to_chosen(call, indices)
    elif (layer := layer_in_graph(key, value)) is not None and _is_left_to_operator(call):
        return _attend_in_graph(layer, call), None
    elif settings.k is None and call.is_plain():
        return _full_attention(call, module, is_causal, kwargs)
    elif attention_mask is None:
        window = kwargs.get("sliding_window")
        if window is not None and key.shape[2] > window:
            raise ValueError('attn_implementation="topk" got sliding_window= without a mask that applies it')
        output = _attend(call, is_causal=_is_causal(module, is_causal))
    elif isinstance(attention_mask, CompactMask):
        output = _attend_compact(call, attention_mask)
    elif attention_mask.requires_grad:  # a learned bias: a mask would get no gradient
        output = _attend(_with_learned_mask(call, attention_mask))
    else:
        output = _attend(call, _hide_lowest(attention_mask))
    return output.transpose(1, 2).contiguous(), None


def _is_causal(module: nn.Module, is_causal: bool | None) -> bool:
    """Whether attention without a mask is causal: as the model's call says, or else its layer.

    Of the two attentions of a model only PyTorch's reads what the layer says. The models of families that have eager
    attention alone say True as well where every key is seen (BridgeTower).
    """
    if is_causal is not None:
        return is_causal
    return bool(getattr(module, "is_causal", True)) and not _is_eager_alone(type(module).__module__)


@torch.compiler.assume_constant_result
def _is_eager_alone(modeling: str) -> bool:
    """Whether none of the models of the Python module with this name supports PyTorch's attention."""
    return _has_no_model_with_sdpa(modeling)


@cache
def _has_no_model_with_sdpa(modeling: str) -> bool:
    from transformers import PreTrainedModel

    found: Any = list(vars(sys.modules[modeling]).values()) if modeling in sys.modules else []
    models = [x for x in found if isinstance(x, type) and issubclass(x, PreTrainedModel) and x.__module__ == modeling]
    return bool(models) and not any(getattr(model, "_supports_sdpa", False) for model in models)


def _of_own_heads(module: nn.Module, settings: LayerSettings, num_heads: int) -> LayerSettings:
    if isinstance(settings.k, tuple):
        settings = replace(settings, k=of_own_heads(module, settings.k, num_heads))
    completion = settings.completion
    if completion is not None and isinstance(completion.mass_scale, tuple):
        scales = of_own_heads(module, completion.mass_scale, num_heads)
        if scales is not completion.mass_scale:
            settings = replace(settings, completion=replace(completion, mass_scale=scales))
    return settings


def _attend(call: _LayerCall, attn_mask: Tensor | None = None, *, is_causal: bool = False) -> Tensor:
    """Top-k attention with this mask in place of the call's own; returns [B, H, N, E]."""
    query, key, bias = call.query, call.key, call.position_bias
    if query.shape[0] != key.shape[0]:  # queries that the whole batch shares
        query = query.expand(key.shape[0], -1, -1, -1)
    bias_of_call: Tensor | Bias | None
    bias_of_call = bias.at(query.shape[2], key.shape[2]) if isinstance(bias, TableBias) else bias
    return topk_attention(
        query,
        key,
        call.value,
        k=call.settings.kept_keys,
        attn_mask=attn_mask,
        bias=bias_of_call,
        is_causal=is_causal,
        dropout_p=call.dropout_p,
        scale=call.scale,
        enable_gqa=key.shape[1] != query.shape[1],
        sinks=call.sinks,
        softcap=call.softcap,
        backend=call.settings.backend,
        completion=call.settings.completion,
        key_sums=_sums(call, attn_mask, is_causal),
        key_index=index_of_cached(query, key, call.settings.kept_keys, call.settings.backend),
    )


def _sums(call: _LayerCall, attn_mask: Tensor | None, is_causal: bool) -> KeySums | None:
    """Sums that are kept beside a cache, for a call in which all queries see the same keys."""
    completion, k, num_keys = call.settings.completion, call.settings.kept_keys, call.key.shape[2]
    if completion is None or k is None or (k if isinstance(k, int) else min(k)) >= num_keys:
        return None
    if isinstance(call.position_bias, Tensor) or (is_causal and call.query.shape[2] > 1):
        return None  # a bias may hide keys
    if attn_mask is None:
        return sums_of_cached(call.key, call.value, completion)
    if call.position_bias is not None or attn_mask.dtype != torch.bool or attn_mask.shape[1:3] != (1, 1):
        return None
    return sums_of_cached(call.key, call.value, completion, attn_mask[:, 0, 0])


def _with_learned_mask(call: _LayerCall, mask: Tensor) -> _LayerCall:
    """The call with a mask of numbers, [B|1, H|1, N|1, M], as (part of) its bias."""
    if isinstance(call.position_bias, TableBias):
        raise ValueError(
            "attention_mask requires a gradient, which a layer with a table of position biases does not give it; "
            "detach the mask, or train with topk_attention.unconvert(model)"
        )
    bias = _hide_lowest(mask)
    return replace(call, position_bias=bias if call.position_bias is None else bias + call.position_bias)


def _with_sinks_of_queries(call: _LayerCall, sinks: Tensor) -> _LayerCall:
    """The call with a sink of 0 for every head, and as much less on the scores of each query as its own sink is.

    A softmax sees differences alone, so this is the same; which keys are best stays the same too, and the sinks get
    their gradient as a bias does.

    sinks  [B, H, N, 1]
    """
    query, bias = call.query, call.position_bias
    if sinks.shape != (*query.shape[:3], 1) or isinstance(bias, TableBias) or call.sinks is not None or call.softcap:
        raise ValueError(
            f"sinks must have shape {[*query.shape[:3], 1]}, one for each query and head, beside no other sinks, no "
            f'soft cap and no table of biases, got {list(sinks.shape)}; use attn_implementation="eager"'
        )
    less = -sinks.to(query.dtype)
    return replace(call, position_bias=less if bias is None else bias + less, sinks=query.new_zeros(query.shape[1]))


def _attend_compact(call: _LayerCall, mask: CompactMask) -> Tensor:
    if mask.is_bidirectional:
        return _attend(call, mask.key_padding())
    if mask.is_causal and not _offset_is_unknown(mask):
        # A static cache has room for future keys. Without them the last query sees the last key. That is what is_causal
        # means in topk_attention, for a prompt as for the tokens that follow it.
        num_keys = int(mask.q_offset) + mask.q_length - mask.kv_offset
        padding = mask.key_padding()
        padding = None if padding is None else padding[..., :num_keys]
        return _attend(call.of_first_keys(num_keys), padding, is_causal=True)
    return _attend_in_mask_chunks(call, mask.dense)


_library = torch.library.Library("topk_attention", "FRAGMENT")
_library.define(
    "cache_attend(Tensor handle, Tensor query, SymInt num_keys, SymInt value_size, Tensor? padding, bool is_causal, "
    "SymInt q_offset, SymInt kv_length, int[] head_k, float? scale, str backend, float[]? completion) -> Tensor",
    tags=torch.Tag.cudagraph_unsafe,
)


def _is_left_to_operator(call: _LayerCall) -> bool:
    """Whether attention to what a cache layer holds, in compiled code, takes nothing but this layer and the padding."""
    mask = call.mask
    return (
        isinstance(mask, CompactMask)
        and call.settings.kept_keys is not None
        and call.position_bias is None
        and call.sinks is None
        and call.softcap is None
        and call.dropout_p == 0
        and call.query.shape[0] == call.key.shape[0]
        and call.query.dtype == call.key.dtype
        and not isinstance(mask.q_offset, Tensor)
        and mask.kv_offset == 0
        and (mask.is_bidirectional or mask.is_causal)
    )


def _attend_in_graph(layer: Any, call: _LayerCall) -> Tensor:
    """Attention to what a layer of a cache holds once compiled code has come to here; returns [B, N, H, E]."""
    k, completion, mask = call.settings.kept_keys, call.settings.completion, call.mask
    assert isinstance(mask, CompactMask)
    head_k = [k] if isinstance(k, int) else list(k or ())
    numbers: list[float] | None = None
    if completion is not None:
        scales = completion.mass_scale
        numbers = [completion.lift, *(scales if isinstance(scales, tuple) else (scales,))]
    return torch.ops.topk_attention.cache_attend(
        layer._handle,
        call.query,
        *(call.key.shape[2], call.value.shape[3]),
        mask.padding,
        mask.is_causal,
        mask.q_offset,
        mask.kv_length,
        head_k,
        call.scale,
        call.settings.backend,
        numbers,
    )


def _attend_to_layer(
    handle: Tensor,
    query: Tensor,
    num_keys: int,
    value_size: int,
    padding: Tensor | None,
    is_causal: bool,
    q_offset: int,
    kv_length: int,
    head_k: list[int],
    scale: float | None,
    backend: str,
    completion: list[float] | None,
) -> Tensor:
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    del value_size
    layer = layer_of(handle)
    key, value = layer.keys, layer.values
    if key.shape[2] != num_keys:  # code that ran on before it attended to these
        key, value = key[:, :, :num_keys], value[:, :, :num_keys]
    completed = None
    if completion is not None:
        lift, *scales = completion
        completed = Completion(scales[0] if len(scales) == 1 else tuple(scales), lift)
    settings = LayerSettings(head_k[0] if len(head_k) == 1 else tuple(head_k), backend, completion=completed)
    function = causal_mask_function if is_causal else bidirectional_mask_function
    mask = CompactMask(len(query), query.shape[2], kv_length, q_offset, 0, function, padding, False, query.device)
    output = _attend_compact(_LayerCall(settings, query, key, value, mask, None, scale, 0.0), mask)
    return output.transpose(1, 2).contiguous()


_library.impl("cache_attend", _attend_to_layer, "CompositeExplicitAutograd")


@torch.library.register_fake("topk_attention::cache_attend")
def _(handle, query, num_keys, value_size, *_):
    batch_size, num_heads, num_queries = query.shape[:3]
    return query.new_empty(batch_size, num_queries, num_heads, value_size)


def _attend_to_chosen(call: _LayerCall, indices: Tensor) -> Tensor:
    """Attend to keys that the model's own selector chose and that the mask does not hide. If k is smaller than their
    number, only the k best of them count.

    indices  [B, N, K] int, for all heads; a negative one chooses nothing
    """
    mask = call.mask
    if mask is None:
        raise ValueError("indices= needs an attention mask: it alone tells which of the chosen keys a query may see")
    num_keys = call.key.shape[2]
    k, num_chosen = call.settings.kept_keys, indices.shape[-1]
    if isinstance(k, tuple):
        k = tuple(min(k_of_head, num_chosen) for k_of_head in k)
    else:
        k = num_chosen if k is None else min(k, num_chosen)

    def chosen_and_visible(queries: range | None = None) -> Tensor:
        part = slice(None) if queries is None else slice(queries.start, queries.stop)
        chosen = indices[:, part].long()
        # Indices that choose nothing go to one more column, which is then cut off.
        is_chosen = torch.zeros(*chosen.shape[:2], num_keys + 1, dtype=torch.bool, device=chosen.device)
        is_chosen = is_chosen.scatter(-1, torch.where(chosen < 0, num_keys, chosen), True)[:, None, :, :num_keys]
        if isinstance(mask, CompactMask):
            return mask.dense(queries) & is_chosen
        visible = _hide_lowest(mask[:, :, part])
        return visible & is_chosen if visible.dtype == torch.bool else visible.masked_fill(~is_chosen, -torch.inf)

    return _attend_in_mask_chunks(replace(call, settings=replace(call.settings, k=k)), chosen_and_visible)


def _offset_is_unknown(mask: CompactMask) -> bool:
    """A static cache counts in a tensor, whose value compiled code cannot read."""
    return isinstance(mask.q_offset, Tensor) and torch.compiler.is_compiling()


def _attend_in_mask_chunks(call: _LayerCall, mask_of: Callable[[range | None], Tensor]) -> Tensor:
    """Attention with any mask (sliding windows, packed sequences, custom ones), written out for one chunk of queries at
    a time.

    mask_of  the mask of a range of queries, or of all of them

    Where the backward pass would keep each chunk's part of the mask, the chunks are checkpoints instead. An exported
    program serves many lengths and a loop would fix the number of chunks, so its mask is written out whole.
    """
    if torch.compiler.is_exporting():
        return _attend(call, mask_of(None))
    num_queries, num_keys = call.query.shape[2], call.key.shape[2]
    k = call.settings.kept_keys
    smallest_k = k if isinstance(k, int) else min(k or (num_keys,))
    # Of top-k attention alone the backward pass reads which keys were kept; completion reaches all that the mask shows.
    completion = call.settings.completion
    backward_needs_mask = torch.is_grad_enabled() and (smallest_k >= num_keys or completion is not None)
    if num_queries <= _MASK_CHUNK and not backward_needs_mask:
        # One chunk, without a loop: compiled code then serves every such length.
        return _attend(call, mask_of(None))

    def attend(start: int) -> Tensor:
        queries = range(start, min(start + _MASK_CHUNK, num_queries))
        return _attend(call.of_queries(queries), mask_of(queries))

    starts = range(0, num_queries, _MASK_CHUNK)
    if backward_needs_mask:
        return torch.cat([checkpoint(attend, start, use_reentrant=False) for start in starts], dim=2)
    return torch.cat([attend(start) for start in starts], dim=2)


def _full_attention(
    call: _LayerCall, module: nn.Module, is_causal: bool | None, kwargs: dict[str, Any]
) -> tuple[Tensor, None]:
    """PyTorch's own attention, for layers that `convert(where=...)` did not pick; returns [B, N, H, E]."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    attention_mask = call.mask
    if attention_mask is None:
        is_causal = _is_causal(module, is_causal)
    elif isinstance(attention_mask, CompactMask):
        compact = attention_mask
        is_unpadded = compact.key_padding() is None
        if is_unpadded and compact.is_bidirectional:
            attention_mask, is_causal = None, False
        elif (
            is_unpadded
            and compact.is_causal
            and not isinstance(compact.q_offset, Tensor)
            and compact.q_offset == 0
            and compact.q_length == compact.kv_length
        ):
            attention_mask, is_causal = None, True
        else:
            attention_mask = compact.dense()
    return sdpa_attention_forward(
        module,
        call.query,
        call.key,
        call.value,
        attention_mask,
        dropout=call.dropout_p,
        scaling=call.scale,
        is_causal=is_causal,
        position_bias=call.position_bias,
        **kwargs,
    )


def _own_attention(
    implementation: str, module: nn.Module, call: _LayerCall, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """What the layer computed before the conversion, for a layer with a feature that top-k attention lacks. Its model
    makes masks for top-k attention, because other layers share its configuration."""
    from transformers import AttentionInterface

    mask: CompactMask | Tensor | None = call.mask
    own_eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    function = AttentionInterface().get_interface(implementation, own_eager)
    if isinstance(mask, CompactMask):
        mask = mask.dense() if implementation == "sdpa" else mask.additive(call.query.dtype)
    arguments = {name: value for name, value in kwargs.items() if value is not None}
    return function(
        module, call.query, call.key, call.value, mask, scaling=call.scale, dropout=call.dropout_p, **arguments
    )


def _hide_lowest(mask: Tensor) -> Tensor:
    """transformers marks hidden keys with the lowest finite number. Such a key must never be chosen, so write -inf."""
    if not mask.is_floating_point():
        return mask
    return mask.masked_fill(mask <= torch.finfo(mask.dtype).min, -torch.inf)
