"""One query that keeps every visible key, as in decoding: two dense products.

Only "auto" comes here. The scores of one query are as many numbers as there are keys, so all of them may exist, and
one look at them finds NaN and inf in the keys without reading the keys again.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .calls import AttentionCall, accumulation_dtype


def obstacle(call: AttentionCall) -> str | None:
    """Why this would not do for a call that keeps every visible key, None where it does."""
    if call.query.shape[2] != 1:
        return "there are several queries"
    if call.return_selection:
        return "it returns no selection"
    if torch.compiler.is_compiling():
        return "compiled code cannot look at the scores"
    if call.query.device.type != "cpu":
        return "not tried on this device"
    if call.dropout_p > 0:
        return "it drops nothing"
    if call.query.dtype != accumulation_dtype(call.query.dtype):
        return "its scores would be rounded to half precision"
    if 0 in (*call.query.shape, *call.key.shape, *call.value.shape):
        return "there is nothing to compute"
    if not (_is_stack_of_matrices(call.key) and _is_stack_of_matrices(call.value)):
        return "keys and values would be copied"
    return None


def _is_stack_of_matrices(tensor: Tensor) -> bool:
    """Whether batch and heads are one axis in memory, and rows are whole."""
    batch, num_heads, _, size = tensor.shape
    return (batch == 1 or num_heads == 1 or tensor.stride(0) == num_heads * tensor.stride(1)) and (
        size == 1 or tensor.stride(3) == 1
    )


def attention(call: AttentionCall) -> Tensor | None:
    """Returns [B, H, 1, E], or None where NaN, inf or a query without keys asks for a closer look."""
    batch, num_heads, _, head_dim = call.query.shape
    num_key_heads, num_keys = call.key.shape[1:3]
    # The query heads of one key head are the rows of one product.
    query = call.query.reshape(batch * num_key_heads, num_heads // num_key_heads, head_dim)
    scores = torch.bmm(query * call.scale, call.key.flatten(0, 1).mT)
    # Before keys are hidden: a score of a key with NaN or inf is not finite, whatever the query.
    total = scores.detach().sum()
    scores = scores.view(batch, num_heads, 1, num_keys)
    if call.bias is not None:
        scores = scores + call.bias.to(scores.dtype)
    if call.relative_bias is not None:
        scores = scores + call.relative_bias.to(scores.dtype)[:, None]
    if call.attn_mask is not None:
        if call.attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~call.attn_mask, -torch.inf)
        else:
            scores = scores + call.attn_mask.to(scores.dtype)
    weights = scores.softmax(-1).view(batch * num_key_heads, num_heads // num_key_heads, num_keys)
    output = torch.bmm(weights, call.value.flatten(0, 1))
    if not math.isfinite((total + output.detach().sum()).item()):
        return None
    return output.view(batch, num_heads, 1, call.value.shape[3])
