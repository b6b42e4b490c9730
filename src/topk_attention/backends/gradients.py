"""What the operators of several backends share: what they save for the backward pass, and whose its gradients are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def save_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """setup_context of operators that take query, key, value, attn_mask, bias, relative_bias, seed, head_k, is_causal,
    scale, dropout_p and, last, save_selection, and return the output, indices and weights."""
    query, key, value, _, bias, relative_bias, seed, head_k, _, scale, dropout_p, *_, save_selection = inputs
    _, indices, weights = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(indices, weights)
    ctx.save_for_backward(query, key, value, seed, indices, weights)
    ctx.head_k, ctx.scale, ctx.dropout_p, ctx.has_selection = head_k, scale, dropout_p, save_selection
    ctx.num_inputs = len(inputs)
    # Shapes alone: the biases themselves are not needed again.
    ctx.bias, ctx.relative_bias = (
        (tuple(x.shape), x.dtype) if x is not None and x.requires_grad else ((), None) for x in (bias, relative_bias)
    )


def differentiate_attention(operator: str, backward_op: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Any]:
    """The backward function of such an operator, given the one that computes the gradients of query, key, value, bias
    and relative_bias."""

    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if grad_output is None:
            return (None,) * ctx.num_inputs
        if not ctx.has_selection:
            raise RuntimeError(f"{operator} needs save_selection=True for a backward pass")
        saved = ctx.saved_tensors  # once: under activation checkpointing each read computes them anew
        # Frozen keys and values, as in cross attention to a frozen encoder, get no gradient that would be thrown away.
        wanted = ctx.needs_input_grad[:3]
        shapes, dtypes = zip(ctx.bias, ctx.relative_bias, strict=True)
        gradients = backward_op(grad_output, *saved, ctx.head_k, ctx.scale, ctx.dropout_p, *wanted, *shapes)
        return (
            *(
                gradient.to(x.dtype) if is_wanted else None
                for gradient, x, is_wanted in zip(gradients[:3], saved[:3], wanted, strict=True)
            ),
            None,
            *(gradient.to(dtype) if dtype else None for gradient, dtype in zip(gradients[3:], dtypes, strict=True)),
            *(None,) * (ctx.num_inputs - 6),
        )

    return backward


def save_feed_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """setup_context of operators that take x, w_in, w_out, w_gate, b_in, b_gate, b_out, seed, k, then options of the
    backward pass and, last, save_selection, and return the output, neurons, values and gates."""
    *saved, _, seed = inputs[:8]  # b_out is not needed again
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*saved, seed, *output[1:])
    ctx.options, ctx.has_selection, ctx.num_inputs = inputs[9:-1], inputs[-1], len(inputs)


def differentiate_feed_forward(operator: str, backward_op: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Any]:
    """The backward function of such an operator, given the one that computes the gradients of x, w_in, w_out
    transposed, w_gate, b_in and b_gate."""

    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if grad_output is None:
            return (None,) * ctx.num_inputs
        if not ctx.has_selection:
            raise RuntimeError(f"{operator} needs save_selection=True for a backward pass")
        # Frozen weights, as under LoRA, get no [F, D] gradient that would be thrown away.
        wanted = list(ctx.needs_input_grad[:7])
        gradients: list[Tensor | None] = [None] * 6
        if any(wanted[:6]):
            gradients = [
                gradient if is_wanted else None
                for gradient, is_wanted in zip(
                    backward_op(grad_output, *ctx.saved_tensors, *ctx.options, wanted[1:4]), wanted[:6], strict=True
                )
            ]
        grad_x, grad_w_in, grad_w_out_t, *others = gradients
        return (
            grad_x,
            grad_w_in,
            None if grad_w_out_t is None else grad_w_out_t.t(),
            *others,
            grad_output.sum(0) if wanted[6] else None,
            *(None,) * (ctx.num_inputs - 7),
        )

    return backward


def empty_feed_forward_gradients(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    w_gate: Tensor | None,
    b_in: Tensor | None,
    b_gate: Tensor | None,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    """Tensors like those that the backward operators return; `wanted` is for w_in, w_out and w_gate."""
    w_in_wanted, w_out_wanted, w_gate_wanted = wanted
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty(w_in.shape if w_in_wanted else 0),
        x.new_empty(w_out.shape[::-1] if w_out_wanted else 0),
        x.new_empty(w_gate.shape if w_gate is not None and w_gate_wanted else 0),
        x.new_empty(b_in.shape if b_in is not None else 0),
        x.new_empty(b_gate.shape if b_gate is not None else 0),
    )
