"""Full attention, over every visible key, for "auto": PyTorch's own attention where its result is right everywhere,
and `chunked` where NaN or inf in a key or value would spread to queries that may not see it.

The numbers themselves decide between the two. Compiled code and `torch.vmap` cannot read numbers, so an operator
decides for them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from . import sdpa
from .calls import AttentionCall, accumulation_dtype, empty_output
from .chunked import full_attention as chunked
from .operators import (
    AttentionGradients,
    FullInputs,
    differentiate_full_attention,
    empty_attention_gradients,
    needs_gradient,
    once_differentiable,
    refuse_second_derivatives,
    save_full_attention,
)


def attention(call: AttentionCall) -> Tensor:
    """Returns [B, H, N, E]. The call has no bias and no dropout; `sdpa.obstacle` is None for it."""
    if torch.compiler.is_compiling() or any(map(_is_batched, (call.query, call.key, call.value))):
        return full_attention_op(*FullInputs.of(call))[0]
    if not needs_gradient(call.query, call.key, call.value):
        return _without_gradient(call)
    if sdpa.takes_one_call(call) and _are_finite(call.query, call.key, call.value):
        query, key, value = once_differentiable(call.query, call.key, call.value)
        return sdpa.attention(replace(call, query=query, key=key, value=value))
    return full_attention_op(*FullInputs.of(call))[0]


def _without_gradient(call: AttentionCall) -> Tensor:
    # A value that is not finite shows in the output of each query that sees it. A query or key need not show: PyTorch's
    # attention takes a row whose scores are all NaN for a row without keys.
    if _are_finite(call.query, call.key):
        if sdpa.takes_one_call(call):
            output = sdpa.attention(call)
        else:
            output, _ = sdpa.forward(call.query, call.key, call.value, call.attn_mask, call.is_causal, call.scale)
        if _are_finite(output):
            return output
    return chunked.full_attention(call)


def _is_batched(tensor: Tensor) -> bool:
    """Whether it stands for many tensors, in `torch.vmap`."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        if torch._C._functorch.is_batchedtensor(tensor):
            return True
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return False


def _are_finite(*tensors: Tensor) -> bool:
    # A finite sum proves that every element is finite. If the sum overflows, only the faster path is lost.
    return all(math.isfinite(x.sum(dtype=accumulation_dtype(x.dtype)).item()) for x in tensors)


@torch.library.custom_op("topk_attention::full_attention", mutates_args=())
def full_attention_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    bias: Tensor | None,
    relative_bias: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    is_causal: bool,
    scale: float,
    softcap: float,
    dropout_p: float,
    query_chunk_size: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns output [B, H, N, E], the logarithm of each row's softmax denominator, [B, H, N, 1], and whether PyTorch's
    attention computed them, [] bool.

    bias, relative_bias, sinks and seed are None and softcap is 0: `sdpa.obstacle` refuses calls that have them.
    """
    if _are_finite(query, key, value):
        output, log_sums = sdpa.forward(query, key, value, attn_mask, is_causal, scale)
        return output, log_sums.unsqueeze(3), torch.tensor(True)
    output, log_sums = chunked.full_attention_op(
        *(query, key, value, attn_mask, bias, relative_bias, sinks, seed),
        *(is_causal, scale, softcap, dropout_p, query_chunk_size),
    )
    return output, log_sums, torch.tensor(False)


@full_attention_op.register_fake
def _(query, key, value, *options) -> tuple[Tensor, Tensor, Tensor]:
    return (
        empty_output(query, value),
        query.new_empty(*query.shape[:3], 1, dtype=accumulation_dtype(query.dtype)),
        query.new_empty((), dtype=torch.bool),
    )


@torch.library.custom_op("topk_attention::full_attention_backward", mutates_args=())
def full_attention_backward_op(
    grad_output: Tensor,
    output: Tensor,
    log_sums: Tensor,
    is_pytorchs: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    bias: Tensor | None,
    relative_bias: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    is_causal: bool,
    scale: float,
    softcap: float,
    dropout_p: float,
    query_chunk_size: int | None,
    query_wanted: bool,
    key_wanted: bool,
    value_wanted: bool,
    means_wanted: bool,
    bias_shape: Sequence[int],
    relative_bias_shape: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns `AttentionGradients`; empty tensors for those not wanted, and for the means: no call here has sinks."""
    wanted = (query_wanted, key_wanted, value_wanted, False)
    if not is_pytorchs:
        return chunked.full_attention_backward_op(
            grad_output,
            output,
            log_sums,
            *(query, key, value, attn_mask, bias, relative_bias, sinks, seed),
            *(is_causal, scale, softcap, dropout_p, query_chunk_size),
            *(*wanted, bias_shape, relative_bias_shape),
        )
    gradients = sdpa.backward(grad_output, output, log_sums.squeeze(3), query, key, value, attn_mask, is_causal, scale)
    empty = empty_attention_gradients(query, key, value, wanted, bias_shape, relative_bias_shape, log_sums.dtype)
    grad_query, grad_key, grad_value = (
        gradient if is_wanted else nothing
        for gradient, nothing, is_wanted in zip(gradients, empty[:3], wanted[:3], strict=True)
    )
    return AttentionGradients(grad_query, grad_key, grad_value, *empty[3:])


@full_attention_backward_op.register_fake
def _(grad_output, output, log_sums, is_pytorchs, query, key, value, *options):
    query_wanted, key_wanted, value_wanted, _, bias_shape, relative_shape = options[-6:]
    wanted = (query_wanted, key_wanted, value_wanted, False)
    return tuple(empty_attention_gradients(query, key, value, wanted, bias_shape, relative_shape, log_sums.dtype))


full_attention_op.register_autograd(
    differentiate_full_attention(full_attention_backward_op), setup_context=save_full_attention
)
full_attention_backward_op.register_autograd(refuse_second_derivatives("topk_attention"))
