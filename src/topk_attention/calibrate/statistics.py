"""Measures what attention heads and feed-forward layers would lose at each k, in one pass of a model in full.

Take a query with softmax weights p, sorted from the largest, and values v. The output of top-k attention is
sum of the first k p_j v_j / sum of the first k p_j. Let g be the gradient of the loss with respect to the output of the
head. The products g . v_j turn the error of the output into one number per query: the first-order change of the loss.
Two running sums give that number for all k at once, with one sort per row and without a square tensor. Its square says
how far the loss may move (half the mean square is the share of the curvature). Its mean says in which direction.

With completion the output is (1 - w) times that plus w times the value of the rest, where w is the weight of the rest.
Running sums over the sorted row, less those up to k, give the mean score and the value of the rest for all k at once,
too. Then each scale of its mass costs one multiplication per row and k, and the best one is found by trying several.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends.activations import activate, gated
from ..backends.calls import AttentionCall, FeedForwardCall, accumulation_dtype
from ..functional.completion import Completion

# Rows whose scores are sorted at a time: 128 x 8,192 in float32 are 4 MiB.
_ROWS_AT_A_TIME = 128
# The scales that are tried where a completion is fitted. The error is flat around the best one: at a step of sqrt(2)
# from it the weight of the rest is off by a sixth at most.
SCALES = (0.0, *(2.0 ** (step / 2) for step in range(-8, 13)))

_Kept = TypeVar("_Kept")


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
    mass_scale   [H, K]     with completion: the scale with which loss_error and loss_change were measured, where it
                            was fitted the one with the least loss_error at each k
    completion   the one that was on, whatever its scale; None without
    """

    ks: tuple[int, ...]
    lost_mass: Tensor
    loss_error: Tensor
    loss_change: Tensor
    num_rows: int = 0
    mass_scale: Tensor | None = None
    completion: Completion | None = None
    _rows_of_halves: list[int] = field(default_factory=lambda: [0, 0])

    def completion_at(self, ks: Sequence[int]) -> Completion | None:
        """The completion for these k, one for each head: its scales are those at the nearest k of the grid."""
        if self.completion is None or self.mass_scale is None:
            return None
        scales = []
        for head, k in enumerate(ks):
            nearest = min(range(len(self.ks)), key=lambda at: abs(math.log(self.ks[at] / k)))
            scales.append(float(self.mass_scale[head, nearest]))
        return replace(self.completion, mass_scale=scales)

    @staticmethod
    def empty(num_heads: int, ks: tuple[int, ...]) -> Curves:
        nothing = torch.zeros(num_heads, len(ks), dtype=torch.float64)
        return Curves(ks, nothing, nothing.clone(), torch.stack([nothing, nothing]))

    @staticmethod
    def joined(parts: Sequence[Curves]) -> Curves:
        """The means over the rows of all parts, which have one grid."""
        rows = torch.tensor([part.num_rows for part in parts], dtype=torch.float64)
        of_halves = torch.tensor([part._rows_of_halves for part in parts], dtype=torch.float64)  # [P, 2]

        def mean(tensors: Sequence[Tensor], weights: Tensor) -> Tensor:
            return torch.tensordot(weights / weights.sum().clamp(min=1), torch.stack(list(tensors)), 1)

        changes = [mean([part.loss_change[half] for part in parts], of_halves[:, half]) for half in (0, 1)]
        return replace(
            parts[0],
            lost_mass=mean([part.lost_mass for part in parts], rows),
            loss_error=mean([part.loss_error for part in parts], rows),
            loss_change=torch.stack(changes),
            num_rows=sum(part.num_rows for part in parts),
            _rows_of_halves=[int(number) for number in of_halves.sum(0)],
        )

    @staticmethod
    def of_heads(parts: Sequence[Curves]) -> Curves:
        """The curves of all heads of a layer, of which each part has some."""

        scales = [part.mass_scale for part in parts if part.mass_scale is not None]
        return replace(
            parts[0],
            lost_mass=torch.cat([part.lost_mass for part in parts]),
            loss_error=torch.cat([part.loss_error for part in parts]),
            loss_change=torch.cat([part.loss_change for part in parts], 1),
            mass_scale=torch.cat(scales) if scales else None,
        )

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


@dataclass(eq=False)
class CurvesByScale:
    """The curves of one layer with completion, for each of several scales of its mass.

    completion  that of all curves, but for its scale
    scales      [C, H]
    of_scale    C curves
    """

    completion: Completion
    scales: Tensor
    of_scale: list[Curves]

    @staticmethod
    def empty(completion: Completion, scales: Tensor, ks: tuple[int, ...]) -> CurvesByScale:
        return CurvesByScale(completion, scales, [Curves.empty(scales.shape[1], ks) for _ in scales])

    @staticmethod
    def joined(parts: Sequence[CurvesByScale]) -> CurvesByScale:
        of_scale = [Curves.joined(of_one) for of_one in zip(*(part.of_scale for part in parts), strict=True)]
        return replace(parts[0], of_scale=of_scale)

    def add(self, rows: Rows, *, signed: bool) -> None:
        for scale, curves in zip(self.scales, self.of_scale, strict=True):
            curves.add(rows.lost_mass, rows.loss_change(scale), signed=signed)

    def best(self) -> Curves:
        """At each k of each head the curves of the scale with the least error; of equal ones the one nearest to 1."""
        errors = torch.stack([curves.loss_error for curves in self.of_scale])  # [C, H, K]
        least = errors <= errors.amin(0) * (1 + 1e-9)
        distance = self.scales.clamp(min=1e-9).log().abs().unsqueeze(2)
        chosen = torch.where(least, distance, torch.inf).argmin(0, keepdim=True)

        def pick(tensors: Tensor) -> Tensor:
            """[C, H, K] -> [H, K]"""
            return tensors.gather(0, chosen)[0]

        changes = [pick(torch.stack([curves.loss_change[half] for curves in self.of_scale])) for half in (0, 1)]
        return replace(
            self.of_scale[0],
            loss_error=pick(errors),
            loss_change=torch.stack(changes),
            mass_scale=pick(self.scales.unsqueeze(2).expand_as(errors)),
            completion=self.completion,
        )


class Rows(NamedTuple):
    """What some queries lose at each k of a grid; tensors are [H, rows, K], or [rows, K] of one head.

    lost_mass    softmax weight outside the k best keys
    kept         effect on the loss, to the first order, of the kept keys' share of attention
    full         [..., 1], that of full attention
    rest         that of the value of the rest, with completion
    mass         weight of the rest beside 1 for the kept keys, for a scale of 1
    """

    lost_mass: Tensor
    kept: Tensor
    full: Tensor
    rest: Tensor | None = None
    mass: Tensor | None = None

    def loss_change(self, mass_scale: Tensor | None = None) -> Tensor:
        """The first-order change of the loss, [H, rows, K]; with completion for a scale of each head, [H]."""
        if self.rest is None or self.mass is None:
            return self.kept - self.full
        assert mass_scale is not None
        mass = self.mass * mass_scale.to(self.mass)[:, None, None]
        return self.kept + mass / (1 + mass) * (self.rest - self.kept) - self.full

    def padded(self, missing: int) -> Rows:
        """With columns for k above the number of keys, which lose nothing."""
        if missing == 0:
            return self
        lost, kept, full, rest, mass = self
        more = (*full.shape[:-1], missing)
        none = lost.new_zeros(more)
        return Rows(
            torch.cat([lost, none], -1),
            torch.cat([kept, full.expand(more)], -1),
            full,
            None if rest is None else torch.cat([rest, none], -1),
            None if mass is None else torch.cat([mass, none], -1),
        )

    @staticmethod
    def joined(parts: Sequence[Rows], *, by_head: bool) -> Rows:
        """Rows of one head one after the other, or those of all heads."""
        join = torch.stack if by_head else torch.cat
        lost, kept, full = (join(list(column)) for column in zip(*(part[:3] for part in parts), strict=True))
        rest = [part.rest for part in parts if part.rest is not None]
        mass = [part.mass for part in parts if part.mass is not None]
        return Rows(lost, kept, full, join(rest) if rest else None, join(mass) if mass else None)


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
    completion        the completion that is on while curves are measured; None: none
    fit_scale         try all `SCALES` in place of the completion's own
    most_keys         the keys that a layer's grid is for, by path, where they are known before the first row
    """

    queries_per_head: int
    largest_k: int
    signed: bool = True
    completion: Completion | None = None
    fit_scale: bool = False
    attention: dict[str, Curves] = field(default_factory=dict)
    feed_forward: dict[str, Curves] = field(default_factory=dict)
    by_scale: dict[str, CurvesByScale] = field(default_factory=dict)
    most_keys: dict[str, int] = field(default_factory=dict)

    def join(self, others: Sequence[Collector]) -> None:
        """Hold what several collectors have gathered, of which this may be one."""
        self.by_scale = _joined([other.by_scale for other in others], CurvesByScale.joined)
        self.feed_forward = _joined([other.feed_forward for other in others], Curves.joined)
        if self.completion is None:
            self.attention = _joined([other.attention for other in others], Curves.joined)
        else:
            self.attention = {path: curves.best() for path, curves in self.by_scale.items()}

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
        if path in self.attention:
            ks = self.attention[path].ks
        else:
            ks = k_grid(min(self.largest_k, self.most_keys.get(path, num_keys)))
        at = torch.tensor([k - 1 for k in ks if k <= num_keys], device=call.query.device)
        places = torch.arange(len(sampled.queries), device=call.query.device)
        for b in range(batch):
            heads = []
            for head in range(num_heads):
                parts = [
                    _attention_rows(
                        *_scores(sampled, b, head, part),
                        _values(call, b, head)[: _num_visible(sampled, part)],
                        grad_output[b, head, sampled.queries[part]],
                        at,
                        self.completion,
                        None if call.sinks is None else call.sinks[head],
                    )
                    for part in places.split(_ROWS_AT_A_TIME)
                ]
                heads.append(Rows.joined(parts, by_head=False).padded(len(ks) - len(at)))
            self._add(path, ks, Rows.joined(heads, by_head=True))

    def _add(self, path: str, ks: tuple[int, ...], rows: Rows) -> None:
        num_heads = rows.lost_mass.shape[0]
        if self.completion is None:
            curves = self.attention.setdefault(path, Curves.empty(num_heads, ks))
            curves.add(rows.lost_mass, rows.loss_change(), signed=self.signed)
            return
        if path not in self.by_scale:
            if self.fit_scale:
                scales = torch.tensor(SCALES, dtype=torch.float64).unsqueeze(1).expand(-1, num_heads)
            else:
                scales = self.completion.per_head(num_heads, rows.lost_mass).double().cpu().unsqueeze(0)
            self.by_scale[path] = CurvesByScale.empty(self.completion, scales, ks)
        self.by_scale[path].add(rows, signed=self.signed)
        self.attention[path] = self.by_scale[path].best()

    @torch.no_grad()
    def see_feed_forward(self, path: str, call: FeedForwardCall, grad_output: Tensor) -> None:
        """grad_output [T, O], the gradient of the summed loss with respect to this layer's output."""
        num_neurons = call.w_in.shape[0]
        curves = self.feed_forward.setdefault(path, Curves.empty(1, k_grid(num_neurons)))
        at = torch.tensor([k - 1 for k in curves.ks], device=call.x.device)
        step = max(1, call.x.shape[0] // self.queries_per_head)
        for tokens in torch.arange(0, call.x.shape[0], step, device=call.x.device).split(_ROWS_AT_A_TIME):
            x, grad = call.x[tokens], grad_output[tokens]
            hidden, ranked_by = neurons_of(call, x)
            order = ranked_by.argsort(dim=1, descending=True)
            hidden = hidden.to(accumulation_dtype(hidden.dtype))  # a running sum in bfloat16 would stop growing
            effect = (hidden * (grad @ call.w_out)).gather(1, order).cumsum(1)
            mass = hidden.abs().gather(1, order).cumsum(1)
            lost = (mass[:, -1:] - mass[:, at]) / mass[:, -1:].clamp(min=torch.finfo(mass.dtype).tiny)
            curves.add(lost.unsqueeze(0), (effect[:, at] - effect[:, -1:]).unsqueeze(0), signed=self.signed)


def _joined(parts: Sequence[dict[str, _Kept]], join: Callable[[Sequence[_Kept]], _Kept]) -> dict[str, _Kept]:
    """What was kept of each layer, by path, in the order in which the parts name them."""
    paths = dict.fromkeys(path for part in parts for path in part)
    return {path: join([part[path] for part in parts if path in part]) for path in paths}


def neurons_of(call: FeedForwardCall, x: Tensor) -> tuple[Tensor, Tensor]:
    """What each neuron gives for inputs [T, D] of a call, and what it is ranked by: both [T, F], in the dtype of x."""

    def linear(weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    value = linear(call.w_in, call.b_in)
    if call.w_gate is None:
        return activate(value, call.activation), value
    hidden = gated(value, linear(call.w_gate, call.b_gate), call.activation, call.cut)
    return hidden, hidden.abs()


def _num_visible(sampled: SampledCall, places: Tensor) -> int:
    """How many keys the queries at these places of the sample may see, so that hidden keys are not sorted."""
    call = sampled.call
    if not call.is_causal:
        return call.key.shape[2]
    return max(1, int(sampled.queries[places].max()) + 1 + call.key.shape[2] - call.query.shape[2])


def _values(call: AttentionCall, batch: int, head: int) -> Tensor:
    value = call.value[batch, head * call.key.shape[1] // call.query.shape[1]]
    return value.to(accumulation_dtype(value.dtype))


def _scores(sampled: SampledCall, batch: int, head: int, places: Tensor) -> tuple[Tensor, Tensor]:
    """Scores [rows, num_visible] of one head's queries at these places of the sample, -inf where hidden, and the part
    of them that is query . key."""
    call, rows = sampled.call, sampled.queries[places]
    num_queries, num_keys, num_visible = call.query.shape[2], call.key.shape[2], _num_visible(sampled, places)
    keys = call.key[batch, head * call.key.shape[1] // call.query.shape[1], :num_visible]
    dtype = accumulation_dtype(keys.dtype)
    products = call.query[batch, head, rows].to(dtype) @ keys.mT.to(dtype) * call.scale
    scores = products if call.softcap is None else call.softcap * (products / call.softcap).tanh()
    if call.relative_bias is not None:
        of_head = call.relative_bias[head if call.relative_bias.shape[0] > 1 else 0]
        scores = scores + of_head[torch.arange(num_visible, device=rows.device) - rows.unsqueeze(1) + num_queries - 1]
    for dense in (call.bias, call.attn_mask):
        if dense is not None:
            part = dense[batch if dense.shape[0] > 1 else 0, head if dense.shape[1] > 1 else 0]
            part = part[places] if part.shape[0] > 1 else part
            part = part[:, :num_visible]
            scores = scores.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else scores + part
    if call.is_causal:
        last_key = rows.unsqueeze(1) + num_keys - num_queries
        scores = scores.masked_fill(torch.arange(num_visible, device=rows.device) > last_key, -torch.inf)
    return scores, products


def _attention_rows(
    scores: Tensor,
    products: Tensor,
    values: Tensor,
    grad_output: Tensor,
    at: Tensor,
    completion: Completion | None,
    sink: Tensor | None,
) -> Rows:
    """Rows [rows, K] of one head.

    scores    [rows, M], -inf where hidden
    products  [rows, M], what of the scores is query . key
    at        [K], k - 1
    sink      [] of the head
    """
    at = at.clamp(max=scores.shape[1] - 1)
    scores, by_score = scores.sort(dim=1, descending=True)
    entries = scores
    if sink is not None:  # it keeps its share at every k
        entries = torch.cat([scores, sink.to(scores.dtype).expand(scores.shape[0], 1)], 1)
    p = entries.softmax(1).nan_to_num(0.0)  # NaN: a row that sees no key
    p, of_sink = p[:, : scores.shape[1]], p[:, scores.shape[1] :].sum(1, keepdim=True)
    effects = (grad_output.to(values.dtype) @ values.mT).gather(1, by_score)
    effect = (p * effects).cumsum(1)
    mass = p.cumsum(1)
    kept = (mass[:, at] + of_sink).clamp(min=torch.finfo(mass.dtype).tiny)
    # A row that sees no key has mass zero, so it loses nothing.
    lost = (mass[:, -1:] - mass[:, at]).clamp(min=0)
    rows = Rows(lost, effect[:, at] / kept, effect[:, -1:])
    if completion is None:
        return rows
    is_hidden = scores == -torch.inf
    count = ((~is_hidden).sum(1, keepdim=True) - at - 1).clamp(min=0).to(p.dtype)
    share = 1 / count.clamp(min=1)
    own = products.gather(1, by_score).masked_fill(is_hidden, 0)
    effects, visible = effects.masked_fill(is_hidden, 0), scores.masked_fill(is_hidden, 0)
    mean, mean_product, mean_effect = (_sums_after(x, at) * share for x in (visible, own, effects))
    rest = (1 - mean_product) * mean_effect + _sums_after(own * effects, at) * share
    score = (1 - completion.lift) * mean + completion.lift * visible[:, at]
    log_kept = entries.logsumexp(1, keepdim=True) + kept.log()
    ratio = torch.where(count > 0, count * (score - log_kept).exp(), 0)
    return rows._replace(rest=torch.where(count > 0, rest, 0), mass=ratio)


def _sums_after(sorted_rows: Tensor, at: Tensor) -> Tensor:
    """Sums of what comes after each of these places, [rows, K]: the last ones are small differences of large sums."""
    sums = sorted_rows.cumsum(1, dtype=torch.float64)
    return (sums[:, -1:] - sums[:, at]).to(sorted_rows.dtype)
