"""PyTorch's own attention, for calls of full attention: it computes the same there, and faster.

Only "auto" chooses it. The calls pass through `full_attention`, which takes care of the one difference: PyTorch's lets
NaN and inf spread out of hidden keys. A mask that differs from query to query is written out for a few queries at a
time, so memory stays linear in length.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .calls import AttentionCall, accumulation_dtype, empty_output

# This function is not public. The backward pass of the public one takes no mask anew: it would keep every part's mask.
_NAME = "_scaled_dot_product_flash_attention_for_cpu"
_EXISTS = hasattr(torch.ops.aten, _NAME) and hasattr(torch.ops.aten, f"{_NAME}_backward")
# Bytes of a mask that is written out.
_MASK_BYTES = 4 * 2**20
# PyTorch's blocks have 32, 64 or 256 queries, larger ones for more queries. Parts with fewer queries get small blocks.
_FEWEST_QUERIES = 256


def obstacle(call: AttentionCall) -> str | None:
    """Why PyTorch's attention cannot compute this call, None where it can."""
    if not call.is_full_attention():
        return "k is smaller than the number of keys"
    if call.return_selection:
        return "it returns no selection"
    if call.query.device.type != "cpu":
        return "not tried on this device"
    if call.dropout_p > 0:
        return "with dropout it takes memory quadratic in length"
    if call.sinks is not None:
        return "it has no attention sinks"
    if call.softcap is not None:
        return "it has no soft cap"
    if call.bias is not None or call.relative_bias is not None:
        return "with a bias it takes memory quadratic in length"
    if call.attn_mask is not None and call.attn_mask.dtype not in (torch.bool, call.query.dtype):
        return "it needs a float mask in the dtype of the query"
    if call.key.shape[3] != call.value.shape[3]:
        return "with values of another size than keys it takes memory quadratic in length"
    if any(x.stride(-1) != 1 for x in (call.query, call.key, call.value)):
        return "with strided rows it takes memory quadratic in length"
    if 0 in (*call.query.shape, *call.key.shape):
        return "there is nothing to compute"
    if not _EXISTS:
        return "this version of PyTorch has none that can be called in parts"
    return None


def _hides_the_future(query: Tensor, is_causal: bool) -> bool:
    """Whether some query may not see some key by causality. A query that is the only one sees every key."""
    return is_causal and query.shape[2] > 1


def takes_one_call(call: AttentionCall) -> bool:
    """Whether PyTorch's public function can take the whole call.

    With is_causal it aligns the first query with the first key, and takes no mask.
    """
    if call.attn_mask is not None and call.attn_mask.shape[2] != 1:  # it would write the mask out in floats
        return False
    if not _hides_the_future(call.query, call.is_causal):
        return True
    return call.attn_mask is None and call.query.shape[2] == call.key.shape[2]


def attention(call: AttentionCall) -> Tensor:
    """Returns [B, H, N, E] of a call that takes one."""
    return F.scaled_dot_product_attention(
        call.query,
        call.key,
        call.value,
        attn_mask=call.attn_mask,
        is_causal=_hides_the_future(call.query, call.is_causal),
        scale=call.scale,
        enable_gqa=call.query.shape[1] != call.key.shape[1],
    )


def forward(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Returns output [B, H, N, E] and the logarithm of each row's softmax denominator, [B, H, N]."""
    attend = getattr(torch.ops.aten, _NAME).default
    output = empty_output(query, value)
    log_sums = query.new_empty(query.shape[:3], dtype=accumulation_dtype(query.dtype))
    for part in _parts(query, key, attn_mask, is_causal):
        output[:, :, part.queries], log_sums[:, :, part.queries] = attend(
            query[:, :, part.queries],
            key[:, :, : part.num_keys],
            value[:, :, : part.num_keys],
            0.0,
            part.is_causal,
            attn_mask=part.attn_mask,
            scale=scale,
        )
    return output, log_sums


def backward(
    grad_output: Tensor,
    output: Tensor,
    log_sums: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of query, key and value."""
    differentiate = getattr(torch.ops.aten, f"{_NAME}_backward").default
    dtype = accumulation_dtype(query.dtype)
    grad_query = torch.empty_like(query)
    grad_key, grad_value = torch.zeros_like(key, dtype=dtype), torch.zeros_like(value, dtype=dtype)
    for part in _parts(query, key, attn_mask, is_causal):
        part_grad_query, part_grad_key, part_grad_value = differentiate(
            grad_output[:, :, part.queries],
            query[:, :, part.queries],
            key[:, :, : part.num_keys],
            value[:, :, : part.num_keys],
            output[:, :, part.queries],
            log_sums[:, :, part.queries],
            0.0,
            part.is_causal,
            attn_mask=part.attn_mask,
            scale=scale,
        )
        grad_query[:, :, part.queries] = part_grad_query
        grad_key[:, :, : part.num_keys] += part_grad_key
        grad_value[:, :, : part.num_keys] += part_grad_value
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


class _Part(NamedTuple):
    """Queries that PyTorch computes in one call, and the keys that some of them see."""

    queries: slice
    num_keys: int
    attn_mask: Tensor | None  # [B|1, H|1, n|1, m|1], added to the scores
    is_causal: bool  # query i of the part sees keys up to the i-th


def _parts(query: Tensor, key: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Iterator[_Part]:
    num_queries, num_keys = query.shape[2], key.shape[2]
    hides_the_future = _hides_the_future(query, is_causal)
    all_queries = slice(0, num_queries)
    if hides_the_future and attn_mask is None and num_queries == num_keys:
        yield _Part(all_queries, num_keys, None, True)
    elif not hides_the_future and (attn_mask is None or attn_mask.shape[2] == 1):
        yield _Part(all_queries, num_keys, None if attn_mask is None else _additive(attn_mask, query.dtype), False)
    else:
        num_masks = 1 if attn_mask is None else attn_mask.shape[0] * attn_mask.shape[1]
        size = max(_MASK_BYTES // (num_masks * num_keys * query.element_size()), _FEWEST_QUERIES)
        for start in range(0, num_queries, size):
            queries = range(start, min(start + size, num_queries))
            mask = _mask_of(queries, num_queries, num_keys, attn_mask, hides_the_future, query.device)
            yield _Part(slice(queries.start, queries.stop), mask.shape[3], _additive(mask, query.dtype), False)


def _mask_of(
    queries: range, num_queries: int, num_keys: int, attn_mask: Tensor | None, is_causal: bool, device: torch.device
) -> Tensor:
    """The mask of a range of queries, [B|1, H|1, n, m], with causality, and without keys that none of them sees."""
    last_key_of_first_query = queries.start + num_keys - num_queries
    num_visible = max(1, last_key_of_first_query + len(queries)) if is_causal else num_keys
    if attn_mask is None:
        attn_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
    if attn_mask.shape[2] != 1:
        attn_mask = attn_mask[:, :, queries.start : queries.stop]
    attn_mask = attn_mask[..., :num_visible].expand(-1, -1, len(queries), num_visible)
    if not is_causal:
        return attn_mask
    last_keys = torch.arange(len(queries), device=device).unsqueeze(1) + last_key_of_first_query
    is_future = torch.arange(num_visible, device=device) > last_keys
    return attn_mask.masked_fill(is_future, False if attn_mask.dtype == torch.bool else -torch.inf)


def _additive(attn_mask: Tensor, dtype: torch.dtype) -> Tensor:
    if attn_mask.dtype != torch.bool:
        return attn_mask
    return torch.zeros(attn_mask.shape, dtype=dtype, device=attn_mask.device).masked_fill_(~attn_mask, -torch.inf)
