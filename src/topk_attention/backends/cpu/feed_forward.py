"""Top-k feed-forward by the compiled kernels.

Source: Gupta et al. 2021, section 2, "feed-forward as attention".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..activations import Cut, activate, activate_backward, gated, gated_backward
from ..autocast import without_autocast
from ..calls import FeedForwardCall, accumulation_dtype
from ..dropout import keep_mask
from ..operators import (
    differentiate_feed_forward,
    empty_feed_forward_gradients,
    needs_gradient,
    refuse_second_derivatives,
    save_feed_forward,
)
from . import library  # noqa: F401  loads the kernels

_kernels = torch.ops.topk_attention
# Entries [tokens, k] whose activations, or gradients, exist at a time in addition to what is saved.
_ENTRIES_AT_A_TIME = 2**17
# The numbers of topk::Activation.
_ACTIVATIONS = {
    "identity": 0,
    "relu": 1,
    "silu": 2,
    "swish": 2,
    "gelu": 3,
    "gelu_tanh": 4,
    "gelu_new": 4,
    "gelu_pytorch_tanh": 4,
    "gelu_fast": 4,
    "gelu_accurate": 4,
    "gelu_python_tanh": 4,
    "gelu_python": 3,
    "quick_gelu": 5,
    "relu2": 6,
    "linear": 0,
}


@torch.library.register_fake("topk_attention::cpu_choose_neurons")
def _(x, w_in, w_gate, b_in, b_gate, activation, limit, offset, k):
    dtype = accumulation_dtype(x.dtype)
    return (
        x.new_empty(x.shape[0], k, dtype=torch.int32),
        x.new_empty(x.shape[0], k, dtype=dtype),
        x.new_empty(x.shape[0] if w_gate is not None else 0, k, dtype=dtype),
    )


@torch.library.register_fake("topk_attention::cpu_sum_neurons")
def _(table, neurons, coefficients):
    return table.new_empty(neurons.shape[0], table.shape[1], dtype=accumulation_dtype(table.dtype))


def feed_forward(call: FeedForwardCall) -> Tensor:
    """Returns [T, O]."""
    tensors = (call.x, call.w_in, call.w_out, call.w_gate, call.b_in, call.b_gate, call.b_out)
    save_selection = needs_gradient(*tensors)
    # Without gradients and outside compiled code the operator's wrapper has no effect and costs 60 us.
    run = feed_forward_op if save_selection or torch.compiler.is_compiling() else _feed_forward
    output, _, _, _ = run(
        *tensors,
        call.seed,
        min(call.k or call.w_in.shape[0], call.w_in.shape[0]),
        call.activation,
        *call.cut,
        call.dropout_p,
        save_selection,
    )
    return output


@without_autocast
def _feed_forward(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    w_gate: Tensor | None,
    b_in: Tensor | None,
    b_gate: Tensor | None,
    b_out: Tensor | None,
    seed: Tensor | None,
    k: int,
    activation: str,
    limit: float | None,
    offset: float,
    dropout_p: float,
    save_selection: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns output [T, O] and, if asked for, the selection: neurons int32 [T, k], their pre-activations [T, k] and
    their gate pre-activations [T, k]."""
    cut = Cut(limit, offset)
    neurons, values, gates = _choose(x, w_in, w_gate, b_in, b_gate, activation, cut, k)
    dtype, w_out_t = values.dtype, _whole_rows_or_columns(w_out.t())
    output = x.new_empty(x.shape[0], w_out.shape[0])
    for first, part in _token_chunks(x.shape[0], k):
        hidden = _hidden(values[part], None if w_gate is None else gates[part], activation, cut)
        if seed is not None:
            hidden *= _dropout_factor(seed, first, neurons[part], dropout_p, dtype)
        sums = _kernels.cpu_sum_neurons(w_out_t, neurons[part], hidden)
        output[part] = sums if b_out is None else sums.add_(b_out)
    if save_selection:
        return output, neurons, values, gates
    return output, neurons[:0].clone(), values[:0].clone(), gates[:0].clone()


def _choose(
    x: Tensor,
    w_in: Tensor,
    w_gate: Tensor | None,
    b_in: Tensor | None,
    b_gate: Tensor | None,
    activation: str,
    cut: Cut,
    k: int,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(x.dtype)
    chosen: tuple[Tensor, Tensor, Tensor] = _kernels.cpu_choose_neurons(
        _whole_rows(x),
        _whole_rows(w_in),
        None if w_gate is None else _whole_rows(w_gate),
        None if b_in is None else b_in.to(dtype).contiguous(),
        None if b_gate is None else b_gate.to(dtype).contiguous(),
        _ACTIVATIONS[activation],
        *cut,
        k,
    )
    return chosen


def choose_neurons(call: FeedForwardCall) -> tuple[Tensor, Tensor, Tensor]:
    """The k best neurons of each token, int32 [T, k] in rising order, their pre-activations [T, k] and their gate
    pre-activations [T, k], empty without a gate."""
    num_neurons = call.w_in.shape[0]
    return _choose(
        call.x,
        call.w_in,
        call.w_gate,
        call.b_in,
        call.b_gate,
        call.activation,
        call.cut,
        min(call.k or num_neurons, num_neurons),
    )


def sum_neurons(call: FeedForwardCall, neurons: Tensor, hidden: Tensor) -> Tensor:
    """The output weights of chosen neurons [T, k], each times its entry of `hidden` [T, k], added up: [T, O]."""
    sums: Tensor = _kernels.cpu_sum_neurons(_whole_rows_or_columns(call.w_out.t()), neurons, hidden)
    return sums.to(call.x.dtype)


feed_forward_op = torch.library.custom_op("topk_attention::cpu_feed_forward", _feed_forward, mutates_args=())


@feed_forward_op.register_fake
def _(x, w_in, w_out, w_gate, b_in, b_gate, b_out, seed, k, *options) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_saved = x.shape[0] if options[-1] else 0
    dtype = accumulation_dtype(x.dtype)
    return (
        x.new_empty(x.shape[0], w_out.shape[0]),
        x.new_empty(num_saved, k, dtype=torch.int32),
        x.new_empty(num_saved, k, dtype=dtype),
        x.new_empty(num_saved if w_gate is not None else 0, k, dtype=dtype),
    )


@torch.library.custom_op("topk_attention::cpu_feed_forward_backward", mutates_args=())
@without_autocast
def feed_forward_backward_op(
    grad_output: Tensor,
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    w_gate: Tensor | None,
    b_in: Tensor | None,
    b_gate: Tensor | None,
    seed: Tensor | None,
    neurons: Tensor,
    values: Tensor,
    gates: Tensor,
    activation: str,
    limit: float | None,
    offset: float,
    dropout_p: float,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of x, w_in, w_out transposed [F, O], w_gate, b_in and b_gate; empty for absent ones and for
    weights (not biases) that are not `wanted`, in the order w_in, w_out, w_gate."""
    dtype = values.dtype
    w_in_wanted, w_out_wanted, w_gate_wanted = wanted
    x, grad_output, w_in, w_out_t = (_whole_rows(part) for part in (x, grad_output, w_in, w_out.t()))
    num_neurons, cut = w_in.shape[0], Cut(limit, offset)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    grad_w_in, grad_w_out_t, grad_w_gate = (
        torch.zeros(w.shape if w is not None and is_wanted else 0, dtype=dtype)
        for w, is_wanted in ((w_in, w_in_wanted), (w_out_t, w_out_wanted), (w_gate, w_gate_wanted))
    )
    grad_b_in, grad_b_gate = (torch.zeros(num_neurons if b is not None else 0, dtype=dtype) for b in (b_in, b_gate))
    for first, part in _token_chunks(x.shape[0], neurons.shape[1]):
        kept, value, gate = neurons[part], values[part], None if w_gate is None else gates[part]
        hidden = _hidden(value, gate, activation, cut)
        grad_hidden = _kernels.cpu_dot_neurons(grad_output[part], w_out_t, kept)
        if seed is not None:
            factor = _dropout_factor(seed, first, kept, dropout_p, dtype)
            hidden, grad_hidden = hidden * factor, grad_hidden.mul_(factor)
        _add_tokens(grad_output[part], kept, hidden, grad_w_out_t, None)
        grad_gate = None
        if gate is None:
            grad_value = activate_backward(grad_hidden, value, activation)
        else:
            grad_value, grad_gate = gated_backward(grad_hidden, value, gate, activation, cut)
        rows_grad_x = _kernels.cpu_sum_neurons(w_in, kept, grad_value)
        _add_tokens(x[part], kept, grad_value, grad_w_in, None if b_in is None else grad_b_in)
        if grad_gate is not None and w_gate is not None:
            rows_grad_x += _kernels.cpu_sum_neurons(_whole_rows(w_gate), kept, grad_gate)
            _add_tokens(x[part], kept, grad_gate, grad_w_gate, None if b_gate is None else grad_b_gate)
        grad_x[part] = rows_grad_x
    return (
        grad_x,
        grad_w_in.to(x.dtype),
        grad_w_out_t.to(x.dtype),
        grad_w_gate.to(x.dtype),
        grad_b_in.to(x.dtype),
        grad_b_gate.to(x.dtype),
    )


@feed_forward_backward_op.register_fake
def _(grad_output, x, w_in, w_out, w_gate, b_in, b_gate, *options) -> tuple[Tensor, ...]:
    return tuple(empty_feed_forward_gradients(x, w_in, w_out, w_gate, b_in, b_gate, options[-1]))


feed_forward_op.register_autograd(
    differentiate_feed_forward("cpu_feed_forward", feed_forward_backward_op), setup_context=save_feed_forward
)
feed_forward_backward_op.register_autograd(refuse_second_derivatives("topk_feed_forward"))


def _token_chunks(num_tokens: int, k: int) -> Iterator[tuple[int, slice]]:
    """The first token of each chunk, and the chunk."""
    size = max(1, _ENTRIES_AT_A_TIME // k)
    for first in range(0, num_tokens, size):
        yield first, slice(first, first + size)


def _hidden(values: Tensor, gates: Tensor | None, activation: str, cut: Cut) -> Tensor:
    """The hidden layer, as a new tensor: "identity" alone would return the saved one."""
    if gates is not None:
        return gated(values, gates, activation, cut)
    hidden = activate(values, activation)
    return hidden.clone() if hidden is values else hidden


def _add_tokens(rows: Tensor, neurons: Tensor, coefficients: Tensor, sums: Tensor, bias: Tensor | None) -> None:
    if sums.ndim == 2:
        _kernels.cpu_add_tokens(rows, neurons, coefficients, sums, bias)
    elif bias is not None:
        bias.scatter_add_(0, neurons.flatten().long(), coefficients.flatten())


def _whole_rows(matrix: Tensor) -> Tensor:
    """The matrix with contiguous rows; `w_out.t()` already has them where the layer keeps w_out neuron by neuron."""
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


def _whole_rows_or_columns(matrix: Tensor) -> Tensor:
    """The matrix itself where one of its axes is contiguous: to copy it costs more than the sums of a token."""
    return matrix if matrix.stride(0) == 1 else _whole_rows(matrix)


def _dropout_factor(seed: Tensor, first_token: int, neurons: Tensor, dropout_p: float, dtype: torch.dtype) -> Tensor:
    rows = torch.arange(first_token, first_token + neurons.shape[0]).unsqueeze(1)
    return keep_mask(seed, rows, neurons.long(), dropout_p).to(dtype) / (1 - dropout_p)
