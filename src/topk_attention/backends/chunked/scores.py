"""One tile of attention scores: scale, bias, masks and causality, for a chunk of queries and a block of keys."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..calls import accumulation_dtype, adds_to_scores
from .tables import nan_where_not_finite
from .tiles import Step, narrow, rows_of


class ScoreInputs(NamedTuple):
    """All that scores depend on, except the keys.

    B batch, H query heads, N queries, M keys, D head size
    """

    query: Tensor  # [B, H, N, D]
    num_keys: int
    attn_mask: Tensor | None  # [B|1, H|1, N|1, M|1]
    bias: Tensor | None  # [B|1, H|1, N|1, M|1]
    relative_bias: Tensor | None  # [H|1, N + M - 1]
    is_causal: bool
    scale: float
    softcap: float  # 0: none

    @property
    def dtype(self) -> torch.dtype:
        return accumulation_dtype(self.query.dtype)

    @property
    def num_queries(self) -> int:
        return self.query.shape[2]

    @property
    def adds_to_scores(self) -> bool:
        """Whether something is added to scores that may change their order; a boolean mask only hides."""
        return adds_to_scores(self.attn_mask, self.bias, self.relative_bias)

    @property
    def rows_may_lack_keys(self) -> bool:
        """Whether some query may see fewer than all keys."""
        return self.is_causal or any(part is not None for part in (self.attn_mask, self.bias, self.relative_bias))

    def num_visible_keys(self, step: Step) -> int:
        """The number of keys that some query of the step may see; all later keys are in the future."""
        if not self.is_causal:
            return self.num_keys
        return max(0, min(self.num_keys, step.queries.stop + self.num_keys - self.num_queries))


def query_rows(inputs: ScoreInputs, step: Step) -> Tensor:
    """The step's queries, scaled, as [batches * key heads, rows of one key head, D]."""
    batches, key_heads, queries_per_key_head, queries = step.shape
    rows = nan_where_not_finite(rows_of(inputs.query, step).to(inputs.dtype)) * inputs.scale
    return rows.view(batches * key_heads, queries_per_key_head * queries, -1)


def score_tile(
    inputs: ScoreInputs,
    step: Step,
    query: Tensor,
    key_table: Tensor,
    keys: range,
    memory: Tensor,
    softcap: float,
    slopes: Tensor | None = None,
) -> Tensor:
    """Scores [b, g, r, n, m] of the step's queries against a block of keys, -inf where a query may not see a key.

    query   what `query_rows` returned
    key_table  the keys of the step's heads, [b * g * M, D]
    memory  flat, in the accumulation dtype; overwritten, and the result is a view of it
    softcap  applied here, before anything is added; 0: none
    slopes  flat like memory; the derivative of the cap at each score is written to it
    """
    block = block_of(key_table, step, keys)
    tile = memory[: query.shape[0] * query.shape[1] * len(keys)].view(query.shape[0], query.shape[1], len(keys))
    torch.bmm(query, block.mT, out=tile)
    if softcap > 0:
        if slopes is not None:
            slopes[: tile.numel()].view(tile.shape).copy_(slope_of_soft_cap(tile, softcap))
        tile.copy_(soft_capped(tile, softcap))
    tile = tile.view(*step.shape, len(keys))
    if inputs.relative_bias is not None:
        tile += relative_tile(inputs.relative_bias, step, keys, inputs.num_queries)
    for additive in (inputs.bias, inputs.attn_mask):
        if additive is not None and additive.is_floating_point():
            tile += narrow(additive, step, keys)
    _hide(inputs, step, keys, tile)
    return tile


def soft_capped(scores: Tensor, softcap: float) -> Tensor:
    return (scores / softcap).tanh_().mul_(softcap)


def slope_of_soft_cap(scores: Tensor, softcap: float) -> Tensor:
    """1 - tanh(score / softcap)^2, without the digits that the difference would lose"""
    return (scores / softcap).cosh_().square_().reciprocal_()


def block_of(table: Tensor, step: Step, keys: range) -> Tensor:
    """A block of the step's keys out of a [b * g * M, X] table, as [b * g, keys, X], a view."""
    batches, key_heads, _, _ = step.shape
    num_keys = table.shape[0] // (batches * key_heads)
    return table.view(batches * key_heads, num_keys, table.shape[1])[:, keys.start : keys.stop]


def _hide(inputs: ScoreInputs, step: Step, keys: range, tile: Tensor) -> None:
    """Write -inf over hidden scores, also over those that are NaN: adding -inf would leave them NaN."""
    if inputs.relative_bias is not None and inputs.relative_bias.isneginf().any():
        tile.masked_fill_(relative_tile(inputs.relative_bias, step, keys, inputs.num_queries).isneginf(), -torch.inf)
    for mask in (inputs.bias, inputs.attn_mask):
        if mask is not None:
            part = narrow(mask, step, keys)
            tile.masked_fill_(part.isneginf() if part.is_floating_point() else ~part, -torch.inf)
    if inputs.is_causal:
        # Only the last columns of the block are in the future of a query.
        last_key_of_first_query = step.queries.start + inputs.num_keys - inputs.num_queries
        first = max(keys.start, last_key_of_first_query + 1)
        if first < keys.stop:
            key_index = torch.arange(first, keys.stop, device=tile.device)
            last_key = torch.arange(len(step.queries), device=tile.device) + last_key_of_first_query
            tile[..., first - keys.start :].masked_fill_(key_index > last_key.unsqueeze(1), -torch.inf)


def relative_tile(relative_bias: Tensor, step: Step, keys: range, num_queries: int) -> Tensor:
    """The tile's part of a relative bias, [1, g|1, r|1, n, m].

    From column to column the bias moves one step forward in its table, from row to row one step back. So sliding
    windows over the table are the rows in reverse order.
    """
    _, key_heads, queries_per_key_head, _ = step.shape
    first = keys.start - (step.queries.stop - 1) + num_queries - 1
    window = relative_bias[:, first : first + len(step.queries) + len(keys) - 1]
    if window.shape[0] != 1:
        window = window[step.query_heads.start : step.query_heads.stop].unflatten(0, (key_heads, queries_per_key_head))
    else:
        window = window.unsqueeze(0)
    return window.unfold(-1, len(keys), 1).flip(-2).unsqueeze(0)
