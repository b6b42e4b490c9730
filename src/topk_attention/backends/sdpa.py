"""PyTorch's own attention, for calls that keep every visible key: there it computes the same, and faster.

Only "auto" comes here, and only where the result is the same to the last edge: NaN and inf in a key or value reach
nobody who may not look at it, and memory stays linear.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .calls import AttentionCall


def obstacle(call: AttentionCall) -> str | None:
    """Why PyTorch's attention would not do for this call, None where it does."""
    num_queries, num_keys = call.query.shape[2], call.key.shape[2]
    if call.head_k is not None and any(k < num_keys for k in call.head_k):
        return "k is smaller than the number of keys"
    if call.return_selection:
        return "it returns no selection"
    if call.query.device.type != "cpu":
        return "not tried on this device"
    if call.dropout_p > 0:
        return "with dropout it takes memory quadratic in length"
    if call.bias is not None or call.relative_bias is not None:
        return "with a bias it takes memory quadratic in length"
    if call.attn_mask is not None and call.attn_mask.dtype not in (torch.bool, call.query.dtype):
        return "it needs a float mask in the dtype of the query"
    if call.key.shape[3] != call.value.shape[3]:
        return "with values of another size than keys it takes memory quadratic in length"
    if _hides_the_future(call) and (num_queries != num_keys or call.attn_mask is not None):
        return "it aligns causal queries with the first key, and takes no mask beside"
    if any(x.stride(-1) != 1 for x in (call.query, call.key, call.value)):
        return "with strided rows it takes memory quadratic in length"
    if 0 in (*call.query.shape, *call.key.shape):
        return "there is nothing to compute"
    if torch.compiler.is_compiling() or not all(_is_finite(x) for x in (call.query, call.key, call.value)):
        return "NaN and inf in hidden keys would spread"
    return None


def _hides_the_future(call: AttentionCall) -> bool:
    """Not where the last query is the only one: it sees every key."""
    return call.is_causal and call.query.shape[2] > 1


def _is_finite(tensor: Tensor) -> bool:
    # A finite sum proves that every element is; one that overflows costs the faster path, nothing else.
    return bool(tensor.sum(dtype=torch.float64 if tensor.dtype == torch.float64 else torch.float32).isfinite())


def attention(call: AttentionCall) -> Tensor:
    """Returns [B, H, N, E]."""
    return F.scaled_dot_product_attention(
        call.query,
        call.key,
        call.value,
        attn_mask=call.attn_mask,
        is_causal=_hides_the_future(call),
        scale=call.scale,
        enable_gqa=call.query.shape[1] != call.key.shape[1],
    )
