"""Full attention, over every visible key, in query chunks and key blocks. Top-k attention with k at the number of keys.

Sources: Gupta et al. 2021, section 2 (query chunking); Milakov and Gimelshein 2018 (the running softmax).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autocast import without_autocast
from ..calls import AttentionCall, accumulation_dtype, empty_output
from ..dropout import keep_mask
from ..finite import finite_values
from ..operators import (
    AttentionGradients,
    FullInputs,
    differentiate_full_attention,
    empty_attention_gradients,
    refuse_second_derivatives,
    save_full_attention,
)
from .scores import ScoreInputs, block_of, query_rows, score_tile
from .tables import Tables, part_of_heads, zero_gradients
from .tiles import HeadGroup, Step, narrow, row_numbers, rows_of, rows_of_heads, split, steps, tile_shape, write_rows


def full_attention(call: AttentionCall) -> Tensor:
    """Returns [B, H, N, E]."""
    output, _ = full_attention_op(*FullInputs.of(call))
    return output


@torch.library.custom_op("topk_attention::chunked_full_attention", mutates_args=())
@without_autocast
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
) -> tuple[Tensor, Tensor]:
    """Returns output [B, H, N, E] and the logarithm of each row's softmax denominator, [B, H, N, 1]."""
    batch, num_heads, num_queries, _ = query.shape
    inputs = ScoreInputs(query, key.shape[2], attn_mask, bias, relative_bias, is_causal, scale, softcap)
    dtype = inputs.dtype
    tables = Tables(key, value, dtype)
    output = empty_output(query, value)
    log_sums = query.new_empty(batch, num_heads, num_queries, 1, dtype=dtype)
    for step, query_part, tiles in _tiles(inputs, tables, key.shape[1], query_chunk_size):
        values, value_is_broken = finite_values(tables.of(step)[1])
        largest = query_part.new_full((*query_part.shape[:2], 1), -torch.inf)
        total = torch.zeros_like(largest)
        result = query_part.new_zeros(*query_part.shape[:2], value.shape[3])
        sees_broken_value = torch.zeros_like(result, dtype=torch.bool)
        for keys, tile, _ in tiles:
            scores = tile.flatten(0, 1).flatten(1, 2)  # [b * g, r * n, keys]
            if value_is_broken is not None:
                visible = (~scores.isneginf()).to(dtype)
                sees_broken_value |= visible @ block_of(value_is_broken, step, keys).to(dtype) > 0
            new_largest = torch.maximum(largest, scores.amax(-1, keepdim=True))
            # Rows that have seen no key yet keep -inf. Subtract 0 from them, because -inf - -inf would be NaN.
            reference = new_largest.masked_fill(new_largest.isneginf(), 0)
            scores.sub_(reference).exp_()
            shrink = (largest - reference).exp_()
            total = total * shrink + scores.sum(-1, keepdim=True)
            if seed is not None:
                scores *= _dropout_factor(seed, step, keys, num_heads, num_queries, dropout_p, scores)
            result = torch.baddbmm(result * shrink, scores, block_of(values, step, keys))
            largest = new_largest
        row_is_empty = largest.isneginf()
        if sinks is not None:
            sink = rows_of_heads(sinks, step).view(largest.shape).masked_fill(row_is_empty, -torch.inf)
            new_largest = torch.maximum(largest, sink)
            reference = new_largest.masked_fill(row_is_empty, 0)
            shrink = (largest - reference).exp_()
            total = total * shrink + (sink - reference).exp_()
            result *= shrink
            largest = new_largest
        result = (result / total).masked_fill_(row_is_empty, 0)
        if value_is_broken is not None:
            result.masked_fill_(sees_broken_value, torch.nan)
        write_rows(output, step, result)
        # A row without keys gets +inf, so that the backward pass computes weight exp(score - inf) = 0 for all keys.
        write_rows(log_sums, step, (largest + total.log()).masked_fill_(row_is_empty, torch.inf))
    return output, log_sums


@full_attention_op.register_fake
def _(query, key, value, *options) -> tuple[Tensor, Tensor]:
    batch, num_heads, num_queries, _ = query.shape
    dtype = accumulation_dtype(query.dtype)
    return (
        empty_output(query, value),
        query.new_empty(batch, num_heads, num_queries, 1, dtype=dtype),
    )


@torch.library.custom_op("topk_attention::chunked_full_attention_backward", mutates_args=())
@without_autocast
def full_attention_backward_op(
    grad_output: Tensor,
    output: Tensor,
    log_sums: Tensor,
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
    """Returns `AttentionGradients`.

    Those not wanted are left out, for a bias where its shape is empty; their places hold empty tensors.
    """
    _, num_heads, num_queries, _ = query.shape
    inputs = ScoreInputs(query, key.shape[2], attn_mask, bias, relative_bias, is_causal, scale, softcap)
    dtype = inputs.dtype
    tables = Tables(key, value, dtype)
    wanted = (query_wanted, key_wanted, value_wanted, means_wanted)
    grad_query, grad_key, grad_value, grad_bias, grad_relative_bias, mean_grads = zero_gradients(
        query, key, value, wanted, bias_shape, relative_bias_shape, dtype
    )
    needs_grad_scores = query_wanted or key_wanted or bool(bias_shape) or bool(relative_bias_shape)
    for step, query_part, tiles in _tiles(inputs, tables, key.shape[1], query_chunk_size, with_slopes=softcap > 0):
        key_table, value_table = (finite_values(table)[0] for table in tables.of(step))
        step_grad_key = part_of_heads(grad_key, step) if key_wanted else None
        step_grad_value = part_of_heads(grad_value, step) if value_wanted else None
        rows = _step_rows(query, output, grad_output, log_sums, step)
        rows_grad_query = torch.zeros_like(query_part)
        if means_wanted:
            write_rows(mean_grads.unsqueeze(3), step, rows.mean_grad)
        for keys, tile, slopes in tiles:
            p = tile.flatten(0, 1).flatten(1, 2)
            hidden = p.isneginf() if inputs.rows_may_lack_keys else None
            p.sub_(rows.log_sums).exp_()
            if hidden is not None:  # a row must not reach keys that it does not see, also where it is NaN
                p.masked_fill_(hidden, 0)
            factor = None
            if seed is not None:
                factor = _dropout_factor(seed, step, keys, num_heads, num_queries, dropout_p, p)
            if step_grad_value is not None:
                p_dropped = p if factor is None else p * factor
                _add_to_block(step_grad_value, keys, p_dropped.mT @ rows.grad_output)
            if not needs_grad_scores:
                continue
            grad_p = rows.grad_output @ block_of(value_table, step, keys).mT
            if factor is not None:
                grad_p *= factor
            grad_scores = grad_p.sub_(rows.mean_grad).mul_(p)
            if hidden is not None:
                grad_scores.masked_fill_(hidden, 0)
            _add_bias_gradients(grad_bias, grad_relative_bias, grad_scores.view(tile.shape), step, keys, num_queries)
            if slopes is not None:
                grad_scores *= slopes.flatten(0, 1).flatten(1, 2)
                if hidden is not None:
                    grad_scores.masked_fill_(hidden, 0)
            grad_scores *= scale
            if query_wanted:
                rows_grad_query.baddbmm_(grad_scores, block_of(key_table, step, keys))
            if step_grad_key is not None:
                _add_to_block(step_grad_key, keys, grad_scores.mT @ rows.query)
        if query_wanted:
            write_rows(grad_query, step, rows_grad_query)
    of_tables = (grad_key.to(key.dtype), grad_value.to(value.dtype))
    return AttentionGradients(grad_query, *of_tables, grad_bias, grad_relative_bias, mean_grads)


@full_attention_backward_op.register_fake
def _(grad_output, output, log_sums, query, key, value, *options):
    *wanted, bias_shape, relative_shape = options[-6:]
    return tuple(empty_attention_gradients(query, key, value, wanted, bias_shape, relative_shape, log_sums.dtype))


full_attention_op.register_autograd(
    differentiate_full_attention(full_attention_backward_op), setup_context=save_full_attention
)
full_attention_backward_op.register_autograd(refuse_second_derivatives("topk_attention"))


class _StepRows(NamedTuple):
    """What the backward pass reads of one step's rows, all [b * g, r * n, X] in the accumulation dtype."""

    query: Tensor  # X = D, 0 in rows without keys and where it is not finite
    grad_output: Tensor  # X = E, 0 in rows without keys
    mean_grad: Tensor  # X = 1, sum_j p_j dp_j, 0 in rows without keys
    log_sums: Tensor  # X = 1, inf in rows without keys


def _step_rows(query: Tensor, output: Tensor, grad_output: Tensor, log_sums: Tensor, step: Step) -> _StepRows:
    batches, key_heads, queries_per_key_head, queries = step.shape
    rows_log_sums = rows_of(log_sums, step)
    dtype = rows_log_sums.dtype
    # A row without keys reaches no gradient, not even as 0 * NaN.
    row_is_empty = rows_log_sums.isposinf()
    rows_query, _ = finite_values(rows_of(query, step).to(dtype))
    rows_grad = rows_of(grad_output, step).to(dtype)
    # sum_j p_j dp_j is output . grad_output, also under dropout (Dao et al. 2022, FlashAttention, appendix B).
    mean_grad = (rows_grad * rows_of(output, step)).sum(-1, keepdim=True)
    rows_query, rows_grad, mean_grad, rows_log_sums = (
        x.view(batches * key_heads, queries_per_key_head * queries, x.shape[1])
        for x in (*(x.masked_fill(row_is_empty, 0) for x in (rows_query, rows_grad, mean_grad)), rows_log_sums)
    )
    return _StepRows(rows_query, rows_grad, mean_grad, rows_log_sums)


def _tiles(
    inputs: ScoreInputs,
    tables: Tables,
    num_key_heads: int,
    query_chunk_size: int | None,
    with_slopes: bool = False,
) -> Iterator[tuple[Step, Tensor, Iterator[tuple[range, Tensor, Tensor | None]]]]:
    """All score tiles: for each step its scaled queries, and the tiles of its visible keys, one at a time.

    with_slopes  beside each tile another one with the derivative of the soft cap at its scores
    """
    batch, num_heads, num_queries, _ = inputs.query.shape
    if batch * num_heads * num_queries == 0:
        return
    group = HeadGroup(range(num_heads), range(num_key_heads), 1, 0)
    shape = tile_shape(group, num_queries, inputs.num_keys, inputs.dtype.itemsize, query_chunk_size)
    memory = slopes = None
    for step in steps(group, batch, num_queries, shape.query_chunk, shape.rows_per_step):
        if memory is None:  # no later step is larger than the first
            memory = inputs.query.new_empty(step.num_rows * shape.key_block, dtype=inputs.dtype)
            slopes = torch.empty_like(memory) if with_slopes else None
        query = query_rows(inputs, step)
        blocks = split(range(max(inputs.num_visible_keys(step), 1)), shape.key_block)
        key_table, _ = tables.of(step)
        yield step, query, _tiles_of(inputs, step, query, key_table, blocks, memory, slopes)


def _tiles_of(
    inputs: ScoreInputs,
    step: Step,
    query: Tensor,
    key_table: Tensor,
    blocks: Iterator[range],
    memory: Tensor,
    slopes: Tensor | None,
) -> Iterator[tuple[range, Tensor, Tensor | None]]:
    for keys in blocks:
        tile = score_tile(inputs, step, query, key_table, keys, memory, inputs.softcap, slopes)
        yield keys, tile, None if slopes is None else slopes[: tile.numel()].view(tile.shape)


def _add_to_block(grad: Tensor, keys: range, sums: Tensor) -> None:
    """Add sums [b * g, keys, X] to a block of a gradient [b, g, M, X]."""
    part = grad[:, :, keys.start : keys.stop]
    part += sums.view(part.shape)


def _dropout_factor(
    seed: Tensor, step: Step, keys: range, num_heads: int, num_queries: int, dropout_p: float, like: Tensor
) -> Tensor:
    """0 for dropped entries and 1 / (1 - p) for kept ones, in the shape and dtype of `like`, [b * g, r * n, keys]."""
    rows = row_numbers(step, num_heads, num_queries, like.device).view(*like.shape[:2], 1)
    columns = torch.arange(keys.start, keys.stop, device=like.device)
    return keep_mask(seed, rows, columns, dropout_p).to(like.dtype) / (1 - dropout_p)


def _add_bias_gradients(
    grad_bias: Tensor, grad_relative_bias: Tensor, grad_scores: Tensor, step: Step, keys: range, num_queries: int
) -> None:
    """Add a tile of score gradients [b, g, r, n, keys] to the biases of the tile; broadcast axes are summed."""
    if grad_bias.numel() > 0:
        part = narrow(grad_bias, step, keys)
        part += grad_scores.sum_to_size(part.shape)
    if grad_relative_bias.numel() > 0:
        per_head = grad_scores.sum(0).flatten(0, 1)
        if grad_relative_bias.shape[0] == 1:
            per_head = per_head.sum(0, keepdim=True)
        diagonals = _sums_of_diagonals(per_head)
        first = keys.start - (step.queries.stop - 1) + num_queries - 1
        heads = slice(step.query_heads.start, step.query_heads.stop) if grad_relative_bias.shape[0] > 1 else slice(None)
        grad_relative_bias[heads, first : first + diagonals.shape[1]] += diagonals


def _sums_of_diagonals(tile: Tensor) -> Tensor:
    """[H, n, m] -> [H, n + m - 1], from the lower left corner to the upper right.

    Each row is padded by n and all are read back with one column less. That shifts each row by one place more than the
    row before, which turns diagonals into columns.
    """
    num_heads, n, m = tile.shape
    padded = F.pad(tile.flip(1), (0, n)).flatten(1)[:, : n * (m + n - 1)]
    return padded.view(num_heads, n, m + n - 1).sum(1)
