"""Top-k attention as two operators, forward and backward. The entry point chooses between them and full attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autocast import without_autocast
from ..calls import AttentionCall, RestGradients, RestInputs, empty_output
from ..dropout import keep_mask
from ..operators import (
    AttentionGradients,
    TopKBackwardInputs,
    TopKInputs,
    differentiate_topk_attention,
    empty_attention_gradients,
    empty_topk_results,
    refuse_second_derivatives,
    run_topk_attention,
    save_topk_attention,
)
from . import full_attention
from .rest import differentiate, seen_by, weigh, zero_in
from .rows import dot_with_rows, transpose_selection, weighted_sum_by_target, weighted_sum_of_rows
from .scores import ScoreInputs, query_rows, score_tile, slope_of_soft_cap, soft_capped
from .selection import select_topk
from .tables import Tables, part_of_heads, row_table_starts, zero_gradients
from .tiles import (
    HeadGroup,
    Step,
    backward_rows,
    entries_of,
    head_groups,
    num_entries,
    row_numbers,
    rows_of,
    rows_of_heads,
    split,
    steps,
    tile_shape,
    write_rows,
)


def attention(call: AttentionCall) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns output [B, H, N, E] and, where the call asks for them, indices [B, H, N, K] int32 and weights."""
    if call.is_full_attention() and not call.return_selection:
        return full_attention.full_attention(call), None, None
    return run_topk_attention(call, topk_attention_op, padded_entries, call.query_chunk_size)


def padded_entries(selection: Tensor, call: AttentionCall, head_k: Sequence[int], fill: int) -> Tensor:
    """A flat selection as [B, H, N, K], K the largest k; unused slots hold `fill`."""
    batch, num_heads, num_queries, _ = call.query.shape
    padded = selection.new_full((batch, num_heads, num_queries, max((0, *head_k))), fill)
    for group in head_groups(head_k, batch, call.key.shape[1], num_queries):
        heads = slice(group.query_heads.start, group.query_heads.stop)
        padded[:, heads, :, : group.k] = entries_of(selection, group, batch, num_queries)
    return padded


@torch.library.custom_op("topk_attention::chunked_topk_attention", mutates_args=())
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
    query_chunk_size: int | None,
    save_selection: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns output [B, H, N, E] and the flat selection, indices int32 and weights, which is empty unless asked for.
    With sinks also the rows' log_sums [B, H, N], likewise.

    The selection lists, for each head group, [B, heads, N, k] entries in ascending key order; -1 with weight 0 marks
    an empty slot. Weights are those before dropout.
    """
    tensors = (query, key, value, attn_mask, bias, relative_bias, sinks, seed)
    inputs = TopKInputs(*tensors, head_k, is_causal, scale, softcap, dropout_p)
    return completed_forward(inputs, query_chunk_size, save_selection, None)[:4]


def completed_forward(
    call: TopKInputs,
    query_chunk_size: int | None,
    save_selection: bool,
    rest: RestInputs | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `topk_attention_op` returns, and for a rest its weight at a scale of 1 and the slot of the smallest score.

    Both are [B, H, N], empty without a rest.
    """
    query, key, value, attn_mask, bias, relative_bias, sinks, seed, head_k, is_causal, scale, softcap, dropout_p = call
    inputs = ScoreInputs(query, key.shape[2], attn_mask, bias, relative_bias, is_causal, scale, softcap)
    batch, num_heads, num_queries, _ = query.shape
    dtype = inputs.dtype
    tables = Tables(key, value, dtype)
    output = empty_output(query, value)
    num_saved = num_entries(head_k, batch, num_queries) if save_selection else 0
    saved_indices = torch.empty(num_saved, dtype=torch.int32, device=query.device)
    saved_weights = torch.empty(num_saved, dtype=dtype, device=query.device)
    saved_mass = query.new_empty(query.shape[:3] if rest is not None else (0,), dtype=dtype)
    saved_cuts = torch.empty_like(saved_mass, dtype=torch.int32)
    saves_sums = sinks is not None and save_selection
    saved_log_sums = query.new_empty(query.shape[:3] if saves_sums else (0,), dtype=dtype)
    for group in head_groups(head_k, batch, key.shape[1], num_queries) if output.numel() > 0 else ():
        shape = tile_shape(group, num_queries, inputs.num_keys, dtype.itemsize, query_chunk_size)
        memory = None
        for step in steps(group, batch, num_queries, shape.query_chunk, shape.rows_per_step):
            if memory is None:  # no later step is larger than the first
                memory = query.new_empty(step.num_rows * shape.key_block, dtype=dtype)
            key_table, value_table = tables.of(step)
            chosen = _choose(inputs, step, group.k, key_table, shape.key_block, memory, sinks)
            in_table = _table_indices(chosen.indices, step, inputs.num_keys)
            weighed = None
            if rest is not None:
                scaled_query = query_rows(inputs, step).view(step.num_rows, -1)
                seen = seen_by(rest, step, scaled_query, num_queries, inputs.is_causal)
                log_sums = chosen.log_sums
                if log_sums is None:
                    log_sums = chosen.scores.logsumexp(1, keepdim=True)
                of_kept = (chosen.scores, chosen.empty_slots, chosen.weights, log_sums)
                weighed = weigh(scaled_query, seen, key_table, in_table, *of_kept)
                chosen = chosen._replace(weights=weighed.weights, log_sums=weighed.log_sums)
                write_rows(saved_mass.unsqueeze(3), step, weighed.mass)
                write_rows(saved_cuts.unsqueeze(3), step, weighed.cut.int())
            if save_selection:
                _save(chosen.saved_indices, saved_indices, group, step, batch, num_queries)
                _save(chosen.weights, saved_weights, group, step, batch, num_queries)
            if saves_sums and chosen.log_sums is not None:
                write_rows(saved_log_sums.unsqueeze(3), step, chosen.log_sums)
            weights = chosen.weights
            if seed is not None:
                rows = row_numbers(step, num_heads, num_queries, query.device)
                weights = _drop(weights, _survivors(seed, rows, chosen.indices, dropout_p), dropout_p)
            if weighed is not None:
                weights = zero_in(chosen.empty_slots, weights - weighed.from_rest)
            result = weighted_sum_of_rows(value_table, in_table, weights)
            if weighed is not None:
                result.addcmul_(weighed.share, weighed.value_sum)
            if chosen.empty_slots is not None:
                result.masked_fill_(chosen.empty_slots[:, :1], 0)
            write_rows(output, step, result)
    return output, saved_indices, saved_weights, saved_log_sums, saved_mass, saved_cuts


@topk_attention_op.register_fake
def _(query, key, value, attn_mask, bias, relative_bias, sinks, seed, head_k, *options) -> tuple[Tensor, ...]:
    return empty_topk_results(query, value, sinks, head_k, options[-1])


@torch.library.custom_op("topk_attention::chunked_topk_attention_backward", mutates_args=())
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
    options = (head_k, scale, softcap, dropout_p)
    inputs = TopKBackwardInputs(grad_output, query, key, value, seed, indices, weights, *options)
    gradients, _ = completed_backward(inputs, wanted, bias_shape, relative_bias_shape, False, None, None, None)
    return gradients._replace(key=gradients.key.to(key.dtype), value=gradients.value.to(value.dtype))


def completed_backward(
    inputs: TopKBackwardInputs,
    wanted: Sequence[bool],
    bias_shape: Sequence[int],
    relative_bias_shape: Sequence[int],
    is_causal: bool,
    mass: Tensor | None,
    cuts: Tensor | None,
    rest: RestInputs | None,
) -> tuple[AttentionGradients, RestGradients | None]:
    """The gradients over the kept keys, and what the rest's need.

    is_causal, mass, cuts, rest  for completed attention: those of the forward pass, which returned mass and cuts

    The gradient of query is complete; those of keys, values and biases, in the accumulation dtype, lack what the rest
    sends to all keys that a query sees.
    """
    grad_output, query, key, value, seed, indices, weights, head_k, scale, softcap, dropout_p = inputs
    batch, num_heads, num_queries, _ = query.shape
    num_key_heads, num_keys = key.shape[1:3]
    query_wanted, key_wanted, value_wanted, means_wanted = wanted
    dtype = weights.dtype
    tables = Tables(key, value, dtype)
    rest_gradients = None
    if rest is not None:
        rest_gradients = RestGradients(*(query.new_zeros(query.shape[:3], dtype=dtype) for _ in RestGradients._fields))
    grad_query, grad_key, grad_value, grad_bias, grad_relative_bias, mean_grads = zero_gradients(
        query, key, value, wanted, bias_shape, relative_bias_shape, dtype
    )
    needs_grad_scores = query_wanted or key_wanted or means_wanted or bool(bias_shape) or bool(relative_bias_shape)
    for group in head_groups(head_k, batch, num_key_heads, num_queries) if grad_output.numel() > 0 else ():
        rows_per_step = backward_rows(num_keys, group.k)
        query_chunk = max(1, min(rows_per_step // group.queries_per_key_head, num_queries))
        for step in steps(group, batch, num_queries, query_chunk, rows_per_step):
            rows = _kept_rows(query, grad_output, indices, weights, group, step)
            key_table, value_table = tables.of(step)
            in_table = _table_indices(rows.indices, step, num_keys)
            survivors = None
            if seed is not None:
                numbers = row_numbers(step, num_heads, num_queries, query.device)
                survivors = _survivors(seed, numbers, rows.indices, dropout_p)
            by_key = transpose_selection(in_table, key_table.shape[0]) if key_wanted or value_wanted else None
            if rest is not None and mass is not None and cuts is not None and rest_gradients is not None:
                products = zero_in(rows.empty_slots, dot_with_rows(rows.grad_output, value_table, in_table))
                scaled_query = rows.query * scale
                seen = seen_by(rest, step, scaled_query, num_queries, is_causal, rows.grad_output)
                of_kept = (rows.empty_slots, rows.weights, _drop(rows.weights, survivors, dropout_p))
                of_output = (rows.grad_output, products, _drop(products, survivors, dropout_p))
                row_mass, cut = rows_of(mass.unsqueeze(3), step), rows_of(cuts.unsqueeze(3), step).long()
                of_rows = differentiate(seen, row_mass, cut, scaled_query, key_table, in_table, *of_kept, *of_output)
                value_weights, grad_scores, grad_biases = of_rows.values, of_rows.products, of_rows.biases
                mean_grad = of_rows.mean_grad
                for to, part in zip(rest_gradients, of_rows.sent, strict=True):
                    write_rows(to.unsqueeze(3), step, part)
            else:
                of_rows, value_weights = None, _drop(rows.weights, survivors, dropout_p)
                if needs_grad_scores:
                    products = dot_with_rows(rows.grad_output, value_table, in_table)
                    grad_biases, mean_grad = _softmax_backward(rows, _drop(products, survivors, dropout_p))
                    grad_scores = grad_biases
                    if softcap > 0:
                        scores = dot_with_rows(rows.query * scale, key_table, in_table)
                        grad_scores = zero_in(rows.empty_slots, grad_biases * slope_of_soft_cap(scores, softcap))
            if value_wanted and by_key is not None:
                part = part_of_heads(grad_value, step)
                part += weighted_sum_by_target(by_key, rows.grad_output, value_weights).view(part.shape)
            if not needs_grad_scores:
                continue
            if means_wanted:
                write_rows(mean_grads.unsqueeze(3), step, mean_grad)
            _add_bias_gradients(grad_bias, grad_relative_bias, grad_biases, rows.indices, step, num_queries, num_keys)
            grad_scores = grad_scores * scale
            if query_wanted:
                rows_grad_query = weighted_sum_of_rows(key_table, in_table, grad_scores)
                if of_rows is not None:
                    rows_grad_query.add_(of_rows.query, alpha=scale)
                if rows.empty_slots is not None:
                    rows_grad_query.masked_fill_(rows.empty_slots[:, :1], 0)
                write_rows(grad_query, step, rows_grad_query)
            if key_wanted and by_key is not None:
                part = part_of_heads(grad_key, step)
                part += weighted_sum_by_target(by_key, rows.query, grad_scores).view(part.shape)
    gradients = AttentionGradients(grad_query, grad_key, grad_value, grad_bias, grad_relative_bias, mean_grads)
    return gradients, rest_gradients


@topk_attention_backward_op.register_fake
def _(grad_output, query, key, value, seed, indices, weights, head_k, scale, softcap, dropout_p, *wanted):
    *are_wanted, bias_shape, relative_shape = wanted
    return tuple(empty_attention_gradients(query, key, value, are_wanted, bias_shape, relative_shape, weights.dtype))


topk_attention_op.register_autograd(
    differentiate_topk_attention("chunked_topk_attention", topk_attention_backward_op),
    setup_context=save_topk_attention,
)
topk_attention_backward_op.register_autograd(refuse_second_derivatives("topk_attention"))


class _KeptRows(NamedTuple):
    """What the backward pass reads of one step's rows."""

    indices: Tensor  # [rows, k], always valid key indices
    weights: Tensor  # [rows, k], 0 in empty slots
    query: Tensor  # [rows, D], 0 in rows without keys
    grad_output: Tensor  # [rows, E], 0 in rows without keys
    empty_slots: Tensor | None  # [rows, k], None where every slot of the step is filled


def _kept_rows(
    query: Tensor, grad_output: Tensor, indices: Tensor, weights: Tensor, group: HeadGroup, step: Step
) -> _KeptRows:
    """The step's part of the inputs and of the flat selection, in the accumulation dtype."""
    batch, _, num_queries, _ = query.shape
    kept, weights = (
        _entries_of_step(selection, group, step, batch, num_queries).reshape(step.num_rows, group.k)
        for selection in (indices, weights)
    )
    rows_query, rows_grad = (rows_of(x, step).to(weights.dtype) for x in (query, grad_output))
    empty_slots = _none_unless_any(kept < 0)
    if empty_slots is not None:
        kept = _stand_ins(kept, empty_slots)
        # A row without keys still points at a key. That key must not receive anything, not even 0 * NaN.
        row_is_empty = empty_slots[:, :1]
        rows_query, rows_grad = (x.masked_fill(row_is_empty, 0) for x in (rows_query, rows_grad))
    return _KeptRows(kept, weights, rows_query, rows_grad, empty_slots)


def _softmax_backward(rows: _KeptRows, grad_weights: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of each kept score: p * (dp - sum_j p_j dp_j), 0 in empty slots; and these sums [rows, 1]."""
    grad_scores = rows.weights * grad_weights
    if rows.empty_slots is not None:
        grad_scores.masked_fill_(rows.empty_slots, 0)
    mean_grad = grad_scores.sum(1, keepdim=True)
    grad_scores -= rows.weights * mean_grad
    if rows.empty_slots is not None:
        grad_scores.masked_fill_(rows.empty_slots, 0)
    return grad_scores, mean_grad


class _Chosen(NamedTuple):
    """The kept keys of one step's rows."""

    indices: Tensor  # [rows, k] int64, always valid key indices
    saved_indices: Tensor  # [rows, k], -1 in empty slots
    scores: Tensor  # [rows, k], -inf in empty slots
    weights: Tensor  # [rows, k], 0 in empty slots
    log_sums: Tensor | None  # [rows, 1], of exp(score) and the sink, inf in rows without keys; None without sinks
    empty_slots: Tensor | None  # [rows, k], None where every slot of the step is filled


def _choose(
    inputs: ScoreInputs, step: Step, k: int, key_table: Tensor, key_block: int, memory: Tensor, sinks: Tensor | None
) -> _Chosen:
    # A soft cap keeps the order of scores, so that of kept ones will do, unless something is added to what it gives.
    early_cap, late_cap = (inputs.softcap, 0.0) if inputs.adds_to_scores else (0.0, inputs.softcap)
    query = query_rows(inputs, step)
    scores = query.new_empty(step.num_rows, 0)
    indices = torch.empty(step.num_rows, 0, dtype=torch.int64, device=query.device)
    # A step that sees no key scores one nevertheless, and hides it.
    for keys in split(range(max(inputs.num_visible_keys(step), 1)), key_block):
        tile = score_tile(inputs, step, query, key_table, keys, memory, early_cap)
        block_scores, block_indices = select_topk(tile.view(step.num_rows, len(keys)), k)
        block_indices = block_indices + keys.start
        candidates = torch.cat([indices, block_indices], dim=1)
        scores, positions = select_topk(torch.cat([scores, block_scores], dim=1), k)
        indices = candidates.gather(1, positions)
    if scores.shape[1] < k:
        missing = (0, k - scores.shape[1])
        scores, indices = F.pad(scores, missing, value=-torch.inf), F.pad(indices, missing)
    empty_slots = _none_unless_any(scores.isneginf())
    if late_cap > 0:
        scores = soft_capped(scores, late_cap)
        scores = scores if empty_slots is None else scores.masked_fill(empty_slots, -torch.inf)
    sink = None if sinks is None else rows_of_heads(sinks, step)
    if empty_slots is None:
        return _Chosen(indices, indices, scores, *_softmax(scores, sink), None)
    indices, order = indices.masked_fill(empty_slots, inputs.num_keys).sort(1)
    scores, empty_slots = scores.gather(1, order), indices == inputs.num_keys
    weights, log_sums = _softmax(scores, sink)
    if log_sums is not None:
        log_sums = log_sums.masked_fill(empty_slots[:, :1], torch.inf)
    weights = weights.masked_fill(empty_slots, 0)
    stand_ins = _stand_ins(indices, empty_slots)
    return _Chosen(stand_ins, indices.masked_fill(empty_slots, -1), scores, weights, log_sums, empty_slots)


def _softmax(scores: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weights [rows, k] of scores and, with a sink [rows, 1], the logarithm of what they are divided by."""
    if sink is None:
        return scores.softmax(1), None
    with_sink = torch.cat([scores, sink], dim=1)
    return with_sink.softmax(1)[:, :-1], with_sink.logsumexp(1, keepdim=True)


def _none_unless_any(mask: Tensor) -> Tensor | None:
    return mask if mask.any() else None


def _stand_ins(indices: Tensor, empty_slots: Tensor) -> Tensor:
    """Point each empty slot at its row's first key, which the row may see; rows without keys point at key 0.

    A slot with weight 0 adds 0 * value. For a NaN that the row must not see, that would be NaN.
    """
    return torch.where(empty_slots, indices[:, :1].masked_fill(empty_slots[:, :1], 0), indices)


def _survivors(seed: Tensor, rows: Tensor, indices: Tensor, dropout_p: float) -> Tensor:
    return keep_mask(seed, rows.unsqueeze(1), indices.long(), dropout_p)


def _drop(weights: Tensor, survivors: Tensor | None, dropout_p: float) -> Tensor:
    return weights if survivors is None else weights * survivors / (1 - dropout_p)  # a product: NaN stays NaN


def _entries_of_step(selection: Tensor, group: HeadGroup, step: Step, batch: int, num_queries: int) -> Tensor:
    """The step's part of a flat selection as [b, heads, n, k], a view."""
    first_head = group.query_heads.start
    entries = entries_of(selection, group, batch, num_queries)
    entries = entries[step.batches.start : step.batches.stop]
    entries = entries[:, step.query_heads.start - first_head : step.query_heads.stop - first_head]
    return entries[:, :, step.queries.start : step.queries.stop]


def _save(entries: Tensor, selection: Tensor, group: HeadGroup, step: Step, batch: int, num_queries: int) -> None:
    part = _entries_of_step(selection, group, step, batch, num_queries)
    part.copy_(entries.view(part.shape))


def _table_indices(indices: Tensor, step: Step, num_keys: int) -> Tensor:
    """Key indices as row numbers of the step's tables, int32 where they fit, which halves the memory traffic."""
    batches, key_heads, _, _ = step.shape
    if batches * key_heads > 1:
        indices = indices + row_table_starts(step, num_keys, indices.device)
    return indices.to(torch.int32 if batches * key_heads * num_keys < 2**31 else torch.int64)


def _add_bias_gradients(
    grad_bias: Tensor,
    grad_relative_bias: Tensor,
    grad_scores: Tensor,
    indices: Tensor,
    step: Step,
    num_queries: int,
    num_keys: int,
) -> None:
    """Add each kept entry's score gradient to its entry of the bias; broadcast axes are summed."""
    device = grad_scores.device
    shape = (len(step.batches), len(step.query_heads), len(step.queries), -1)
    grad_scores, indices = grad_scores.view(shape), indices.view(shape).long()
    batches = torch.arange(step.batches.start, step.batches.stop, device=device)[:, None, None, None]
    heads = torch.arange(step.query_heads.start, step.query_heads.stop, device=device)[:, None, None]
    queries = torch.arange(step.queries.start, step.queries.stop, device=device)[:, None]
    if grad_bias.numel() > 0:
        target = torch.zeros_like(indices)
        for axis, (size, stride) in enumerate(zip(grad_bias.shape, grad_bias.stride(), strict=True)):
            if size != 1:
                target += (batches, heads, queries, indices)[axis] * stride
        grad_bias.view(-1).scatter_add_(0, target.flatten(), grad_scores.flatten())
    if grad_relative_bias.numel() > 0:
        target = indices - queries + num_queries - 1
        if grad_relative_bias.shape[0] != 1:
            target += heads * (num_queries + num_keys - 1)
        grad_relative_bias.view(-1).scatter_add_(0, target.flatten(), grad_scores.flatten())
