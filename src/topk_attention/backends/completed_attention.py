"""Completed top-k attention, one operator over the backends "cpu" and "chunked": see `functional.completion`.

A backend computes rows. This file gives it the sums over all keys that each row sees, and adds to the gradients what
each row sends to all of them: `visible_keys`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import chunked, cpu
from .autocast import without_autocast
from .calls import AttentionCall, KeySums, accumulation_dtype, empty_output
from .operators import (
    Gradients,
    TopKBackwardInputs,
    TopKInputs,
    empty_attention_gradients,
    empty_topk_results,
    gradient_of_sinks,
    is_transformed,
    needs_gradient,
    refuse_second_derivatives,
    require_selection,
)
from .visible_keys import INTERVAL, VisibleKeys

_BACKENDS = {"chunked": chunked, "cpu": cpu}


def attention(call: AttentionCall, backend: str) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns output [B, H, N, E] and, where the call asks for them, indices [B, H, N, K] int32 and weights."""
    assert call.head_k is not None
    assert call.mass_scale is not None
    value = call.value
    if value.shape[3] == 0:  # the selection is wanted all the same
        value = torch.nn.functional.pad(value, (0, 1))
    sums: Any = call.sums if call.sums is not None else (None, None, None)
    wants_gradient = needs_gradient(*call.differentiable())
    save_selection = call.return_selection or wants_gradient
    # An operator written in Python takes 0.1 ms a call. It is needed for gradients, compiled code and torch.func alone.
    run: Callable[..., tuple[Tensor, ...]] = completed_attention_op
    if not wants_gradient and not is_transformed():
        run = partial(_forward, cpu.index_inputs(call) if backend == "cpu" else None)
    output, indices, weights, *_ = run(
        *(call.query, call.key, value, call.attn_mask, call.bias, call.relative_bias, call.mass_scale, call.sinks),
        *(call.seed, *sums, call.head_k, call.is_causal, call.scale, call.dropout_p, call.rest_lift),
        *(call.query_chunk_size, backend, save_selection),
    )
    output = output[..., : call.value.shape[3]]
    if not call.return_selection:
        return output, None, None
    padded = _BACKENDS[backend].padded_entries
    return output, padded(indices, call, call.head_k, -1), padded(weights, call, call.head_k, 0)


def _forward(
    index: tuple[Tensor | int | bool, ...] | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    bias: Tensor | None,
    relative_bias: Tensor | None,
    mass_scale: Tensor,
    sinks: Tensor | None,
    seed: Tensor | None,
    key_sum: Tensor | None,
    value_sum: Tensor | None,
    product_sum: Tensor | None,
    head_k: Sequence[int],
    is_causal: bool,
    scale: float,
    dropout_p: float,
    rest_lift: float,
    query_chunk_size: int | None,
    backend: str,
    save_selection: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output [B, H, N, E], the backend's flat selection, log_sums with sinks, and for each row, [B, H, N], the rest's
    weight at a scale of 1 and the slot of the smallest kept score, int32; then the sums over keys, of keys, values and
    their products.

    The selection, indices int32 and weights, is empty unless it is asked for. So are the sums, and where the backward
    pass sums anew: `VisibleKeys.saved_sums_shape`.

    index  what "cpu" reads of an index of the keys; None for other backends, and in the operator
    """
    dtype = accumulation_dtype(query.dtype)
    saves_sums = sinks is not None and save_selection
    no_sums = (query.new_empty(0, dtype=dtype), query.new_empty(0, dtype=dtype), query.new_empty(0, dtype=dtype))
    if query.numel() == 0:
        return (
            empty_output(query, value),
            torch.empty(0, dtype=torch.int32, device=query.device),
            query.new_empty(0, dtype=dtype),
            query.new_empty(query.shape[:3] if saves_sums else (0,), dtype=dtype),
            query.new_empty(query.shape[:3], dtype=dtype),
            query.new_empty(query.shape[:3], dtype=torch.int32),
            *no_sums,
        )
    visible = VisibleKeys(
        query, key, value, attn_mask, bias, relative_bias, is_causal, scale, rest_lift, _faster_sums(backend)
    )
    totals = _key_sums(key_sum, value_sum, product_sum)
    rest = visible.sums(mass_scale, totals)
    if relative_bias is not None:
        relative_bias = relative_bias.to(visible.dtype)
    tensors = (query, key, value, attn_mask, bias, relative_bias, sinks, seed)
    inputs = TopKInputs(*tensors, head_k, is_causal, scale, 0.0, dropout_p)
    of_index = () if index is None else (index,)
    results = _BACKENDS[backend].completed_forward(inputs, query_chunk_size, save_selection, rest, *of_index)
    if not save_selection or visible.saved_sums_shape(totals is not None) is None:
        return *results, *no_sums
    assert rest.products is not None
    return *results, rest.key_sums, rest.value_sums, rest.products


completed_attention_op = torch.library.custom_op(
    "topk_attention::completed_attention", without_autocast(partial(_forward, None)), mutates_args=()
)


@completed_attention_op.register_fake
def _(query, key, value, attn_mask, bias, relative_bias, mass_scale, sinks, seed, *inputs):
    key_sum, _, _, head_k, is_causal, scale, _, rest_lift, *_ = inputs
    save_selection = inputs[-1]
    dtype = accumulation_dtype(query.dtype)
    visible = VisibleKeys(query, key, value, attn_mask, bias, relative_bias, is_causal, scale, rest_lift)
    shape = visible.saved_sums_shape(key_sum is not None) if save_selection and query.numel() > 0 else None
    dims = ((key.shape[3],), (value.shape[3],), (key.shape[3], value.shape[3]))
    return (
        *empty_topk_results(query, value, sinks, head_k, save_selection),
        query.new_empty(query.shape[:3], dtype=dtype),
        query.new_empty(query.shape[:3], dtype=torch.int32),
        *(query.new_empty(0 if shape is None else (*shape, *dim), dtype=dtype) for dim in dims),
    )


@torch.library.custom_op("topk_attention::completed_attention_backward", mutates_args=())
@without_autocast
def completed_attention_backward_op(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    bias: Tensor | None,
    relative_bias: Tensor | None,
    mass_scale: Tensor,
    sinks: Tensor | None,
    seed: Tensor | None,
    key_sum: Tensor | None,
    value_sum: Tensor | None,
    product_sum: Tensor | None,
    indices: Tensor,
    weights: Tensor,
    log_sums: Tensor,
    mass: Tensor,
    cuts: Tensor,
    saved_keys: Tensor,
    saved_values: Tensor,
    saved_products: Tensor,
    head_k: Sequence[int],
    is_causal: bool,
    scale: float,
    dropout_p: float,
    rest_lift: float,
    backend: str,
    query_wanted: bool,
    key_wanted: bool,
    value_wanted: bool,
    sinks_wanted: bool,
    bias_shape: Sequence[int],
    relative_bias_shape: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of query, key, value, bias, relative_bias, sinks and mass_scale.

    All but the last are left out where they are not wanted; their places hold empty tensors.
    """
    wanted = (query_wanted, key_wanted, value_wanted, sinks_wanted)
    grad_sinks = torch.zeros_like(mass_scale) if sinks_wanted else mass_scale.new_empty(0)
    if query.numel() == 0:
        empty = empty_attention_gradients(query, key, value, wanted, bias_shape, relative_bias_shape, weights.dtype)
        query, key, value, bias, relative_bias, _ = (x.contiguous().zero_() for x in empty)
        return query, key, value, bias, relative_bias, grad_sinks, torch.zeros_like(mass_scale)
    visible = VisibleKeys(
        query, key, value, attn_mask, bias, relative_bias, is_causal, scale, rest_lift, _faster_sums(backend)
    )
    totals = _key_sums(key_sum, value_sum, product_sum)
    saved = KeySums(saved_keys, saved_values, saved_products) if saved_products.numel() > 0 else None
    rest = visible.sums(mass_scale, totals, grad_output, saved)
    inputs = TopKBackwardInputs(grad_output, query, key, value, seed, indices, weights, head_k, scale, 0.0, dropout_p)
    gradients, of_rest = _BACKENDS[backend].completed_backward(
        inputs, wanted, bias_shape, relative_bias_shape, is_causal, mass, cuts, rest
    )
    of_tables = (gradients.key if key_wanted else None, gradients.value if value_wanted else None)
    if backend == "cpu" and visible.grow_from_row_to_row:
        mask = visible.key_mask()
        mask = None if mask is None else mask[:, 0]
        cpu.send_rest(query, grad_output, rest.key, rest.value, of_rest, scale, mask, INTERVAL, *of_tables)
    elif key_wanted or value_wanted:
        visible.add_gradients(of_rest, grad_output, *of_tables)
    visible.add_bias_gradients(of_rest.bias, gradients.bias, gradients.relative_bias)
    grad_mass_scale = of_rest.mass_scale.sum((0, 2), dtype=torch.float64).to(mass_scale.dtype)
    if sinks_wanted:
        of_sinks = gradient_of_sinks(sinks, log_sums, gradients.mean_grads)
        assert of_sinks is not None
        grad_sinks = of_sinks
    return (
        gradients.query.contiguous(),
        gradients.key.to(key.dtype).contiguous(),
        gradients.value.to(value.dtype).contiguous(),
        gradients.bias.to(weights.dtype),
        gradients.relative_bias.to(weights.dtype),
        grad_sinks,
        grad_mass_scale,
    )


@completed_attention_backward_op.register_fake
def _(grad_output, query, key, value, attn_mask, bias, relative_bias, mass_scale, *inputs):
    weights, (*wanted, bias_shape, relative_bias_shape) = inputs[6], inputs[-6:]
    empty = empty_attention_gradients(query, key, value, wanted, bias_shape, relative_bias_shape, weights.dtype)
    grad_sinks = torch.empty_like(mass_scale) if wanted[3] else mass_scale.new_empty(0)
    return *(x.contiguous() for x in empty[:5]), grad_sinks, torch.empty_like(mass_scale)


def _faster_sums(backend: str) -> Callable[[Tensor, Tensor, int], KeySums] | None:
    return cpu.sum_intervals if backend == "cpu" else None


def _key_sums(keys: Tensor | None, values: Tensor | None, products: Tensor | None) -> KeySums | None:
    return None if keys is None or values is None or products is None else KeySums(keys, values, products)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, head_k, is_causal, scale, dropout_p, rest_lift, _, backend, has_selection = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.options, ctx.has_selection, ctx.num_inputs = (
        (head_k, is_causal, scale, dropout_p, rest_lift, backend),
        has_selection,
        len(inputs),
    )


def _differentiate(ctx: Any, grad_output: Tensor | None, *_: Any) -> Gradients:
    if grad_output is None:
        return (None,) * ctx.num_inputs
    require_selection(ctx, "completed_attention")
    saved = ctx.saved_tensors  # read once: under activation checkpointing each read computes them again
    _, key, value, _, bias, relative_bias, *_ = saved
    wanted = (*ctx.needs_input_grad[:3], ctx.needs_input_grad[7])
    shapes = [
        tuple(x.shape) if x is not None and is_wanted else ()
        for x, is_wanted in zip((bias, relative_bias), ctx.needs_input_grad[4:6], strict=True)
    ]
    *gradients, grad_sinks, grad_mass_scale = completed_attention_backward_op(
        grad_output, *saved, *ctx.options, *wanted, *shapes
    )
    query, key, value = (x if is_wanted else None for x, is_wanted in zip(gradients[:3], wanted[:3], strict=True))
    of_biases = (
        gradient.to(x.dtype) if shape else None
        for gradient, x, shape in zip(gradients[3:], (bias, relative_bias), shapes, strict=True)
    )
    of_mass_scale = grad_mass_scale if ctx.needs_input_grad[6] else None
    given = (query, key, value, None, *of_biases, of_mass_scale, grad_sinks if wanted[3] else None)
    return (*given, *(None,) * (ctx.num_inputs - len(given)))


completed_attention_op.register_autograd(_differentiate, setup_context=_save)
completed_attention_backward_op.register_autograd(refuse_second_derivatives("topk_attention"))
