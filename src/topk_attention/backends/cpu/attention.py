"""Top-k attention by the compiled kernels: the operators' shapes and gradients, and the entry point."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..calls import AttentionCall, accumulation_dtype, empty_output
from ..gradients import differentiate_attention, save_attention

_FORWARD = "topk_attention::cpu_attention_forward"
_BACKWARD = "topk_attention::cpu_attention_backward"
forward_op = torch.ops.topk_attention.cpu_attention_forward.default
backward_op = torch.ops.topk_attention.cpu_attention_backward.default


def attention(call: AttentionCall) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns output [B, H, N, E] and, where the call asks for them, indices [B, H, N, K] int32 and weights.

    For each query and head the kernels hold k entries of 8 bytes for the backward pass, also where k is the number of
    keys. Calls with k=None do not come here unless they ask for the selection.
    """
    num_keys = call.key.shape[2]
    head_k = call.head_k or (num_keys,) * call.query.shape[1]
    value = call.value
    if value.shape[3] == 0:  # the selection is wanted all the same
        value = F.pad(value, (0, 1))
    relative_bias = call.relative_bias
    if relative_bias is not None:
        relative_bias = relative_bias.to(accumulation_dtype(call.query.dtype))
    inputs = (call.query, call.key, call.value, call.bias, relative_bias)
    needs_gradient = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    output, indices, weights = forward_op(
        call.query,
        call.key,
        value,
        call.attn_mask,
        call.bias,
        relative_bias,
        call.seed,
        head_k,
        call.is_causal,
        call.scale,
        call.dropout_p,
        needs_gradient or call.return_selection,
    )
    output = output[..., : call.value.shape[3]]
    if not call.return_selection:
        return output, None, None
    return output, _padded(indices, call, head_k, -1), _padded(weights, call, head_k, 0)


def _padded(entries: Tensor, call: AttentionCall, head_k: Sequence[int], fill: int) -> Tensor:
    """Flat entries, [N, k] for each batch and head, as [B, H, N, K], K the largest k; unused slots hold `fill`."""
    batch, num_heads, num_queries, _ = call.query.shape
    largest = max((0, *head_k))
    if len(set(head_k)) <= 1:
        return entries.view(batch, num_heads, num_queries, largest)
    padded = entries.new_full((batch, num_heads, num_queries, largest), fill)
    heads = entries.view(batch, num_queries * sum(head_k)).split([k * num_queries for k in head_k], dim=1)
    for head, (k, of_head) in enumerate(zip(head_k, heads, strict=True)):
        padded[:, head, :, :k] = of_head.view(batch, num_queries, k)
    return padded


@torch.library.register_fake(_FORWARD)
def _(query, key, value, attn_mask, bias, relative_bias, seed, head_k, is_causal, scale, dropout_p, save_selection):
    num_entries = query.shape[0] * query.shape[2] * sum(head_k) if save_selection else 0
    return (
        empty_output(query, value),
        query.new_empty(num_entries, dtype=torch.int32),
        query.new_empty(num_entries, dtype=accumulation_dtype(query.dtype)),
    )


@torch.library.register_fake(_BACKWARD)
def _(grad_output, query, key, value, seed, indices, weights, head_k, scale, dropout_p, *wanted):
    query_wanted, key_wanted, value_wanted, bias_shape, relative_shape = wanted
    return (
        query.new_empty(query.shape if query_wanted else (0,)),
        key.new_empty(key.shape if key_wanted else (0,), dtype=weights.dtype),
        value.new_empty(value.shape if value_wanted else (0,), dtype=weights.dtype),
        query.new_empty(bias_shape or (0,), dtype=weights.dtype),
        query.new_empty(relative_shape or (0,), dtype=torch.float64),
    )


def _refuse_second_derivatives(ctx, *_):
    raise RuntimeError("the backward pass of topk_attention cannot be differentiated again")


torch.library.register_autograd(
    _FORWARD, differentiate_attention("cpu_attention_forward", backward_op), setup_context=save_attention
)
# Without this torch would warn and take the gradients for constants.
torch.library.register_autograd(_BACKWARD, _refuse_second_derivatives)
