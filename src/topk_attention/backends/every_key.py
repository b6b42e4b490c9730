"""Attention over every visible key, for "auto": PyTorch's attention where its result is right to the last edge, and
`chunked` where NaN or inf in a key or value would spread to queries that may not look there.

Which of the two it is depends on the numbers, at which compiled code cannot look: there an operator decides.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import sdpa
from .calls import AttentionCall, accumulation_dtype, empty_output


def attention(call: AttentionCall) -> Tensor:
    """Returns [B, H, N, E]."""
    if torch.compiler.is_compiling():
        if not sdpa.hides_keys(call.query, call.attn_mask, call.is_causal):
            return sdpa.attention(call)
    elif not (torch.is_grad_enabled() and any(x.requires_grad for x in (call.query, call.key, call.value))):
        return _without_gradient(call)
    elif sdpa.takes_one_call(call) and _are_finite(call.query, call.key, call.value):
        return sdpa.attention(call)
    return every_key_op(*_arguments(call))[0]


def _arguments(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor, Tensor | None, bool, float, int | None]:
    return call.query, call.key, call.value, call.attn_mask, call.is_causal, call.scale, call.query_chunk_size


def _without_gradient(call: AttentionCall) -> Tensor:
    # NaN and inf that PyTorch's attention meets show in its output, which is much smaller than a cache of keys. Where
    # none shows, none was met.
    if sdpa.takes_one_call(call):
        output = sdpa.attention(call)
    else:
        output, _ = sdpa.forward(call.query, call.key, call.value, call.attn_mask, call.is_causal, call.scale)
    return output if _are_finite(output) else _chunked(*_arguments(call))[0]


def _every_key(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    query_chunk_size: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns output [B, H, N, E], the logarithm of each row's softmax denominator, [B, H, N, 1], and whether it was
    PyTorch's attention, [] bool."""
    if _are_finite(query, key, value):
        output, log_sums = sdpa.forward(query, key, value, attn_mask, is_causal, scale)
        return output, log_sums.unsqueeze(3), torch.tensor(True)
    output, log_sums = _chunked(query, key, value, attn_mask, is_causal, scale, query_chunk_size)
    return output, log_sums, torch.tensor(False)


def _chunked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    query_chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    from .chunked.full_attention import full_attention_op

    return full_attention_op(query, key, value, attn_mask, None, None, None, is_causal, scale, 0.0, query_chunk_size)


def _are_finite(*tensors: Tensor) -> bool:
    # A finite sum proves that every element is; one that overflows costs the faster path, nothing else.
    return all(math.isfinite(x.sum(dtype=accumulation_dtype(x.dtype)).item()) for x in tensors)


every_key_op = torch.library.custom_op("topk_attention::every_key_attention", _every_key, mutates_args=())


@every_key_op.register_fake
def _(query, key, value, *options) -> tuple[Tensor, Tensor, Tensor]:
    return (
        empty_output(query, value),
        query.new_empty(*query.shape[:3], 1, dtype=accumulation_dtype(query.dtype)),
        query.new_empty((), dtype=torch.bool),
    )


@torch.library.custom_op("topk_attention::every_key_attention_backward", mutates_args=())
def every_key_backward_op(
    grad_output: Tensor,
    output: Tensor,
    log_sums: Tensor,
    is_pytorchs: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    query_chunk_size: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of query, key and value."""
    if is_pytorchs:
        return sdpa.backward(grad_output, output, log_sums.squeeze(3), query, key, value, attn_mask, is_causal, scale)
    from .chunked.full_attention import full_attention_backward_op

    nothing = (None, None, None)
    gradients = full_attention_backward_op(
        grad_output,
        output,
        log_sums,
        query,
        key,
        value,
        attn_mask,
        *nothing,
        is_causal,
        scale,
        0.0,
        query_chunk_size,
        *(True, True, True),
        [],
        [],
    )
    return gradients[:3]


@every_key_backward_op.register_fake
def _(grad_output, output, log_sums, is_pytorchs, query, key, value, *options):
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, is_causal, scale, query_chunk_size = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output, *tensors)
    ctx.options = (is_causal, scale, query_chunk_size)


def _backward(ctx, grad_output, *_):
    if grad_output is None:
        return (None,) * 7
    gradients = every_key_backward_op(grad_output, *ctx.saved_tensors, *ctx.options)
    return (*gradients, *(None,) * 4)


every_key_op.register_autograd(_backward, setup_context=_setup_context)
