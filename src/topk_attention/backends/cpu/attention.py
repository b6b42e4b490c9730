"""Top-k attention by the compiled kernels: the operators' shapes and gradients, and the entry point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..calls import AttentionCall, KeySums, RestGradients, RestInputs, accumulation_dtype
from ..operators import (
    AttentionGradients,
    TopKBackwardInputs,
    TopKInputs,
    differentiate_topk_attention,
    empty_topk_results,
    is_transformed,
    needs_gradient,
    padded_entries,
    refuse_second_derivatives,
    run_topk_attention,
    save_topk_attention,
)
from .key_index import is_indexed

_FORWARD = "topk_attention::cpu_attention_forward"
_INDEXED = "topk_attention::cpu_attention_forward_indexed"
_BACKWARD = "topk_attention::cpu_attention_backward"
forward_op = torch.ops.topk_attention.cpu_attention_forward.default
indexed_op = torch.ops.topk_attention.cpu_attention_forward_indexed.default
completed_op = torch.ops.topk_attention.cpu_completed_attention_forward.default
backward_op = torch.ops.topk_attention.cpu_attention_backward.default


def attention(call: AttentionCall) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns output [B, H, N, E] and, where the call asks for them, indices [B, H, N, K] int32 and weights.

    For each query and head the kernels hold k entries of 8 bytes for the backward pass, also where k is the number of
    keys. A call with k=None reaches this backend only if it asks for the selection.
    """
    if call.relative_bias is not None:
        call = replace(call, relative_bias=call.relative_bias.to(accumulation_dtype(call.query.dtype)))
    index = index_inputs(call)
    if index is None:
        return run_topk_attention(call, _forward, padded_entries)
    return run_topk_attention(call, lambda *inputs: indexed_op(*inputs, *index), padded_entries)


def _forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`forward_op`. Where nothing needs a gradient, torch is not asked for its backward pass, which takes 8 us."""
    call = TopKInputs(*inputs[: len(TopKInputs._fields)])
    if is_transformed() or needs_gradient(call.query, call.key, call.value, call.bias, call.relative_bias, call.sinks):
        return forward_op(*inputs)
    with torch._C._AutoDispatchBelowAutograd():
        return forward_op(*inputs)


def index_inputs(call: AttentionCall) -> tuple[Tensor | int | bool, ...] | None:
    """What the operators read of the index of a call that uses one; None for others."""
    if not is_indexed(call):
        return None
    assert call.key_index is not None
    return *call.key_index, call.key.shape[2], call.keys_in_files


def completed_forward(
    inputs: TopKInputs,
    query_chunk_size: int | None,
    save_selection: bool,
    rest: RestInputs,
    index: tuple[Tensor | int | bool, ...] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output, indices, weights, log_sums; the rest's weight at a scale of 1 and which entry scores least, [B, H, N].

    index  `index_inputs` of the call
    """
    del query_chunk_size
    return completed_op(*inputs, save_selection, *rest, *(index or ()))


def completed_backward(
    inputs: TopKBackwardInputs,
    wanted: Sequence[bool],
    bias_shape: Sequence[int],
    relative_bias_shape: Sequence[int],
    is_causal: bool,
    mass: Tensor,
    cuts: Tensor,
    rest: RestInputs,
) -> tuple[AttentionGradients, RestGradients]:
    """The gradients over the kept keys, and what the rest's need; the gradient of query is complete."""
    if rest.products is not None:  # the kernel multiplies them from the side of the values
        rest = rest._replace(products=rest.products.mT)
    gradients = torch.ops.topk_attention.cpu_completed_attention_backward(
        *inputs, *wanted, bias_shape, relative_bias_shape, is_causal, mass, cuts, *rest
    )
    return AttentionGradients(*gradients[:6]), RestGradients(*gradients[6:])


def sum_intervals(key: Tensor, value: Tensor, interval: int) -> KeySums:
    """Sums over whole intervals of [B, G, M, X], each [B, G, M // interval, ...], in the accumulation dtype."""
    return KeySums(*torch.ops.topk_attention.cpu_sum_keys(key, value, interval))


def send_rest(
    query: Tensor,
    grad_output: Tensor,
    key: Tensor,
    value: Tensor,
    sent: RestGradients,
    scale: float,
    mask: Tensor | None,
    interval: int,
    grad_key: Tensor | None,
    grad_value: Tensor | None,
) -> None:
    """Add to the gradients of keys and values what the rest sends to all keys that a query sees, under causality.

    mask  [B|1, M] bool, True = visible
    """
    torch.ops.topk_attention.cpu_send_rest(
        query, grad_output, key, value, *sent[:3], scale, mask, interval, grad_key, grad_value
    )


@torch.library.register_fake("topk_attention::cpu_index_keys")
def _(key, start, panels, numbers, unscreened, centre):
    return None


@torch.library.register_fake(_INDEXED)
def _(*inputs):
    num_inputs = len(TopKInputs._fields)
    return _empty_forward(TopKInputs(*inputs[:num_inputs]), inputs[num_inputs])


@torch.library.register_fake(_FORWARD)
def _(*inputs):
    return _empty_forward(TopKInputs(*inputs[:-1]), inputs[-1])


def _empty_forward(inputs, save_selection):
    return empty_topk_results(inputs.query, inputs.value, inputs.sinks, inputs.head_k, save_selection)


@torch.library.register_fake(_BACKWARD)
def _(grad_output, query, key, value, seed, indices, weights, head_k, scale, softcap, dropout_p, *wanted):
    query_wanted, key_wanted, value_wanted, means_wanted, bias_shape, relative_shape = wanted
    return (
        query.new_empty(query.shape if query_wanted else (0,)),
        key.new_empty(key.shape if key_wanted else (0,), dtype=weights.dtype),
        value.new_empty(value.shape if value_wanted else (0,), dtype=weights.dtype),
        query.new_empty(bias_shape or (0,), dtype=weights.dtype),
        query.new_empty(relative_shape or (0,), dtype=torch.float64),
        query.new_empty(query.shape[:3] if means_wanted else (0,), dtype=weights.dtype),
    )


torch.library.register_autograd(
    _FORWARD, differentiate_topk_attention("cpu_attention_forward", backward_op), setup_context=save_topk_attention
)
torch.library.register_autograd(_BACKWARD, refuse_second_derivatives("topk_attention"))
