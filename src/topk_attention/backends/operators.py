"""What the operators of several backends share: their entry, what they save for the backward pass, and their gradients.

torch hands an operator's inputs on by position. The named tuples in this file say what stands where.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .calls import AttentionCall, accumulation_dtype, empty_output

Gradients = tuple[Tensor | None, ...]


class TopKInputs(NamedTuple):
    """The inputs with which every operator of top-k attention begins.

    Options of its own follow, and save_selection comes last. The operator returns output, indices, weights and, with
    sinks and a selection, the logarithm of each row's softmax denominator, inf where the row sees no key. A softcap of
    0 is none.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None
    bias: Tensor | None
    relative_bias: Tensor | None
    sinks: Tensor | None
    seed: Tensor | None
    head_k: Sequence[int]
    is_causal: bool
    scale: float
    softcap: float
    dropout_p: float


class TopKBackwardInputs(NamedTuple):
    """The inputs with which every backward operator of top-k attention begins; what is wanted follows."""

    grad_output: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    seed: Tensor | None
    indices: Tensor
    weights: Tensor
    head_k: Sequence[int]
    scale: float
    softcap: float
    dropout_p: float


class FullInputs(NamedTuple):
    """The inputs of every operator of full attention. It returns the output and what else it saves, log_sums first."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None
    bias: Tensor | None
    relative_bias: Tensor | None
    sinks: Tensor | None
    seed: Tensor | None
    is_causal: bool
    scale: float
    softcap: float
    dropout_p: float
    query_chunk_size: int | None

    @staticmethod
    def of(call: AttentionCall) -> FullInputs:
        inputs = FullInputs(*(getattr(call, name) for name in FullInputs._fields))
        return inputs._replace(softcap=call.softcap or 0.0)


_NUM_FULL_TENSORS = FullInputs._fields.index("is_causal")


class AttentionGradients(NamedTuple):
    """What the backward operators of attention return. Gradients that are not wanted are empty tensors."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor
    relative_bias: Tensor
    mean_grads: Tensor  # [B, H, N], for sinks: the sum of each row's weights times their gradients


class FeedForwardInputs(NamedTuple):
    """The inputs with which every feed-forward operator begins.

    Options of its own follow, and save_selection comes last. The operator returns output, neurons, values and gates.
    """

    x: Tensor
    w_in: Tensor
    w_out: Tensor
    w_gate: Tensor | None
    b_in: Tensor | None
    b_gate: Tensor | None
    b_out: Tensor | None
    seed: Tensor | None
    k: int
    activation: str
    limit: float | None
    offset: float
    dropout_p: float


class FeedForwardGradients(NamedTuple):
    """What the backward operators of feed-forward layers return; empty tensors for what is absent or not wanted."""

    x: Tensor
    w_in: Tensor
    w_out_t: Tensor  # [F, O]
    w_gate: Tensor
    b_in: Tensor
    b_gate: Tensor


def run_topk_attention(
    call: AttentionCall,
    operator: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]],
    padded: Callable[[Tensor, AttentionCall, Sequence[int], int], Tensor],
    *own_options: Any,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Call an operator of top-k attention.

    padded       (flat entries, call, head_k, fill) -> [B, H, N, K], K the largest k; unused slots hold `fill`
    own_options  those that the operator takes beside `TopKInputs`

    Returns output [B, H, N, E] and, where the call asks for them, indices [B, H, N, K] int32 and weights.
    """
    head_k = call.head_k or (call.key.shape[2],) * call.query.shape[1]
    value = call.value
    if value.shape[3] == 0:  # the selection is wanted all the same
        value = F.pad(value, (0, 1))
    inputs = TopKInputs(
        call.query,
        call.key,
        value,
        call.attn_mask,
        call.bias,
        call.relative_bias,
        call.sinks,
        call.seed,
        head_k,
        call.is_causal,
        call.scale,
        call.softcap or 0.0,
        call.dropout_p,
    )
    save_selection = call.return_selection or needs_gradient(
        call.query, call.key, call.value, call.bias, call.relative_bias, call.sinks
    )
    output, indices, weights, _ = operator(*inputs, *own_options, save_selection)
    if value is not call.value:  # otherwise not: even a slice of everything takes 2 us
        output = output[..., : call.value.shape[3]]
    if not call.return_selection:
        return output, None, None
    return output, padded(indices, call, head_k, -1), padded(weights, call, head_k, 0)


def padded_entries(entries: Tensor, call: AttentionCall, head_k: Sequence[int], fill: int) -> Tensor:
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


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd will ask for the gradient of one of these."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def is_transformed() -> bool:
    """Whether this runs while code is compiled or under a transform of torch.func, where a tensor is a placeholder."""
    return torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None


def save_topk_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """setup_context of operators that take `TopKInputs`."""
    call = TopKInputs(*inputs[: len(TopKInputs._fields)])
    _, indices, weights, log_sums = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(indices, weights, log_sums)
    ctx.save_for_backward(call.sinks, log_sums, call.query, call.key, call.value, call.seed, indices, weights)
    ctx.options = call.head_k, call.scale, call.softcap, call.dropout_p
    ctx.has_selection, ctx.num_inputs = inputs[-1], len(inputs)
    # Shapes alone: the biases themselves are not needed again.
    ctx.bias, ctx.relative_bias = (
        (tuple(x.shape), x.dtype) if x is not None and x.requires_grad else ((), None)
        for x in (call.bias, call.relative_bias)
    )


def differentiate_topk_attention(operator: str, backward_op: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Any]:
    """The backward function of an operator that takes `TopKInputs`.

    operator     its name, for an error
    backward_op  computes `AttentionGradients` from the gradient of the output and what `save_topk_attention` saved
    """

    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> Gradients:
        if grad_output is None:
            return (None,) * ctx.num_inputs
        require_selection(ctx, operator)
        # Read once: under activation checkpointing each read computes them again.
        sinks, log_sums, *saved = ctx.saved_tensors
        # A frozen key or value, as in cross-attention to a frozen encoder, gets no gradient that would be thrown away.
        wanted = _wanted(TopKInputs, ctx)
        (bias_shape, bias_dtype), (relative_shape, relative_dtype) = ctx.bias, ctx.relative_bias
        gradients = AttentionGradients(
            *backward_op(grad_output, *saved, *ctx.options, *wanted, bias_shape, relative_shape)
        )
        query, key, value = (
            gradient.to(x.dtype) if is_wanted else None
            for gradient, x, is_wanted in zip(gradients[:3], saved[:3], wanted[:3], strict=True)
        )
        return _in_order(
            TopKInputs,
            ctx.num_inputs,
            query=query,
            key=key,
            value=value,
            bias=gradients.bias.to(bias_dtype) if bias_dtype else None,
            relative_bias=gradients.relative_bias.to(relative_dtype) if relative_dtype else None,
            sinks=gradient_of_sinks(sinks, log_sums, gradients.mean_grads) if wanted[3] else None,
        )

    return backward


def save_full_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """setup_context of operators that take `FullInputs`."""
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output, *inputs[:_NUM_FULL_TENSORS])
    ctx.options = inputs[_NUM_FULL_TENSORS:]


def differentiate_full_attention(backward_op: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Any]:
    """The backward function of an operator that takes `FullInputs`.

    backward_op  computes `AttentionGradients` from the gradient of the output, all outputs and all inputs
    """

    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> Gradients:
        if grad_output is None:
            return (None,) * len(FullInputs._fields)
        saved = ctx.saved_tensors
        call = FullInputs(*saved[-_NUM_FULL_TENSORS:], *ctx.options)
        bias_shape, relative_shape = (
            tuple(x.shape) if x is not None and x.requires_grad else () for x in (call.bias, call.relative_bias)
        )
        wanted = _wanted(FullInputs, ctx)
        gradients = AttentionGradients(
            *backward_op(grad_output, *saved, *ctx.options, *wanted, bias_shape, relative_shape)
        )
        query, key, value = (
            gradient if is_wanted else None for gradient, is_wanted in zip(gradients[:3], wanted[:3], strict=True)
        )
        log_sums = saved[1].squeeze(3)
        return _in_order(
            FullInputs,
            len(FullInputs._fields),
            query=query,
            key=key,
            value=value,
            bias=gradients.bias.to(call.bias.dtype) if call.bias is not None and bias_shape else None,
            relative_bias=(
                gradients.relative_bias.to(call.relative_bias.dtype)
                if call.relative_bias is not None and relative_shape
                else None
            ),
            sinks=gradient_of_sinks(call.sinks, log_sums, gradients.mean_grads) if wanted[3] else None,
        )

    return backward


def _wanted(inputs: type[tuple[Any, ...]], ctx: Any) -> tuple[bool, bool, bool, bool]:
    """Whether query, key, value and sinks want a gradient."""
    of_input = dict(zip(inputs._fields, ctx.needs_input_grad, strict=False))  # type: ignore[attr-defined]
    return of_input["query"], of_input["key"], of_input["value"], of_input["sinks"]


def gradient_of_sinks(sinks: Tensor | None, log_sums: Tensor, mean_grads: Tensor) -> Tensor | None:
    """[H]: a sink has no value, so each row gives it its weight times the negative mean of the weights' gradients.

    log_sums, mean_grads  [B, H, N]
    """
    if sinks is None:
        return None
    # In float64: rows may nearly cancel one another.
    weights = (sinks.double().unsqueeze(1) - log_sums).exp()
    return -(weights * mean_grads).sum((0, 2)).to(sinks.dtype)


def empty_topk_results(
    query: Tensor, value: Tensor, sinks: Tensor | None, head_k: Sequence[int], save_selection: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tensors like those that operators with `TopKInputs` return."""
    dtype = accumulation_dtype(query.dtype)
    num_entries = query.shape[0] * query.shape[2] * sum(head_k) if save_selection else 0
    return (
        empty_output(query, value),
        query.new_empty(num_entries, dtype=torch.int32),
        query.new_empty(num_entries, dtype=dtype),
        query.new_empty(query.shape[:3] if sinks is not None and save_selection else (0,), dtype=dtype),
    )


def empty_attention_gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    wanted: Sequence[bool],
    bias_shape: Sequence[int],
    relative_bias_shape: Sequence[int],
    dtype: torch.dtype,
) -> AttentionGradients:
    """Tensors like those that the backward operators return; `dtype` is that of the biases' gradients."""
    *wanted, means_wanted = wanted
    grad_query, grad_key, grad_value = (
        torch.empty_like(x) if is_wanted else x.new_empty(0)
        for x, is_wanted in zip((query, key, value), wanted, strict=True)
    )
    return AttentionGradients(
        grad_query,
        grad_key,
        grad_value,
        query.new_empty(bias_shape or (0,), dtype=dtype),
        query.new_empty(relative_bias_shape or (0,), dtype=dtype),
        query.new_empty(query.shape[:3] if means_wanted else (0,), dtype=dtype),
    )


def save_feed_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """setup_context of operators that take `FeedForwardInputs`."""
    call = FeedForwardInputs(*inputs[: len(FeedForwardInputs._fields)])
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    # b_out is not needed again.
    ctx.save_for_backward(call.x, call.w_in, call.w_out, call.w_gate, call.b_in, call.b_gate, call.seed, *output[1:])
    own_options = inputs[len(FeedForwardInputs._fields) : -1]
    ctx.options, ctx.has_selection = (
        (call.activation, call.limit, call.offset, call.dropout_p, *own_options),
        inputs[-1],
    )
    ctx.num_inputs = len(inputs)


def differentiate_feed_forward(operator: str, backward_op: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Any]:
    """The backward function of an operator that takes `FeedForwardInputs`.

    operator     its name, for an error
    backward_op  computes `FeedForwardGradients` from the gradient of the output and what `save_feed_forward` saved
    """

    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> Gradients:
        if grad_output is None:
            return (None,) * ctx.num_inputs
        require_selection(ctx, operator)
        # Frozen weights, as under LoRA, get no [F, D] gradient that would be thrown away.
        wanted = FeedForwardInputs(*ctx.needs_input_grad[: len(FeedForwardInputs._fields)])
        of_weights = [wanted.w_in, wanted.w_out, wanted.w_gate]
        b_out = grad_output.sum(0) if wanted.b_out else None
        if not any((wanted.x, *of_weights, wanted.b_in, wanted.b_gate)):
            return _in_order(FeedForwardInputs, ctx.num_inputs, b_out=b_out)
        gradients = FeedForwardGradients(*backward_op(grad_output, *ctx.saved_tensors, *ctx.options, of_weights))
        return _in_order(
            FeedForwardInputs,
            ctx.num_inputs,
            x=gradients.x if wanted.x else None,
            w_in=gradients.w_in if wanted.w_in else None,
            w_out=gradients.w_out_t.t() if wanted.w_out else None,
            w_gate=gradients.w_gate if wanted.w_gate else None,
            b_in=gradients.b_in if wanted.b_in else None,
            b_gate=gradients.b_gate if wanted.b_gate else None,
            b_out=b_out,
        )

    return backward


def empty_feed_forward_gradients(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    w_gate: Tensor | None,
    b_in: Tensor | None,
    b_gate: Tensor | None,
    wanted: Sequence[bool],
) -> FeedForwardGradients:
    """Tensors like those that the backward operators return; `wanted` is for w_in, w_out and w_gate."""
    w_in_wanted, w_out_wanted, w_gate_wanted = wanted
    return FeedForwardGradients(
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty(w_in.shape if w_in_wanted else 0),
        x.new_empty(w_out.shape[::-1] if w_out_wanted else 0),
        x.new_empty(w_gate.shape if w_gate is not None and w_gate_wanted else 0),
        x.new_empty(b_in.shape if b_in is not None else 0),
        x.new_empty(b_gate.shape if b_gate is not None else 0),
    )


def refuse_second_derivatives(function: str) -> Callable[..., Any]:
    """The backward function of a backward operator; `function` is the name that its user called.

    Without one torch names the operator in its error, or it warns and treats the gradients as constants.
    """

    def backward(*_: Any) -> Any:
        raise RuntimeError(
            f'the backward pass of {function} cannot be differentiated again; backend="reference" can be, in much more '
            "time and memory"
        )

    return backward


class _OnceDifferentiable(torch.autograd.Function):
    """Tensors as they are, whose gradients cannot be differentiated: for a function of torch whose own error names what
    the caller has not called.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(_NeverDifferentiable.apply(x) if x is not None and x.requires_grad else x for x in gradients)


class _NeverDifferentiable(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        refuse_second_derivatives("topk_attention")(ctx)


def once_differentiable(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors; what is computed of them has a gradient, but that has none."""
    return _OnceDifferentiable.apply(*tensors)


def require_selection(ctx: Any, operator: str) -> None:
    if not ctx.has_selection:
        raise RuntimeError(f"{operator} needs save_selection=True for a backward pass")


def _in_order(inputs: type[tuple[Any, ...]], num_inputs: int, **gradients: Tensor | None) -> Gradients:
    """One gradient for each input of an operator, None for those that have none."""
    names = inputs._fields  # type: ignore[attr-defined]
    return (*map(gradients.get, names), *(None,) * (num_inputs - len(names)))
