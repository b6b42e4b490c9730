"""Sums over the keys that each query sees, and the way back: what each query sends to all keys that it sees.

Completed top-k attention needs both. No [N, M] tensor exists at any time. Where only causality and a mask of keys hide
keys, running sums do; any other mask or bias takes products of tiles of queries with all keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .calls import KeySums, RestGradients, RestInputs, accumulation_dtype
from .finite import finite_values

# Keys between two running sums. A sum of products has D * E numbers, the keys and values between two 512 * (D + E).
INTERVAL = 512
# Keys that are worked on together on the way back: products within a block grow with it, sums between blocks shrink.
_BLOCK = 64
# Bytes of a tile [queries, M].
_TILE_BYTES = 4 * 2**20


class VisibleKeys(NamedTuple):
    """What decides which keys a query sees, and what is added to their scores: parts of an `AttentionCall`."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None
    bias: Tensor | None
    relative_bias: Tensor | None
    is_causal: bool
    scale: float
    lift: float
    # (key, value, interval) -> sums over intervals of keys; a backend may have a faster one
    sum_intervals: Callable[[Tensor, Tensor, int], KeySums] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """That of all sums."""
        return accumulation_dtype(self.query.dtype)

    @property
    def num_heads(self) -> int:
        return self.query.shape[1]

    @property
    def num_queries(self) -> int:
        return self.query.shape[2]

    @property
    def num_keys(self) -> int:
        return self.key.shape[2]

    @property
    def group_size(self) -> int:
        return self.num_heads // self.key.shape[1]

    @property
    def _hides_the_future(self) -> bool:
        return self.is_causal and self.num_queries > 1

    def _depends_on_the_query(self) -> bool:
        """Whether a mask or a bias hides keys from some queries alone, or adds what is not a matter of distance."""
        mask, relative = self.attn_mask, self.relative_bias
        only_keys = mask is None or (mask.dtype == torch.bool and mask.shape[2] == 1)
        if not only_keys or self.bias is not None:
            return True
        return relative is not None and (mask is not None or bool(relative.isneginf().any()))

    def key_mask(self) -> Tensor | None:
        """[B|1, H|1, M] bool, where the mask is one of keys; one that says the same of all of them is expanded"""
        return None if self.attn_mask is None else self.attn_mask[:, :, 0].expand(-1, -1, self.num_keys)

    def _last_keys(self) -> Tensor:
        """[N] int64: how many keys are not in the future of each query."""
        queries = torch.arange(self.num_queries, device=self.query.device)
        if not self._hides_the_future:
            return torch.full_like(queries, self.num_keys)
        return (queries + 1 + self.num_keys - self.num_queries).clamp(min=0)

    # --- forward: what each query sees ---

    def saved_sums_shape(self, has_totals: bool) -> tuple[int, int, int] | None:
        """The first axes [B, S, C] of the sums that the backward pass takes from the forward pass, as in `RestInputs`.

        None where it sums anew: where each query has sums of its own, which is too much to save, where that depends on
        the numbers in a bias, and where the caller has the sums.
        """
        if self.relative_bias is not None or self._depends_on_the_query():
            return None
        mask = self.key_mask()
        by_head = mask is not None and mask.shape[1] > 1
        if has_totals and not by_head and not self._hides_the_future:
            return None
        num_sums = self.num_keys // INTERVAL + 1 if self._hides_the_future else 1
        return self.query.shape[0], self.num_heads if by_head else self.key.shape[1], num_sums

    def sums(
        self,
        mass_scale: Tensor,
        totals: KeySums | None = None,
        grad_output: Tensor | None = None,
        saved: KeySums | None = None,
    ) -> RestInputs:
        """The sums that complete a call.

        totals       over all keys, or all that a mask of keys shows, [B, G, ...], where the caller has them
        grad_output  [B, H, N, E], in the backward pass
        saved        those of the forward pass, where it has saved them
        """
        if self._depends_on_the_query():
            return self._sums_by_tile(mass_scale, grad_output)
        key, value, counts, mask = self.key, self.value, None, self.key_mask()
        if mask is not None:
            if mask.shape[1] > 1:  # other keys for other heads: each head gets a table of its own
                key, value = (x.repeat_interleave(self.group_size, dim=1) for x in (key, value))
                totals = None
            if totals is None or self._hides_the_future:
                key, value = (torch.where(mask.unsqueeze(3), x, 0) for x in (key, value))
            seen = F.pad(mask.cumsum(2, dtype=torch.int32), (1, 0))
            counts = seen[:, :, self._last_keys()]
        interval = INTERVAL if self._hides_the_future else 0
        if saved is not None:
            sums = saved
        elif self._hides_the_future:
            sums = _running_sums((self.sum_intervals or _sum_intervals)(key, value, INTERVAL))
        else:
            if totals is None:
                totals = _total_sums(key, value, self.sum_intervals or _sum_intervals)
            sums = KeySums(*(x.unsqueeze(2) for x in totals))
        score_sums = None if self.relative_bias is None else self._windows(self.relative_bias)
        of_rows = (key, value, counts, score_sums, interval)
        return RestInputs(mass_scale, self.lift, sums.keys, sums.values, sums.products, None, None, *of_rows)

    def _windows(self, relative_bias: Tensor) -> Tensor:
        """[1, H|1, N]: the sum of a relative bias over the keys that a query sees. They are a window of its table."""
        sums = F.pad(relative_bias.double().cumsum(1), (1, 0))
        first = torch.arange(self.num_queries - 1, -1, -1, device=sums.device)  # position of key 0
        return (sums[:, first + self._last_keys()] - sums[:, first]).to(self.dtype).unsqueeze(0)

    def _sums_by_tile(self, mass_scale: Tensor, grad_output: Tensor | None) -> RestInputs:
        batch, num_heads, rows, _ = self.query.shape
        by_head = self._hides_by_head()
        num_sums = num_heads if by_head else self.key.shape[1]
        new = self.query.new_empty
        key_sums = new(batch, num_sums, rows, self.key.shape[3], dtype=self.dtype)
        value_sums = new(batch, num_sums, rows, self.value.shape[3], dtype=self.dtype)
        score_values, grad_keys = new(batch, num_heads, rows, self.value.shape[3], dtype=self.dtype), None
        if grad_output is not None:
            grad_keys = new(batch, num_heads, rows, self.key.shape[3], dtype=self.dtype)
        counts = new(batch, num_heads if by_head else 1, rows, dtype=torch.int32)
        score_sums = new(batch, self._adding_heads(), rows, dtype=self.dtype)
        for b in range(batch):
            keys, _ = finite_values(self.key[b].to(self.dtype))
            values, broken = finite_values(self.value[b].to(self.dtype))
            for queries in self._chunks():
                part = slice(queries.start, queries.stop)
                tiles = self._additive_tiles(queries)
                for head in range(num_heads):
                    g = head // self.group_size
                    visible = self._visible(b, head, queries, tiles)
                    among = visible.to(self.dtype)
                    if head < counts.shape[1]:
                        counts[b, head, part] = visible.sum(1, dtype=torch.int32)
                    if by_head or head % self.group_size == 0:
                        s = head if by_head else g
                        key_sums[b, s, part] = among @ keys[g]
                        value_sums[b, s, part] = among @ values[g]
                        if broken is not None:
                            sees_broken = among @ broken[g].to(self.dtype) > 0
                            value_sums[b, s, part].masked_fill_(sees_broken, torch.nan)
                    if head < score_sums.shape[1]:
                        # In the dtype of the sum: a row of thousands of biases of -100 is too much for float16.
                        added = sum(_of_head(tile, b, head).to(self.dtype) for tile in tiles)
                        score_sums[b, head, part] = torch.where(visible, added, 0).sum(1)
                    query = self.query[b, head, part].to(self.dtype) * self.scale
                    score_values[b, head, part] = torch.where(visible, query @ keys[g].mT, 0) @ values[g]
                    if grad_keys is not None and grad_output is not None:
                        grad = grad_output[b, head, part].to(self.dtype)
                        grad_keys[b, head, part] = torch.where(visible, grad @ values[g].mT, 0) @ keys[g]
        of_rows = (self.key, self.value, counts, score_sums if score_sums.shape[1] > 0 else None, 0)
        return RestInputs(mass_scale, self.lift, key_sums, value_sums, None, score_values, grad_keys, *of_rows)

    def _hides_by_head(self) -> bool:
        """Whether the heads of one group may see different keys."""
        heads = [x.shape[1] for x in (self.attn_mask, self.bias) if x is not None]
        if self.relative_bias is not None:
            heads.append(self.relative_bias.shape[0])
        return max(heads, default=1) > 1

    def _adding_heads(self) -> int:
        """How many heads differ in what is added to the scores that they see, summed; 0 where nothing is added."""
        masks = [x for x in (self.attn_mask, self.bias) if x is not None and x.is_floating_point()]
        if not masks and self.relative_bias is None:
            return 0
        return self.num_heads if self._hides_by_head() else 1

    def _chunks(self) -> Iterator[range]:
        size = max(_TILE_BYTES // (self.num_keys * self.dtype.itemsize), 1)
        for start in range(0, self.num_queries, size):
            yield range(start, min(start + size, self.num_queries))

    def _additive_tiles(self, queries: range) -> list[Tensor]:
        """What is added to the scores of these queries, each [B|1, H|1, n|1, M|1]."""
        masks = (x for x in (self.attn_mask, self.bias) if x is not None and x.is_floating_point())
        tiles = [_of_queries(x, queries) for x in masks]
        if self.relative_bias is not None:
            # From row to row the bias moves one step back in its table, so windows over it are the rows in reverse.
            first = self.num_queries - queries.stop
            window = self.relative_bias[:, first : first + len(queries) + self.num_keys - 1]
            tiles.append(window.unfold(-1, self.num_keys, 1).flip(-2).unsqueeze(0))
        return tiles

    def _visible(self, batch: int, head: int, queries: range, tiles: list[Tensor]) -> Tensor:
        """[n, M] bool"""
        visible = torch.ones(len(queries), self.num_keys, dtype=torch.bool, device=self.query.device)
        if self.is_causal:
            visible = visible.tril(queries.start + self.num_keys - self.num_queries)
        if self.attn_mask is not None and self.attn_mask.dtype == torch.bool:
            visible &= _of_head(_of_queries(self.attn_mask, queries), batch, head)
        for tile in tiles:
            visible &= ~_of_head(tile, batch, head).isneginf()
        return visible

    # --- backward: what each query sends to all keys that it sees ---

    @property
    def grow_from_row_to_row(self) -> bool:
        """Whether a query sees the keys that the one before sees and one more, on every head alike."""
        mask = self.attn_mask
        return self._hides_the_future and not self._depends_on_the_query() and (mask is None or mask.shape[1] == 1)

    def add_gradients(
        self, sent: RestGradients, grad_output: Tensor, grad_key: Tensor | None, grad_value: Tensor | None
    ) -> None:
        """Add to the gradients of keys and values, [B, G, M, D] and [B, G, M, E], what `sent` describes."""
        by_tile = self._depends_on_the_query()
        send = self._send_by_tile if by_tile else self._send_backwards if self._hides_the_future else self._send_to_all
        mask = None if by_tile else self.key_mask()
        for b in range(self.query.shape[0]):
            for g in range(self.key.shape[1]):
                key, value = (finite_values(x[b, g].to(self.dtype))[0] for x in (self.key, self.value))
                for head in range(g * self.group_size, (g + 1) * self.group_size):
                    to_key, to_value = send(_Sent.of(self, sent, grad_output, b, head), key, value, b, head)
                    for gradient, added in ((grad_key, to_key), (grad_value, to_value)):
                        if gradient is None:
                            continue
                        if mask is not None:
                            hidden = ~_of_head(mask.unsqueeze(3), b, head)
                            added = added.expand(self.num_keys, -1).masked_fill(hidden, 0)
                        gradient[b, g] += added

    def _send_to_all(self, sent: _Sent, key: Tensor, value: Tensor, b: int, head: int) -> tuple[Tensor, Tensor]:
        """What one head's queries add to the gradients of keys and values, [M|1, D] and [M|1, E]."""
        to_key, to_value = sent.to_key.sum(0, keepdim=True), sent.to_value.sum(0, keepdim=True)
        products = sent.query.mT @ sent.grad_output
        return to_key + value @ products.mT, to_value + key @ products

    def _send_backwards(self, sent: _Sent, key: Tensor, value: Tensor, b: int, head: int) -> tuple[Tensor, Tensor]:
        """The same under causality: from the last block of keys to the first, ever more queries see the whole block."""
        to_key, to_value, query, grad = (self._by_block(self._at_last_key(x)) for x in sent)
        key, value = self._by_block(key), self._by_block(value)
        # Within a block a key is seen by the queries from its own on.
        sees = torch.ones(_BLOCK, _BLOCK, dtype=key.dtype, device=key.device).triu()
        grad_key = sees @ to_key + _sums_of_later(to_key.sum(1, keepdim=True))
        grad_value = sees @ to_value + _sums_of_later(to_value.sum(1, keepdim=True))
        products = _sums_of_later(query.mT @ grad)
        grad_key += value @ products.mT
        grad_value += key @ products
        grad_key.baddbmm_((value @ grad.mT).mul_(sees), query)
        grad_value.baddbmm_((key @ query.mT).mul_(sees), grad)
        return grad_key.flatten(0, 1)[: self.num_keys], grad_value.flatten(0, 1)[: self.num_keys]

    def _at_last_key(self, rows: Tensor) -> Tensor:
        """The rows [N, X] of queries at the places [M, X] of the last keys that they see."""
        lead = self.num_keys - self.num_queries
        return F.pad(rows, (0, 0, lead, 0)) if lead > 0 else rows[-lead:]

    @staticmethod
    def _by_block(rows: Tensor) -> Tensor:
        """[M, X] as [blocks, _BLOCK, X]"""
        missing = -rows.shape[0] % _BLOCK
        return (F.pad(rows, (0, 0, 0, missing)) if missing > 0 else rows).unflatten(0, (-1, _BLOCK))

    def _send_by_tile(self, sent: _Sent, key: Tensor, value: Tensor, b: int, head: int) -> tuple[Tensor, Tensor]:
        grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
        for queries in self._chunks():
            part = slice(queries.start, queries.stop)
            among = self._visible(b, head, queries, self._additive_tiles(queries)).to(key.dtype)
            grad_key += among.mT @ sent.to_key[part]
            grad_value += among.mT @ sent.to_value[part]
            query, grad = sent.query[part], sent.grad_output[part]
            grad_key += (grad @ value.mT * among).mT @ query
            grad_value += (query @ key.mT * among).mT @ grad
        return grad_key, grad_value

    def add_bias_gradients(self, sent: Tensor, grad_bias: Tensor, grad_relative_bias: Tensor) -> None:
        """Add sent[b, h, i] to the bias of each key that query i of head h sees.

        sent                [B, H, N]
        grad_bias           [B|1, H|1, N|1, M|1], empty where it is not wanted
        grad_relative_bias  [H|1, N + M - 1], empty where it is not wanted
        """
        if grad_bias.numel() == 0 and grad_relative_bias.numel() == 0:
            return
        if not self._depends_on_the_query():
            self._add_to_windows(sent, grad_relative_bias)
            return
        keys = torch.arange(self.num_keys, device=sent.device)
        for queries in self._chunks():
            tiles = self._additive_tiles(queries)
            part = slice(queries.start, queries.stop)
            positions = keys - torch.arange(queries.start, queries.stop, device=sent.device).unsqueeze(1)
            positions = (positions + self.num_queries - 1).flatten()
            for b in range(sent.shape[0]):
                for head in range(self.num_heads):
                    visible = self._visible(b, head, queries, tiles).to(self.dtype)
                    added = visible * sent[b, head, part].unsqueeze(1)
                    if grad_bias.numel() > 0:
                        to = _of_head(_of_queries(grad_bias, queries), b, head)
                        to += added.sum_to_size(to.shape)
                    if grad_relative_bias.numel() > 0:
                        to = grad_relative_bias[min(head, grad_relative_bias.shape[0] - 1)]
                        to.index_add_(0, positions, added.to(to.dtype).flatten())

    def _add_to_windows(self, sent: Tensor, grad_relative_bias: Tensor) -> None:
        """The way back from `_windows`: what a query adds begins at one place of the table and ends at another."""
        per_head = sent.double().sum(0)
        if grad_relative_bias.shape[0] == 1:
            per_head = per_head.sum(0, keepdim=True)
        first = torch.arange(self.num_queries - 1, -1, -1, device=sent.device)
        changes = per_head.new_zeros(per_head.shape[0], grad_relative_bias.shape[1] + 1)
        changes.index_add_(1, first, per_head)
        changes.index_add_(1, first + self._last_keys(), per_head, alpha=-1)
        grad_relative_bias += changes.cumsum(1)[:, :-1].to(grad_relative_bias.dtype)


class _Sent(NamedTuple):
    """What the queries of one head send, row by row; 0 where a row has no rest, also where it is NaN."""

    to_key: Tensor  # [N, D]
    to_value: Tensor  # [N, E]
    query: Tensor  # [N, D], weighted by `RestGradients.cross`
    grad_output: Tensor  # [N, E]

    @staticmethod
    def of(keys: VisibleKeys, sent: RestGradients, grad_output: Tensor, b: int, head: int) -> _Sent:
        query, grad = keys.query[b, head].to(keys.dtype) * keys.scale, grad_output[b, head].to(keys.dtype)
        key_weight, value_weight, cross = (x[b, head].unsqueeze(1) for x in sent[:3])
        has_rest = (value_weight != 0) | (cross != 0)
        query, grad = (x.masked_fill(~has_rest, 0) for x in (query, grad))
        return _Sent(key_weight * query, value_weight * grad, cross * query, grad)


def sum_over_keys(key: Tensor, value: Tensor) -> KeySums:
    """Sums over [..., M, D] and [..., M, E]."""
    dtype = accumulation_dtype(key.dtype)
    products = key.to(dtype).mT @ value.to(dtype)
    return KeySums(key.sum(-2, dtype=dtype), value.sum(-2, dtype=dtype), products)


def _sum_intervals(key: Tensor, value: Tensor, interval: int) -> KeySums:
    """Sums over whole intervals of [B, G, M, X], each [B, G, M // interval, ...], in the accumulation dtype."""
    dtype, whole = accumulation_dtype(key.dtype), key.shape[2] // interval
    keys, values = (x[:, :, : whole * interval].unflatten(2, (whole, interval)) for x in (key, value))
    products = key.new_empty(*key.shape[:2], whole, key.shape[3], value.shape[3], dtype=dtype)
    for c in range(whole):  # no copy of all keys in the accumulation dtype
        products[:, :, c] = keys[:, :, c].to(dtype).mT @ values[:, :, c].to(dtype)
    return KeySums(keys.sum(3, dtype=dtype), values.sum(3, dtype=dtype), products)


def _total_sums(key: Tensor, value: Tensor, sum_intervals: Callable[[Tensor, Tensor, int], KeySums]) -> KeySums:
    """Sums over all keys of [B, G, M, X], each [B, G, ...]; those of the intervals are added up in float64."""
    whole = key.shape[2] // INTERVAL * INTERVAL
    last = sum_over_keys(key[:, :, whole:], value[:, :, whole:])
    per_interval = sum_intervals(key, value, INTERVAL)
    return KeySums(
        *(
            (part.sum(2, dtype=torch.float64) + more).to(more.dtype)
            for part, more in zip(per_interval, last, strict=True)
        )
    )


def _running_sums(per_interval: KeySums) -> KeySums:
    """Sums over all intervals before each one, [B, G, C + 1, ...] of [B, G, C, ...].

    They are added up in float64, so that a million keys are as exact as those of one interval.
    """
    running = []
    for part in per_interval:
        sums = part.new_zeros(*part.shape[:2], part.shape[2] + 1, *part.shape[3:])
        sums[:, :, 1:] = part.cumsum(2, dtype=torch.float64)
        running.append(sums)
    return KeySums(*running)


def _sums_of_later(per_block: Tensor) -> Tensor:
    """For each block the sum of all later ones, added up in float64."""
    sums = per_block.flip(0).cumsum(0, dtype=torch.float64).flip(0)
    return F.pad(sums[1:], (0, 0, 0, 0, 0, 1)).to(per_block.dtype)


def _of_queries(tensor: Tensor, queries: range) -> Tensor:
    return tensor[:, :, queries.start : queries.stop] if tensor.shape[2] > 1 else tensor


def _of_head(tensor: Tensor, batch: int, head: int) -> Tensor:
    """The part [n|1, M|1] of a tensor [B|1, H|1, n|1, M|1]."""
    return tensor[min(batch, tensor.shape[0] - 1), min(head, tensor.shape[1] - 1)]
