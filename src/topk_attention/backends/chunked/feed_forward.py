"""Top-k feed-forward as two operators, forward and backward.

Source: Gupta et al. 2021, section 2, "feed-forward as attention".
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
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
from .rows import Transposed, dot_with_rows, transpose_selection, weighted_sum_by_target, weighted_sum_of_rows
from .selection import select_topk
from .tiles import BACKWARD_BYTES_PER_ENTRY, TILE_BYTES, split

# Up to this share of kept neurons a gathered product reads less than the dense one costs. Measured on two cores with
# d_model = 768 and d_ff = 3,072 to 65,536.
_GATHERED_PRODUCT_UP_TO = 1 / 32
# Matrix products over fewer tokens than this spend most of their time reading the weights.
_FEWEST_TOKENS = 64
_ENTRIES_PER_NEURON = 8


def feed_forward(call: FeedForwardCall) -> Tensor:
    """Returns [T, O]."""
    tensors = (call.x, call.w_in, call.w_out, call.w_gate, call.b_in, call.b_gate, call.b_out)
    save_selection = needs_gradient(*tensors)
    output, _, _, _ = feed_forward_op(
        *tensors,
        call.seed,
        min(call.k or call.w_in.shape[0], call.w_in.shape[0]),
        call.activation,
        *call.cut,
        call.dropout_p,
        call.token_chunk_size,
        save_selection,
    )
    return output


def choose_neurons(call: FeedForwardCall) -> tuple[Tensor, Tensor, Tensor]:
    """The k best neurons of each token, int32 [T, k] in rising order, their pre-activations [T, k] and their gate
    pre-activations [T, k], empty without a gate."""
    layer = _Layer.of(call.x, call.w_in, call.w_out, call.w_gate, call.b_in, call.b_gate)
    num_tokens, num_neurons = call.x.shape[0], call.w_in.shape[0]
    k = min(call.k or num_neurons, num_neurons)
    neurons = torch.empty(num_tokens, k, dtype=torch.int32, device=call.x.device)
    chosen_values = torch.empty(num_tokens, k, dtype=layer.dtype, device=call.x.device)
    chosen_gates = torch.empty_like(chosen_values) if call.w_gate is not None else chosen_values.new_empty(0, k)
    for tokens in _token_chunks(num_tokens, num_neurons, call.token_chunk_size, layer.dtype.itemsize):
        part = slice(tokens.start, tokens.stop)
        values, gates = layer.pre_activations(call.x[part])
        ranked_by = values if gates is None else layer.hidden(values, gates, call.activation, call.cut).abs_()
        _, chosen = select_topk(ranked_by, k)
        neurons[part], chosen_values[part] = chosen, values.gather(1, chosen)
        if gates is not None:
            chosen_gates[part] = gates.gather(1, chosen)
    return neurons, chosen_values, chosen_gates


def sum_neurons(call: FeedForwardCall, neurons: Tensor, hidden: Tensor) -> Tensor:
    """The output weights of chosen neurons [T, k], each times its entry of `hidden` [T, k], added up: [T, O]."""
    w_out_t = call.w_out.t().to(hidden.dtype).contiguous()
    return weighted_sum_of_rows(w_out_t, neurons, hidden).to(call.x.dtype)


@torch.library.custom_op("topk_attention::chunked_feed_forward", mutates_args=())
@without_autocast
def feed_forward_op(
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
    token_chunk_size: int | None,
    save_selection: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns output [T, O] and the selection: neurons int32 [T, k], their pre-activations [T, k] and their gate
    pre-activations [T, k].

    The selection is empty unless asked for. It is always empty where k keeps every neuron: then the backward pass
    computes the pre-activations again.
    """
    layer = _Layer.of(x, w_in, w_out, w_gate, b_in, b_gate)
    cut = Cut(limit, offset)
    num_tokens, num_neurons = x.shape[0], w_in.shape[0]
    num_saved = num_tokens if save_selection and k < num_neurons else 0
    saved_neurons = torch.empty(num_saved, k, dtype=torch.int32, device=x.device)
    saved_values = torch.empty(num_saved, k, dtype=layer.dtype, device=x.device)
    saved_gates = torch.empty(num_saved if w_gate is not None else 0, k, dtype=layer.dtype, device=x.device)
    output = x.new_empty(num_tokens, w_out.shape[0])
    for tokens in _token_chunks(num_tokens, num_neurons, token_chunk_size, layer.dtype.itemsize):
        part = slice(tokens.start, tokens.stop)
        values, gates = layer.pre_activations(x[part])
        neurons = None
        if k < num_neurons:
            _, neurons = select_topk(
                values if gates is None else layer.hidden(values, gates, activation, cut).abs_(), k
            )
            values = values.gather(1, neurons)
            gates = gates.gather(1, neurons) if gates is not None else None
            if save_selection:
                saved_neurons[part], saved_values[part] = neurons, values
                if gates is not None:
                    saved_gates[part] = gates
        hidden = layer.hidden(values, gates, activation, cut)
        if seed is not None:
            hidden = hidden * _dropout_factor(seed, tokens, neurons, dropout_p, hidden)
        sums = hidden @ layer.w_out_t if neurons is None else weighted_sum_of_rows(layer.w_out_t, neurons, hidden)
        output[part] = sums if b_out is None else sums.add_(b_out)
    return output, saved_neurons, saved_values, saved_gates


@feed_forward_op.register_fake
def _(x, w_in, w_out, w_gate, b_in, b_gate, b_out, seed, k, *options) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    save_selection = options[-1]
    num_saved = x.shape[0] if save_selection and k < w_in.shape[0] else 0
    dtype = accumulation_dtype(x.dtype)
    return (
        x.new_empty(x.shape[0], w_out.shape[0]),
        x.new_empty(num_saved, k, dtype=torch.int32),
        x.new_empty(num_saved, k, dtype=dtype),
        x.new_empty(num_saved if w_gate is not None else 0, k, dtype=dtype),
    )


@torch.library.custom_op("topk_attention::chunked_feed_forward_backward", mutates_args=())
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
    token_chunk_size: int | None,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of x, w_in, w_out transposed [F, O], w_gate, b_in and b_gate; empty for absent ones and for
    weights (not biases) that are not `wanted`, in the order w_in, w_out, w_gate."""
    layer = _Layer.of(x, w_in, w_out, w_gate, b_in, b_gate)
    cut = Cut(limit, offset)
    num_tokens, num_neurons = x.shape[0], w_in.shape[0]
    k = neurons.shape[1]
    w_in_wanted, w_out_wanted, w_gate_wanted = wanted
    grad_x = torch.zeros_like(x, memory_format=torch.contiguous_format)
    grad_w_in, grad_w_out_t, grad_w_gate = (
        x.new_zeros(w.shape if w is not None and is_wanted else 0, dtype=layer.dtype)
        for w, is_wanted in ((layer.w_in, w_in_wanted), (layer.w_out_t, w_out_wanted), (layer.w_gate, w_gate_wanted))
    )
    grad_b_in, grad_b_gate = (
        x.new_zeros(num_neurons if b is not None else 0, dtype=layer.dtype) for b in (b_in, b_gate)
    )
    for tokens in _backward_token_chunks(num_tokens, num_neurons, k, token_chunk_size):
        part = slice(tokens.start, tokens.stop)
        rows_x, rows_grad = x[part].to(layer.dtype), grad_output[part].to(layer.dtype).contiguous()
        if neurons.shape[0] < num_tokens:  # every neuron is kept, and none was saved
            kept = None
            value, gate = layer.pre_activations(x[part])
        else:
            kept, value, gate = neurons[part], values[part], None if w_gate is None else gates[part]
        grad_hidden = layer.grad_hidden(rows_grad, kept)
        hidden = layer.hidden(value, gate, activation, cut)
        if seed is not None:
            factor = _dropout_factor(seed, tokens, kept, dropout_p, hidden)
            hidden, grad_hidden = hidden * factor, grad_hidden * factor
        grad_value, grad_gate = layer.grad_pre_activations(grad_hidden, value, gate, activation, cut)
        sums: _DenseSums | _SparseSums = _DenseSums() if kept is None else _SparseSums(kept, num_neurons)
        rows_grad_x = sums.over_neurons(layer.w_in, grad_value)
        if w_in_wanted:
            grad_w_in += sums.over_tokens(rows_x, grad_value)
        if w_out_wanted:
            grad_w_out_t += sums.over_tokens(rows_grad, hidden)
        if b_in is not None:
            sums.add_per_neuron(grad_b_in, grad_value)
        if grad_gate is not None:
            assert layer.w_gate is not None
            rows_grad_x = rows_grad_x + sums.over_neurons(layer.w_gate, grad_gate)
            if w_gate_wanted:
                grad_w_gate += sums.over_tokens(rows_x, grad_gate)
            if b_gate is not None:
                sums.add_per_neuron(grad_b_gate, grad_gate)
        grad_x[part] = rows_grad_x
    dtype = x.dtype
    return (
        grad_x,
        grad_w_in.to(dtype),
        grad_w_out_t.to(dtype),
        grad_w_gate.to(dtype),
        grad_b_in.to(dtype),
        grad_b_gate.to(dtype),
    )


@feed_forward_backward_op.register_fake
def _(grad_output, x, w_in, w_out, w_gate, b_in, b_gate, *options) -> tuple[Tensor, ...]:
    return tuple(empty_feed_forward_gradients(x, w_in, w_out, w_gate, b_in, b_gate, options[-1]))


feed_forward_op.register_autograd(
    differentiate_feed_forward("chunked_feed_forward", feed_forward_backward_op), setup_context=save_feed_forward
)
feed_forward_backward_op.register_autograd(refuse_second_derivatives("topk_feed_forward"))


class _Layer(NamedTuple):
    """The layer's weights in the accumulation dtype, each neuron's output weights in one row."""

    w_in: Tensor  # [F, D]
    w_out_t: Tensor  # [F, O], contiguous
    w_gate: Tensor | None  # [F, D]
    b_in: Tensor | None  # [F]
    b_gate: Tensor | None  # [F]

    @staticmethod
    def of(
        x: Tensor, w_in: Tensor, w_out: Tensor, w_gate: Tensor | None, b_in: Tensor | None, b_gate: Tensor | None
    ) -> _Layer:
        dtype = accumulation_dtype(x.dtype)

        def optional(weight: Tensor | None) -> Tensor | None:
            return None if weight is None else weight.to(dtype).contiguous()

        return _Layer(
            w_in.to(dtype).contiguous(),
            w_out.t().to(dtype).contiguous(),
            optional(w_gate),
            optional(b_in),
            optional(b_gate),
        )

    @property
    def dtype(self) -> torch.dtype:
        return self.w_in.dtype

    def pre_activations(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        x = x.to(self.dtype)
        gates = None if self.w_gate is None else F.linear(x, self.w_gate, self.b_gate)
        return F.linear(x, self.w_in, self.b_in), gates

    @staticmethod
    def hidden(values: Tensor, gates: Tensor | None, activation: str, cut: Cut) -> Tensor:
        return activate(values, activation) if gates is None else gated(values, gates, activation, cut)

    def grad_hidden(self, rows_grad: Tensor, neurons: Tensor | None) -> Tensor:
        """The gradient of the hidden layer [T, k], from that of the output [T, O]; neurons = None are all."""
        if neurons is None:
            return rows_grad @ self.w_out_t.mT
        if neurons.shape[1] > self.w_in.shape[0] * _GATHERED_PRODUCT_UP_TO:
            return (rows_grad @ self.w_out_t.mT).gather(1, neurons.long())
        return dot_with_rows(rows_grad, self.w_out_t, neurons)

    @staticmethod
    def grad_pre_activations(
        grad_hidden: Tensor, values: Tensor, gates: Tensor | None, activation: str, cut: Cut
    ) -> tuple[Tensor, Tensor | None]:
        """The gradients of the pre-activations and, in a gated layer, of those of the gate."""
        if gates is None:
            return activate_backward(grad_hidden, values, activation), None
        return gated_backward(grad_hidden, values, gates, activation, cut)


class _DenseSums:
    """Products over every neuron, for a chunk of tokens."""

    def over_neurons(self, weights: Tensor, coefficients: Tensor) -> Tensor:
        return coefficients @ weights

    def over_tokens(self, rows: Tensor, coefficients: Tensor) -> Tensor:
        return coefficients.mT @ rows

    def add_per_neuron(self, into: Tensor, coefficients: Tensor) -> None:
        into += coefficients.sum(0)


class _SparseSums:
    """The same products over kept neurons only."""

    def __init__(self, neurons: Tensor, num_neurons: int) -> None:
        self.neurons = neurons
        self._num_neurons = num_neurons

    @functools.cached_property
    def _by_neuron(self) -> Transposed:  # not needed where all weights are frozen
        return transpose_selection(self.neurons, self._num_neurons)

    def over_neurons(self, weights: Tensor, coefficients: Tensor) -> Tensor:
        return weighted_sum_of_rows(weights, self.neurons, coefficients)

    def over_tokens(self, rows: Tensor, coefficients: Tensor) -> Tensor:
        return weighted_sum_by_target(self._by_neuron, rows, coefficients)

    def add_per_neuron(self, into: Tensor, coefficients: Tensor) -> None:
        into.scatter_add_(0, self.neurons.flatten().long(), coefficients.flatten())


def _token_chunks(num_tokens: int, num_neurons: int, token_chunk_size: int | None, itemsize: int) -> Iterator[range]:
    size = token_chunk_size or max(TILE_BYTES // (itemsize * num_neurons), _FEWEST_TOKENS)
    return split(range(num_tokens), size)


def _backward_token_chunks(num_tokens: int, num_neurons: int, k: int, token_chunk_size: int | None) -> Iterator[range]:
    """Each chunk adds a whole [F, D] block to the weight gradients, so it should have several entries per neuron."""
    entries = max(TILE_BYTES // BACKWARD_BYTES_PER_ENTRY, _ENTRIES_PER_NEURON * num_neurons)
    return split(range(num_tokens), token_chunk_size or max(entries // k, _FEWEST_TOKENS))


def _dropout_factor(seed: Tensor, tokens: range, neurons: Tensor | None, dropout_p: float, like: Tensor) -> Tensor:
    rows = torch.arange(tokens.start, tokens.stop, device=like.device).unsqueeze(1)
    columns = torch.arange(like.shape[1], device=like.device) if neurons is None else neurons.long()
    return keep_mask(seed, rows, columns, dropout_p).to(like.dtype) / (1 - dropout_p)
