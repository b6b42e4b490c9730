"""Top-k attention by the Triton kernels: two operators, their launches, and the entry point."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from ..autocast import without_autocast
from ..calls import AttentionCall, accumulation_dtype, adds_to_scores
from ..operators import (
    differentiate_topk_attention,
    empty_attention_gradients,
    empty_topk_results,
    padded_entries,
    refuse_second_derivatives,
    run_topk_attention,
    save_topk_attention,
)
from . import IS_INTERPRETED, keys
from .plan import PartOfBackward, k_tables, make_plan, parts_of_backward, power_of_2
from .rows import differentiate_rows_kernel, sum_values_kernel
from .scores import measure_keys_kernel, score_tiles_kernel
from .select import (
    cut_in_passes_kernel,
    cut_kernel,
    list_candidates_kernel,
    score_candidates_kernel,
    thresholds_kernel,
)

# The interpreter takes its time for an operation, however large, so its programs have many rows; a GPU's have one.
_BLOCK_ROWS = 256 if IS_INTERPRETED else 1
# How far two computations of a score may be apart, in units of the largest product of a query and a key: twice the
# roundings of D + 8 additions each, at 2 bits less than float32 has, as tensor cores add.
_SLACK_OF_A_ROUNDING = {tl.float32: 2.0**-20, tl.float64: 2.0**-49}


def attention(call: AttentionCall) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns output [B, H, N, E] and, where the call asks for them, indices [B, H, N, K] int32 and weights."""
    return run_topk_attention(call, topk_attention_op, padded_entries)


def pair(number: float) -> tuple[float, float]:
    """Two float32 whose sum is the number, to 48 bits: see `scores.number`."""
    high = float(np.float32(number))
    return high, float(np.float32(number - high))


def _strides(tensor: Tensor | None, count: int = 4) -> tuple[int, ...]:
    """Those of the first axes; 0 where an axis has one entry, so that it broadcasts."""
    if tensor is None:
        return (0,) * count
    sizes = zip(tensor.shape[:count], tensor.stride()[:count], strict=True)
    return tuple(0 if size == 1 else stride for size, stride in sizes)


def _with_contiguous_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


class _Kinds(NamedTuple):
    """What every kernel is told of the call's numbers."""

    acc: Any
    bits: int

    @staticmethod
    def of(dtype: torch.dtype) -> _Kinds:
        return _Kinds(tl.float64, 64) if dtype == torch.float64 else _Kinds(tl.float32, 32)


class _HeadK(NamedTuple):
    """Each head's k as the kernels read it: one number, or tables where heads differ."""

    one: int
    tables: tuple[Tensor | None, Tensor | None]
    total: int

    @staticmethod
    def of(head_k: Sequence[int], device: torch.device) -> _HeadK:
        if len(set(head_k)) == 1:
            return _HeadK(head_k[0], (None, None), sum(head_k))
        return _HeadK(0, k_tables(tuple(head_k), device), sum(head_k))

    @property
    def differs(self) -> bool:
        return self.tables[0] is not None


def _blocks(number: int, size: int) -> int:
    return -(-number // size)


@torch.library.custom_op("topk_attention::triton_topk_attention", mutates_args=())
@without_autocast
def topk_attention_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    bias: Tensor | None,
    relative_bias: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    head_k: Sequence[int],
    is_causal: bool,
    scale: float,
    softcap: float,
    dropout_p: float,
    save_selection: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns output [B, H, N, E] and the flat selection, indices int32 and weights, which is empty unless asked for.
    With sinks also the rows' log_sums [B, H, N], likewise.

    The selection lists, for each batch and head, [N, k] entries in ascending key order; -1 with weight 0 marks an empty
    slot. Weights are those before dropout.
    """
    batch, num_heads, num_queries, head_dim = query.shape
    num_key_heads, num_keys = key.shape[1:3]
    value_dim, group_size = value.shape[3], num_heads // max(num_key_heads, 1)
    output, indices, weights, log_sums = empty_topk_results(query, value, sinks, head_k, save_selection)
    if query.numel() == 0:
        return output, indices, weights, log_sums
    query, key, value = (_with_contiguous_rows(x) for x in (query, key, value))
    if relative_bias is not None:
        relative_bias = _with_contiguous_rows(relative_bias)
    kinds, ks, device = _Kinds.of(query.dtype), _HeadK.of(head_k, query.device), query.device
    dtype = accumulation_dtype(query.dtype)
    plan = make_plan(
        *(batch, num_heads, num_key_heads, num_queries, num_keys, head_dim, max(head_k)),
        itemsize=query.element_size(),
        adds=attn_mask is not None or adds_to_scores(attn_mask, bias, relative_bias),
        saves=save_selection,
        processors=_processors(device),
        interpreted=IS_INTERPRETED,
    )
    of_keys = (batch * num_key_heads, num_keys)
    broken, norms = torch.empty(of_keys, dtype=dtype, device=device), torch.empty(of_keys, dtype=dtype, device=device)
    rows_of_slab = plan.slab_tiles * plan.tile_rows
    new = query.new_empty
    maxima = new(rows_of_slab, plan.num_groups if plan.has_maxima else 0, dtype=dtype)
    thresholds = new(rows_of_slab, dtype=dtype)
    bits = new(rows_of_slab, plan.num_words, dtype=torch.int32)
    candidates, scores = (
        new(rows_of_slab, plan.capacity, dtype=torch.int32),
        new(rows_of_slab, plan.capacity, dtype=dtype),
    )
    counts = new(rows_of_slab, dtype=torch.int32)
    if not save_selection:
        indices, weights = (
            new(rows_of_slab, plan.padded_k, dtype=torch.int32),
            new(rows_of_slab, plan.padded_k, dtype=dtype),
        )

    of_query, of_key = query.stride()[:3], key.stride()[:3]
    added = (attn_mask, bias, relative_bias)
    of_added = (*_strides(attn_mask), *_strides(bias), _strides(relative_bias, 1)[0])
    mask_kind = 0 if attn_mask is None else 2 if attn_mask.is_floating_point() else 1
    of_inputs = {"mask_kind": mask_kind, "has_bias": bias is not None, "has_relative": relative_bias is not None}
    dims = {"head_dim": head_dim, "padded_dim": plan.padded_dim}
    entry_dims = {"head_dim": head_dim, "block_dims": min(plan.padded_dim, 64)}
    shape = (num_queries, num_keys, num_heads, group_size)
    scales = pair(scale)
    block_rows = min(_BLOCK_ROWS, rows_of_slab)
    tile_kinds = {
        **dims,
        **of_inputs,
        "acc": kinds.acc,
        "tile_rows": plan.tile_rows,
        "tile_keys": plan.tile_keys,
        "group_keys": plan.group_keys,
        "is_causal": is_causal,
        # Triton's interpreter multiplies the bits of bfloat16. In the accumulation dtype products of two are exact.
        "upcast": IS_INTERPRETED and query.dtype == torch.bfloat16,
        "stages": 2,
        "num_warps": plan.num_warps,
    }
    with _on(device):
        block = 64
        measure_keys_kernel[(_blocks(num_keys, block), batch * num_key_heads)](
            *(key, broken, norms, *of_key, num_keys, num_key_heads), acc=kinds.acc, **dims, block=block
        )
        largest_norms = norms.amax(1)
        if not plan.has_maxima:
            thresholds.fill_(-torch.inf)
        for first_tile in range(0, plan.num_tiles, plan.slab_tiles):
            num_tiles = min(plan.slab_tiles, plan.num_tiles - first_tile)
            num_rows = num_tiles * plan.tile_rows
            in_rows = _blocks(num_rows, block_rows)
            of_slab = (*shape, first_tile, num_rows)
            of_rows = {"tile_rows": plan.tile_rows, "block_rows": block_rows}

            def score_tiles(writes_bits: bool, first_tile: int = first_tile, num_tiles: int = num_tiles) -> None:
                score_tiles_kernel[(num_tiles, plan.splits)](
                    *(query, key, broken, *added, maxima, thresholds, bits, *of_query, *of_key, *of_added),
                    *(*shape, first_tile, plan.keys_of_split, plan.num_groups, plan.num_words, *scales),
                    **tile_kinds,
                    writes_bits=writes_bits,
                )

            if plan.has_maxima:
                score_tiles(False)
                thresholds_kernel[(in_rows,)](
                    *(maxima, thresholds, query, largest_norms, ks.tables[0], *of_query, *of_slab),
                    *(plan.num_groups, ks.one, abs(scales[0])),
                    **dims,
                    **of_rows,
                    acc=kinds.acc,
                    bits=kinds.bits,
                    group_keys=plan.group_keys,
                    slack=_SLACK_OF_A_ROUNDING[kinds.acc] * (head_dim + 8),
                    is_causal=is_causal,
                    has_head_k=ks.differs,
                    block_groups=min(power_of_2(plan.num_groups), 1024),
                )
            score_tiles(True)
            list_candidates_kernel[(in_rows,)](
                *(bits, candidates, counts, *of_slab, plan.num_words),
                **of_rows,
                capacity=plan.capacity,
                is_causal=is_causal,
                block_words=min(power_of_2(plan.num_words), 256),
            )
            block_entries = min(plan.capacity, 256 if IS_INTERPRETED else 32)
            score_candidates_kernel[(in_rows, _blocks(plan.capacity, block_entries))](
                *(query, key, broken, *added, candidates, counts, scores, *of_query, *of_key, *of_added, *of_slab),
                *scales,
                **entry_dims,
                **of_rows,
                **of_inputs,
                acc=kinds.acc,
                capacity=plan.capacity,
                block_entries=block_entries,
            )
            if plan.capacity < num_keys:  # otherwise there is room for all of them
                cut_in_passes_kernel[(in_rows,)](
                    *(query, key, broken, *added, bits, ks.tables[0], candidates, counts, scores),
                    *(*of_query, *of_key, *of_added, *of_slab, plan.num_words, ks.one, *scales),
                    **entry_dims,
                    **of_rows,
                    **of_inputs,
                    acc=kinds.acc,
                    bits=kinds.bits,
                    capacity=plan.capacity,
                    is_causal=is_causal,
                    has_head_k=ks.differs,
                    block_entries=128 if IS_INTERPRETED else 64,
                )
            for fewest, most in ((-1, plan.few), (plan.few, plan.capacity)):
                if fewest < most:
                    cut_kernel[(in_rows,)](
                        *(candidates, counts, scores, *ks.tables, sinks, indices, weights, log_sums),
                        *(num_queries, num_heads, group_size, first_tile, num_rows, ks.one, ks.total, *pair(softcap)),
                        **of_rows,
                        acc=kinds.acc,
                        bits=kinds.bits,
                        capacity=plan.capacity,
                        fewest=fewest,
                        most=most,
                        padded_k=plan.padded_k,
                        has_head_k=ks.differs,
                        has_sinks=sinks is not None,
                        saves_sums=log_sums.numel() > 0,
                        has_cap=softcap > 0,
                        is_saved=save_selection,
                    )
            sum_values_kernel[(in_rows,)](
                *(value, output, indices, weights, seed, *ks.tables, *value.stride()[:3], *output.stride()[:3]),
                *(num_queries, num_heads, group_size, first_tile, num_rows, ks.one, ks.total),
                *(round(dropout_p * 2**32), *pair(1 / (1 - dropout_p) if dropout_p < 1 else 0.0)),
                **of_rows,
                acc=kinds.acc,
                value_dim=value_dim,
                block_dims=min(power_of_2(value_dim), 64),
                padded_k=plan.padded_k,
                has_head_k=ks.differs,
                drops=seed is not None,
                is_saved=save_selection,
            )
    if not save_selection:
        indices, weights = indices.new_empty(0), weights.new_empty(0)
    return output, indices, weights, log_sums


@topk_attention_op.register_fake
def _(query, key, value, attn_mask, bias, relative_bias, sinks, seed, head_k, *options) -> tuple[Tensor, ...]:
    return empty_topk_results(query, value, sinks, head_k, options[-1])


@torch.library.custom_op("topk_attention::triton_topk_attention_backward", mutates_args=())
@without_autocast
def topk_attention_backward_op(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seed: Tensor | None,
    indices: Tensor,
    weights: Tensor,
    head_k: Sequence[int],
    scale: float,
    softcap: float,
    dropout_p: float,
    query_wanted: bool,
    key_wanted: bool,
    value_wanted: bool,
    means_wanted: bool,
    bias_shape: Sequence[int],
    relative_bias_shape: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns `AttentionGradients`.

    Those not wanted are left out, for a bias where its shape is empty; their places hold empty tensors. The gradients
    of the biases come in the accumulation dtype.
    """
    wanted = (query_wanted, key_wanted, value_wanted, means_wanted)
    dtype, device = weights.dtype, query.device
    batch, num_heads, num_queries, head_dim = query.shape
    num_key_heads, num_keys, value_dim = *key.shape[1:3], value.shape[3]
    results = empty_attention_gradients(query, key, value, wanted, bias_shape, relative_bias_shape, dtype)
    if query_wanted:  # the kernels write rows, whatever the layout of the inputs
        results = results._replace(query=torch.empty_like(query, memory_format=torch.contiguous_format))
    if key_wanted:
        results = results._replace(key=torch.zeros_like(key, memory_format=torch.contiguous_format))
    if value_wanted:
        results = results._replace(value=torch.zeros_like(value, memory_format=torch.contiguous_format))
    for of_bias in (results.bias, results.relative_bias):
        of_bias.zero_()
    if query.numel() == 0 or grad_output.numel() == 0:
        results.query.zero_()
        results.mean_grads.zero_()
        return results
    group_size = num_heads // num_key_heads
    query, key, value, grad_output = (_with_contiguous_rows(x) for x in (query, key, value, grad_output))
    kinds, ks, scales = _Kinds.of(query.dtype), _HeadK.of(head_k, device), pair(scale)
    tile_rows = max(16, min(128, power_of_2(num_queries * group_size)))
    tiles_of_key_head = _blocks(num_queries * group_size, tile_rows)
    padded_k, block_dims = max(16, power_of_2(max(head_k))), min(power_of_2(max(head_dim, value_dim)), 64)
    grad_query = results.query if query_wanted else query
    bias_target = torch.zeros(results.bias.numel() + 1, dtype=dtype, device=device)
    for part in parts_of_backward(head_k, batch, num_key_heads, num_queries):
        num_rows = len(part.key_heads) * tiles_of_key_head * tile_rows
        block_rows = min(_BLOCK_ROWS, num_rows)
        num_targets = len(part.key_heads) * num_keys
        fits = num_targets < 2**31
        entries = len(part.entries)
        new = query.new_empty
        grad_added, sources = new(entries, dtype=dtype), new(entries, dtype=torch.int32)
        grad_scores = new(entries, dtype=dtype) if softcap > 0 else grad_added
        targets = new(entries, dtype=torch.int32 if fits else torch.int64)
        own = slice(part.entries.start, part.entries.stop)
        value_weights = new(entries, dtype=dtype) if seed is not None else weights[own]
        with _on(device):
            differentiate_rows_kernel[(_blocks(num_rows, block_rows),)](
                *(grad_output, query, key, value, grad_query, indices, weights, grad_added, grad_scores, value_weights),
                *(targets, sources, results.mean_grads, seed, *ks.tables),
                *(x for tensor in (grad_output, query, key, value, grad_query) for x in tensor.stride()[:3]),
                *(num_queries, num_keys, num_heads, group_size, part.key_heads.start * tiles_of_key_head, num_rows),
                *(part.entries.start, part.key_heads.start, num_targets, ks.one, ks.total, *scales, *pair(softcap)),
                *(round(dropout_p * 2**32), *pair(1 / (1 - dropout_p) if dropout_p < 1 else 0.0)),
                acc=kinds.acc,
                head_dim=head_dim,
                value_dim=value_dim,
                block_dims=block_dims,
                tile_rows=tile_rows,
                padded_k=padded_k,
                has_head_k=ks.differs,
                drops=seed is not None,
                has_cap=softcap > 0,
                wants_query=query_wanted,
                wants_means=means_wanted,
                block_rows=block_rows,
            )
            if key_wanted or value_wanted:
                segments = keys.cut_into_segments(targets, num_targets, keys.SEGMENT)
                for is_wanted, result, entry_weights, rows, scale_of_sum in (
                    (key_wanted, results.key, grad_scores, query, scales),
                    (value_wanted, results.value, value_weights, grad_output, (1.0, 0.0)),
                ):
                    if is_wanted:
                        of_part = result.view(batch * num_key_heads, num_keys, -1)[
                            part.key_heads.start : part.key_heads.stop
                        ]
                        _sum_by_target(segments, of_part, entry_weights, rows, sources, scale_of_sum, kinds.acc)
        if bias_shape or relative_bias_shape:
            rows_of_entries, kept = sources.long(), indices[own].long()
            n = rows_of_entries % num_queries
            h = rows_of_entries.div(num_queries, rounding_mode="floor") % num_heads
            b = rows_of_entries.div(num_queries * num_heads, rounding_mode="floor")
            if bias_shape:
                place = torch.zeros_like(kept)
                strides = results.bias.contiguous().stride()
                for position, size, stride in zip((b, h, n, kept), bias_shape, strides, strict=True):
                    if size != 1:
                        place += position * stride
                place = torch.where(kept < 0, results.bias.numel(), place)
                if list(bias_shape[2:]) == [num_queries, num_keys]:
                    _add_head_by_head(bias_target, place, grad_added, head_k, part, group_size, num_queries)
                else:
                    _add_scalars(bias_target, place, grad_added, kinds.acc)
            if relative_bias_shape:
                place = kept - n + num_queries - 1
                if relative_bias_shape[0] != 1:
                    place += h * relative_bias_shape[1]
                place = torch.where(kept < 0, results.relative_bias.numel(), place)
                _add_scalars(results.relative_bias.view(-1), place, grad_added, kinds.acc)
    if bias_shape:
        results = results._replace(bias=bias_target[:-1].view(tuple(bias_shape)))
        results = results._replace(bias=results.bias.clone())  # no view of a longer tensor leaves an operator
    return results


def _sum_by_target(
    segments: keys.Segments,
    result: Tensor,
    weights: Tensor,
    rows: Tensor,
    sources: Tensor,
    scale: tuple[float, float],
    acc: Any,
) -> None:
    """result[target] = scale * the sum over its entries of weight times row; result [heads, M, dim], contiguous."""
    num_targets, dim = result.shape[0] * result.shape[1], result.shape[2]
    most, block_segments = segments.of_segment.shape[0], 64 if IS_INTERPRETED else 1
    padded_dim = max(16, power_of_2(dim))
    partial = weights.new_empty(max(segments.num_partial, 1), dim)
    _, num_heads, num_queries, _ = rows.shape
    keys.sum_entries_kernel[(_blocks(most, block_segments),)](
        *(rows, result, partial, *segments[:5], weights, sources, *rows.stride()[:3]),
        *(num_queries, num_heads, num_targets, most, *scale),
        acc=acc,
        dim=dim,
        padded_dim=padded_dim,
        segment=keys.SEGMENT,
        block_entries=16 if IS_INTERPRETED else max(1, 4096 // padded_dim),
        block_segments=block_segments,
    )
    if segments.num_partial > 0:
        _join(segments, result, partial, num_targets, dim, acc)


def _join(segments: keys.Segments, result: Tensor, partial: Tensor, num_targets: int, dim: int, acc: Any) -> None:
    padded_dim = max(1, power_of_2(dim))
    block_targets = 256 if IS_INTERPRETED or dim == 1 else 1
    keys.join_segments_kernel[(_blocks(num_targets, block_targets),)](
        *(result, partial, segments.first_segment, segments.partial, num_targets),
        acc=acc,
        dim=dim,
        padded_dim=padded_dim,
        block_targets=block_targets,
    )


def _add_scalars(to: Tensor, targets: Tensor, numbers: Tensor, acc: Any) -> None:
    """to[target] += the sum of its numbers, in their order; targets beyond the end of `to` are dropped."""
    segments = keys.cut_into_segments(targets, to.shape[0], keys.SEGMENT)
    most, block_segments = segments.of_segment.shape[0], 64 if IS_INTERPRETED else 1
    sums, partial = torch.empty_like(to), to.new_empty(max(segments.num_partial, 1))
    with _on(to.device):
        keys.sum_scalars_kernel[(_blocks(most, block_segments),)](
            *(sums, partial, *segments[:5], numbers, to.shape[0], most),
            acc=acc,
            segment=keys.SEGMENT,
            block_entries=16 if IS_INTERPRETED else 128,
            block_segments=block_segments,
        )
        if segments.num_partial > 0:
            _join(segments, sums, partial, to.shape[0], 1, acc)
    to += sums


def _add_head_by_head(
    to: Tensor,
    targets: Tensor,
    numbers: Tensor,
    head_k: Sequence[int],
    part: PartOfBackward,
    group_size: int,
    num_queries: int,
) -> None:
    """The same where no two entries of one head have the same target: then nothing has to be sorted."""
    num_key_heads = len(head_k) // group_size
    first = 0
    for key_head in part.key_heads:
        for k in head_k[key_head % num_key_heads * group_size :][:group_size]:
            own = slice(first, first + num_queries * k)
            to[targets[own]] += numbers[own]
            first = own.stop


@topk_attention_backward_op.register_fake
def _(grad_output, query, key, value, seed, indices, weights, head_k, scale, softcap, dropout_p, *wanted):
    *are_wanted, bias_shape, relative_shape = wanted
    empty = empty_attention_gradients(query, key, value, are_wanted, bias_shape, relative_shape, weights.dtype)
    return tuple(x.contiguous() for x in empty)


topk_attention_op.register_autograd(
    differentiate_topk_attention("triton_topk_attention", topk_attention_backward_op),
    setup_context=save_topk_attention,
)
topk_attention_backward_op.register_autograd(refuse_second_derivatives("topk_attention"))
