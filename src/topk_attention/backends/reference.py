"""The specification: dense scores choose the keys, then autograd differentiates attention over the chosen keys.

It is deliberately short and slow. Every other backend is tested against this file, in float64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import activate, gated
from .calls import AttentionCall, FeedForwardCall, accumulation_dtype
from .dropout import keep_mask


def attention(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    """Returns output [B, H, N, E], indices int32 and weights, both [B, H, N, K], K the largest k, -1 = empty."""
    dtype = accumulation_dtype(call.query.dtype)
    num_heads, num_queries, num_keys = call.query.shape[1], call.query.shape[2], call.key.shape[2]
    queries_per_key_head = num_heads // call.key.shape[1]
    query = _nan_where_not_finite(call.query.to(dtype))
    key = _nan_where_not_finite(call.key.to(dtype)).repeat_interleave(queries_per_key_head, dim=1)
    value = call.value.to(dtype).repeat_interleave(queries_per_key_head, dim=1)

    head_k = torch.tensor(call.head_k or [num_keys] * num_heads, device=query.device)
    bias = _dense_bias(call, dtype)
    with torch.no_grad():
        scores = query @ key.mT * call.scale
        if call.adds_to_scores():  # otherwise the cap keeps their order, also where it rounds them to the same number
            scores = _capped(scores, call)
        scores = scores + bias
        scores = scores.masked_fill(~_visible(call, bias), -torch.inf)
        # A stable sort leaves tied keys in index order, so the lower index comes first.
        order = scores.argsort(dim=-1, descending=True, stable=True)[..., : int(head_k.max())]
        rank = torch.arange(order.shape[-1], device=query.device)
        kept = (scores.gather(-1, order) != -torch.inf) & (rank < head_k[:, None, None])
        chosen = torch.where(kept, order, num_keys).sort(dim=-1).values
        kept = chosen < num_keys
        chosen = chosen.clamp(max=num_keys - 1)

    def rows_of(table: Tensor) -> Tensor:  # [B, H, M, X] -> [B, H, N, K, X], zero in empty slots
        rows = table.unsqueeze(2).expand(-1, -1, num_queries, -1, -1)
        rows = rows.gather(3, chosen.unsqueeze(-1).expand(*chosen.shape, table.shape[-1]))
        return torch.where(kept.unsqueeze(-1), rows, 0)

    scores = _capped((query.unsqueeze(3) * rows_of(key)).sum(-1) * call.scale, call) + bias.gather(-1, chosen)
    row_is_empty = ~kept.any(-1, keepdim=True)
    scores = scores.masked_fill(~kept, -torch.inf).masked_fill(row_is_empty, 0)
    sink = scores[..., :0]
    if call.sinks is not None:
        sink = call.sinks.view(-1, 1, 1).expand(*scores.shape[:3], 1)
    weights = torch.cat([scores, sink], -1).softmax(-1)[..., : scores.shape[-1]]
    weights = torch.where(row_is_empty, 0, weights)
    rest_output = None
    if call.mass_scale is not None:
        visible = _visible(call, bias)
        # Empty slots go to one more column, or the last key would lose its mark to them.
        is_kept = F.pad(torch.zeros_like(visible), (0, 1)).scatter(-1, torch.where(kept, chosen, num_keys), True)
        rest = visible & ~is_kept[..., :num_keys]
        log_sum = torch.cat([scores, sink], -1).logsumexp(-1, keepdim=True)
        # The last one: of equal scores that of the key with the highest index.
        place = (kept.shape[-1] - 1 - scores.masked_fill(~kept, torch.inf).flip(-1).argmin(-1, keepdim=True)).clamp(
            min=0
        )
        smallest_kept = scores.gather(-1, place)
        rest_weight, rest_value = _rest(call, rest, log_sum, smallest_kept, query, key, value, bias)
        weights, rest_output = weights * (1 - rest_weight), rest_weight * rest_value
    dropped = weights
    if call.seed is not None:
        kept_by_dropout = keep_mask(call.seed, _row_numbers(call), chosen, call.dropout_p)
        dropped = weights * kept_by_dropout / (1 - call.dropout_p)
    output = (dropped.unsqueeze(-1) * rows_of(value)).sum(-2)
    if rest_output is not None:
        output = output + rest_output
    return output.to(call.query.dtype), torch.where(kept, chosen, -1).int(), weights


def _rest(
    call: AttentionCall,
    rest: Tensor,
    log_sum: Tensor,
    smallest_kept: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
) -> tuple[Tensor, Tensor]:
    """The weight [B, H, N, 1] and the value [B, H, N, E] of the entry for the rest: `functional.completion`.

    rest     [B, H, N, M]  bool
    log_sum  [B, H, N, 1]  of the kept scores, and smallest_kept the smallest of them
    """
    assert call.mass_scale is not None
    among = rest.to(query.dtype)
    count = among.sum(-1, keepdim=True)
    shares = among / count.clamp(min=1)
    # A row that sees a broken key keeps one and is NaN already.
    products = torch.where(rest, query @ torch.where(key.isfinite(), key, 0).mT * call.scale, 0)
    mean_product = (shares * products).sum(-1, keepdim=True)
    mean_score = mean_product + (shares * torch.where(rest, bias, 0)).sum(-1, keepdim=True)
    score = (1 - call.rest_lift) * mean_score + call.rest_lift * smallest_kept
    # Masked before exp: in a row without a rest it may be inf, and a gradient of 0 times inf is NaN.
    mass = torch.where(count > 0, score - log_sum, 0).exp()
    ratio = torch.where(count > 0, call.mass_scale[:, None, None] * count * mass, 0)
    shares = shares * (1 + products - mean_product)
    rest_value = shares @ torch.where(value.isfinite(), value, 0)
    sees_broken_value = among @ (~value.isfinite()).to(among.dtype) > 0
    return ratio / (1 + ratio), rest_value.masked_fill(sees_broken_value, torch.nan)


def feed_forward(call: FeedForwardCall) -> Tensor:
    """Returns [T, O]."""
    dtype = accumulation_dtype(call.x.dtype)
    x, w_in, w_out = call.x.to(dtype), call.w_in.to(dtype), call.w_out.to(dtype)
    pre_activation = F.linear(x, w_in, _to(call.b_in, dtype))
    if call.w_gate is None:
        hidden = activate(pre_activation, call.activation)
        ranked_by = pre_activation
    else:
        gate = F.linear(x, call.w_gate.to(dtype), _to(call.b_gate, dtype))
        hidden = gated(pre_activation, gate, call.activation, call.cut)
        ranked_by = hidden.abs()
    if call.k is not None:
        order = ranked_by.argsort(dim=-1, descending=True, stable=True)
        kept = torch.zeros_like(hidden, dtype=torch.bool).scatter(-1, order[:, : call.k], True)
        hidden = torch.where(kept, hidden, 0)
    if call.seed is not None:
        tokens = torch.arange(x.shape[0], device=x.device)[:, None]
        neurons = torch.arange(w_in.shape[0], device=x.device)
        hidden = hidden * keep_mask(call.seed, tokens, neurons, call.dropout_p) / (1 - call.dropout_p)
    return F.linear(hidden, w_out, _to(call.b_out, dtype)).to(call.x.dtype)


def _nan_where_not_finite(rows: Tensor) -> Tensor:
    """The rows with NaN in place of inf, so that their scores are NaN. A score of -inf would hide the key."""
    return torch.where(rows.isfinite(), rows, torch.nan)


def _capped(scores: Tensor, call: AttentionCall) -> Tensor:
    return scores if call.softcap is None else call.softcap * (scores / call.softcap).tanh()


def _to(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _dense_bias(call: AttentionCall, dtype: torch.dtype) -> Tensor:
    batch, num_heads, num_queries, _ = call.query.shape
    num_keys = call.key.shape[2]
    bias = torch.zeros(batch, num_heads, num_queries, num_keys, dtype=dtype, device=call.query.device)
    if call.bias is not None:
        bias = bias + call.bias.to(dtype)
    if call.relative_bias is not None:
        i = torch.arange(num_queries, device=bias.device)[:, None]
        j = torch.arange(num_keys, device=bias.device)
        bias = bias + call.relative_bias.to(dtype)[:, j - i + num_queries - 1]
    if call.attn_mask is not None and call.attn_mask.is_floating_point():
        bias = bias + call.attn_mask.to(dtype)
    return bias


def _visible(call: AttentionCall, bias: Tensor) -> Tensor:
    num_queries, num_keys = call.query.shape[2], call.key.shape[2]
    visible = bias != -torch.inf
    if call.is_causal:
        visible = visible.tril(diagonal=num_keys - num_queries)
    if call.attn_mask is not None and call.attn_mask.dtype == torch.bool:
        visible = visible & call.attn_mask
    return visible


def _row_numbers(call: AttentionCall) -> Tensor:
    batch, num_heads, num_queries, _ = call.query.shape
    rows = torch.arange(batch * num_heads * num_queries, device=call.query.device)
    return rows.view(batch, num_heads, num_queries, 1)
