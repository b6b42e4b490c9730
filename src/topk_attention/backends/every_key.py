"""Attention of several queries over every visible key, for "auto": one operator that takes PyTorch's attention where
its result is right to the last edge, and `chunked` where NaN or inf in a key or value would spread to queries that may
not look there.

An operator, because which of the two it is depends on the numbers, at which compiled code cannot look.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import sdpa
from .calls import AttentionCall, accumulation_dtype, empty_output


def attention(call: AttentionCall) -> Tensor:
    """Returns [B, H, N, E]."""
    needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (call.query, call.key, call.value))
    # Without gradients and outside of compiled code the operator's wrapping does nothing but cost 60 us.
    run = every_key_op if needs_gradient or torch.compiler.is_compiling() else _every_key
    output, _, _ = run(
        call.query, call.key, call.value, call.attn_mask, call.is_causal, call.scale, call.query_chunk_size
    )
    return output


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
    # Where every query sees every key, PyTorch's lets NaN in values go where it belongs.
    looked_at = (query, key, value) if sdpa.hides_keys(query, attn_mask, is_causal) else (query, key)
    if all(map(_is_finite, looked_at)):
        output, log_sums = sdpa.forward(query, key, value, attn_mask, is_causal, scale)
        return output, log_sums.unsqueeze(3), torch.tensor(True)
    from .chunked.full_attention import full_attention_op

    output, log_sums = full_attention_op(
        query, key, value, attn_mask, None, None, None, is_causal, scale, 0.0, query_chunk_size
    )
    return output, log_sums, torch.tensor(False)


def _is_finite(tensor: Tensor) -> bool:
    # A finite sum proves that every element is; one that overflows costs the faster path, nothing else.
    return bool(tensor.sum(dtype=accumulation_dtype(tensor.dtype)).isfinite())


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
