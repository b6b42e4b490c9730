"""Attention of a layer whose model holds a part of each sequence: `topk_attention.distributed.sequence_parallel`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..functional.bias import Bias
from ..functional.shared_sequence import SharedSequence
from .masks import CompactMask
from .position_bias import TableBias


def attend_to_shared(
    shared: SharedSequence, module: nn.Module, call: Any, *, is_causal: bool, beside: dict[str, Any]
) -> Tensor:
    """The output [B, H, n, E] of this process's tokens.

    call       a `_LayerCall` of the attention function
    is_causal  of a call without a mask
    beside     arguments that only some models pass

    Raises:
        ValueError: the call asks for what the processes do not tell one another.
    """
    problem = _problem(call, beside)
    if problem is not None:
        raise ValueError(
            f"{type(module).__name__} cannot share a sequence with other processes (sequence_parallel): {problem}"
        )
    mask, padding = call.mask, None
    if isinstance(mask, CompactMask):
        is_causal, padding = mask.is_causal, mask.key_padding()
    bias: Bias | None = None if call.position_bias is None else call.position_bias.table
    query = call.query
    if query.shape[0] != call.key.shape[0]:  # queries that the whole batch shares
        query = query.expand(call.key.shape[0], -1, -1, -1)
    return shared.attend(
        query,
        call.key,
        call.value,
        k=call.settings.kept_keys,
        attn_mask=padding,
        bias=bias,
        is_causal=is_causal,
        dropout_p=call.dropout_p,
        scale=call.scale,
        enable_gqa=call.key.shape[1] != query.shape[1],
        sinks=call.sinks,
        softcap=call.softcap,
        completion=call.settings.completion,
        backend=call.settings.backend,
    )


def _problem(call: Any, beside: dict[str, Any]) -> str | None:
    mask, bias = call.mask, call.position_bias
    if isinstance(mask, CompactMask):
        if not (mask.is_causal or mask.is_bidirectional):
            return "its mask hides more than padding and later keys"
        if mask.kv_offset != 0 or not isinstance(mask.q_offset, int) or mask.q_offset != 0:
            return "it continues a cache; call the model with whole sequences and without past_key_values"
        if mask.is_causal and mask.q_length != mask.kv_length:
            return "it continues a cache; call the model with whole sequences and without past_key_values"
    elif mask is not None:
        return "its mask is a tensor for every query and key"
    elif beside.get("sliding_window") is not None:
        return "it has a sliding window"
    if beside.get("indices") is not None:
        return "the model chooses keys itself"
    if isinstance(bias, Tensor):
        return f"its bias is a tensor for every query and key, {list(bias.shape)}"
    if isinstance(bias, TableBias) and (not isinstance(bias.first_position, int) or bias.first_position != 0):
        return "it continues a cache; call the model with whole sequences and without past_key_values"
    return None
