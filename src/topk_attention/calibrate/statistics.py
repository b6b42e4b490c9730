"""Measures what attention heads and feed-forward layers would lose at each k, in one pass of a model in full.

Take a query with softmax weights p, sorted from the largest, and values v. The output of top-k attention is
sum of the first k p_j v_j / sum of the first k p_j. Let g be the gradient of the loss with respect to the output of the
head. The products g . v_j turn the error of the output into one number per query: the first-order change of the loss.
Two running sums give that number for all k at once, with one sort per row and without a square tensor. Its square says
how far the loss may move (half the mean square is the share of the curvature). Its mean says in which direction.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends.activations import activate
from ..backends.calls import AttentionCall, FeedForwardCall, accumulation_dtype

# Rows whose scores are sorted at a time: 128 x 8,192 in float32 are 4 MiB.
_ROWS_AT_A_TIME = 128


def k_grid(largest: int) -> tuple[int, ...]:
    """The k at which curves are measured: four for each doubling, up to and including the largest."""
    powers = range(4 * largest.bit_length() + 1)
    return tuple(sorted({k for power in powers if (k := round(2 ** (power / 4))) < largest} | {largest}))


@dataclass(eq=False)
class Curves:
    """Means over the queries (or tokens) seen so far, at each k of a grid.

    ks           the grid, K of them
    lost_mass    [H, K]     softmax weight outside the k best keys; for a feed-forward layer the share of the sum of
                            |activations| outside the k best neurons
    loss_error   [H, K]     square of the first-order change of the loss, in nats squared
    loss_change  [2, H, K]  that change with its sign, in nats, for the earlier and for the later half of each text,
                            because noise differs between the halves; zero where the sign means nothing
    num_rows     queries (or tokens) so far
    """

    ks: tuple[int, ...]
    lost_mass: Tensor
    loss_error: Tensor
    loss_change: Tensor
    num_rows: int = 0
    _rows_of_halves: list[int] = field(default_factory=lambda: [0, 0])

    @staticmethod
    def empty(num_heads: int, ks: tuple[int, ...]) -> Curves:
        nothing = torch.zeros(num_heads, len(ks), dtype=torch.float64)
        return Curves(ks, nothing, nothing.clone(), torch.stack([nothing, nothing]))

    def add(self, lost_mass: Tensor, loss_change: Tensor, *, signed: bool = True) -> None:
        """Add rows, in the order of the text, to the means; both tensors are [H, rows, K]."""
        rows = lost_mass.shape[1]
        share = rows / (self.num_rows + rows)
        self.lost_mass += share * (lost_mass.double().mean(1).cpu() - self.lost_mass)
        self.loss_error += share * (loss_change.double().square().mean(1).cpu() - self.loss_error)
        self.num_rows += rows
        if not signed:
            return
        for half, change in enumerate(loss_change.double().tensor_split(2, dim=1)):
            if new_rows := change.shape[1]:
                self._rows_of_halves[half] += new_rows
                share = new_rows / self._rows_of_halves[half]
                self.loss_change[half] += share * (change.mean(1).cpu() - self.loss_change[half])


@dataclass(frozen=True)
class SampledCall:
    """An attention call and those of its queries that are measured.

    call     where its bias or its mask had one row for each query, it keeps the rows of these queries alone; a whole
             mask [N, M], kept until the backward pass, would make memory quadratic
    queries  [R] int64
    """

    call: AttentionCall
    queries: Tensor

    @staticmethod
    def of(call: AttentionCall, queries: Tensor) -> SampledCall:
        def rows(dense: Tensor | None) -> Tensor | None:
            return dense if dense is None or dense.shape[2] == 1 else dense[:, :, queries]

        return SampledCall(replace(call, bias=rows(call.bias), attn_mask=rows(call.attn_mask)), queries)


@dataclass
class Collector:
    """Gathers the curves of every layer while a model runs forward and backward.

    queries_per_head  queries of a sequence whose rows are sorted, spread evenly over it
    largest_k         curves end here
    signed            whether the sign of a change of the loss has a meaning
    """

    queries_per_head: int
    largest_k: int
    signed: bool = True
    attention: dict[str, Curves] = field(default_factory=dict)
    feed_forward: dict[str, Curves] = field(default_factory=dict)

    @torch.no_grad()
    def sample(self, call: AttentionCall, number: int) -> SampledCall:
        """The part of the number-th call of a forward pass that `see_attention` needs."""
        num_queries = call.query.shape[2]
        # Each layer has another offset, so every query is measured in one of the layers.
        step = max(1, num_queries // self.queries_per_head)
        return SampledCall.of(call, torch.arange(number % step, num_queries, step, device=call.query.device))

    @torch.no_grad()
    def see_attention(self, path: str, sampled: SampledCall, grad_output: Tensor) -> None:
        """grad_output [B, H, N, E], the gradient of the summed loss with respect to this layer's heads."""
        call = sampled.call
        batch, num_heads = call.query.shape[:2]
        num_keys = call.key.shape[2]
        curves = self.attention.setdefault(path, Curves.empty(num_heads, k_grid(min(self.largest_k, num_keys))))
        device = call.query.device
        at = torch.tensor([k - 1 for k in curves.ks if k <= num_keys], device=device)
        places = torch.arange(len(sampled.queries), device=device)
        for b in range(batch):
            lost, change = [], []
            for head in range(num_heads):
                parts = [
                    _attention_rows(
                        _scores(sampled, b, head, part),
                        _values(call, b, head)[: _num_visible(sampled, part)],
                        grad_output[b, head, sampled.queries[part]],
                        at,
                    )
                    for part in places.split(_ROWS_AT_A_TIME)
                ]
                lost.append(torch.cat([part[0] for part in parts]))
                change.append(torch.cat([part[1] for part in parts]))
            missing = (0, len(curves.ks) - len(at))  # a k above the number of keys loses nothing
            curves.add(F.pad(torch.stack(lost), missing), F.pad(torch.stack(change), missing), signed=self.signed)

    @torch.no_grad()
    def see_feed_forward(self, path: str, call: FeedForwardCall, grad_output: Tensor) -> None:
        """grad_output [T, O], the gradient of the summed loss with respect to this layer's output."""
        num_neurons = call.w_in.shape[0]
        curves = self.feed_forward.setdefault(path, Curves.empty(1, k_grid(num_neurons)))
        at = torch.tensor([k - 1 for k in curves.ks], device=call.x.device)
        step = max(1, call.x.shape[0] // self.queries_per_head)
        for tokens in torch.arange(0, call.x.shape[0], step, device=call.x.device).split(_ROWS_AT_A_TIME):
            x, grad = call.x[tokens], grad_output[tokens]
            value = F.linear(x, call.w_in, call.b_in)
            if call.w_gate is None:
                hidden, ranked_by = activate(value, call.activation), value
            else:
                hidden = activate(F.linear(x, call.w_gate, call.b_gate), call.activation) * value
                ranked_by = hidden.abs()
            order = ranked_by.argsort(dim=1, descending=True)
            hidden = hidden.to(accumulation_dtype(hidden.dtype))  # a running sum in bfloat16 would stop growing
            effect = (hidden * (grad @ call.w_out)).gather(1, order).cumsum(1)
            mass = hidden.abs().gather(1, order).cumsum(1)
            lost = (mass[:, -1:] - mass[:, at]) / mass[:, -1:].clamp(min=torch.finfo(mass.dtype).tiny)
            curves.add(lost.unsqueeze(0), (effect[:, at] - effect[:, -1:]).unsqueeze(0), signed=self.signed)


def _num_visible(sampled: SampledCall, places: Tensor) -> int:
    """How many keys the queries at these places of the sample may see, so that hidden keys are not sorted."""
    call = sampled.call
    if not call.is_causal:
        return call.key.shape[2]
    return max(1, int(sampled.queries[places].max()) + 1 + call.key.shape[2] - call.query.shape[2])


def _values(call: AttentionCall, batch: int, head: int) -> Tensor:
    value = call.value[batch, head * call.key.shape[1] // call.query.shape[1]]
    return value.to(accumulation_dtype(value.dtype))


def _scores(sampled: SampledCall, batch: int, head: int, places: Tensor) -> Tensor:
    """Scores [rows, num_visible] of one head's queries at these places of the sample, -inf where hidden."""
    call, rows = sampled.call, sampled.queries[places]
    num_queries, num_keys, num_visible = call.query.shape[2], call.key.shape[2], _num_visible(sampled, places)
    keys = call.key[batch, head * call.key.shape[1] // call.query.shape[1], :num_visible]
    dtype = accumulation_dtype(keys.dtype)
    scores = call.query[batch, head, rows].to(dtype) @ keys.mT.to(dtype) * call.scale
    if call.relative_bias is not None:
        of_head = call.relative_bias[head if call.relative_bias.shape[0] > 1 else 0]
        scores += of_head[torch.arange(num_visible, device=rows.device) - rows.unsqueeze(1) + num_queries - 1]
    for dense in (call.bias, call.attn_mask):
        if dense is not None:
            part = dense[batch if dense.shape[0] > 1 else 0, head if dense.shape[1] > 1 else 0]
            part = part[places] if part.shape[0] > 1 else part
            part = part[:, :num_visible]
            scores = scores.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else scores + part
    if call.is_causal:
        last_key = rows.unsqueeze(1) + num_keys - num_queries
        scores = scores.masked_fill(torch.arange(num_visible, device=rows.device) > last_key, -torch.inf)
    return scores


def _attention_rows(scores: Tensor, values: Tensor, grad_output: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """Lost mass and change of the loss, [rows, K], of rows of scores [rows, M] (-inf where hidden)."""
    at = at.clamp(max=scores.shape[1] - 1)
    p, order = scores.softmax(1).nan_to_num(0.0).sort(dim=1, descending=True)  # NaN: a row that sees no key
    effect = (p * (grad_output.to(values.dtype) @ values.mT).gather(1, order)).cumsum(1)
    mass = p.cumsum(1)
    kept = mass[:, at].clamp(min=torch.finfo(mass.dtype).tiny)
    # A row that sees no key has mass zero, so it loses nothing.
    return (mass[:, -1:] - mass[:, at]).clamp(min=0), effect[:, at] / kept - effect[:, -1:]
