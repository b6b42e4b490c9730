"""The rest, the keys that a query sees and does not keep, as one more entry of its softmax: see `Completion`.

For a row with kept scores s and weights p, and a rest of n keys with the score m (their mean, lifted), the entry has
the weight g = c * n * exp(m) / Z, where Z = sum(exp(s)) + c * n * exp(m). The kept weights shrink to w = p * (1 - g),
and u = g / n is the share of each key of the rest. With q . k for scores without masks and biases, and their mean m'
over the rest:

output = sum of w v over kept + u * sum of (1 + q . k - m') v over rest

A sum over the rest is one over all visible keys less one over the kept ones. No key and no value of the rest is read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..calls import RestGradients, RestInputs
from .rows import dot_with_rows
from .tiles import Step


class Seen(NamedTuple):
    """Sums over the keys that each row of one step sees, kept or not; rows in the order batch, head, query."""

    mass_scale: Tensor  # [rows, 1]
    lift: float
    key_sum: Tensor  # [rows, D]
    value_sum: Tensor  # [rows, E]
    score_value: Tensor  # [rows, E], of each (q . k) v
    num_seen: Tensor  # [rows, 1]
    score_sum: Tensor | None  # [rows, 1], of masks and biases
    grad_key: Tensor | None  # [rows, D], in the backward pass: of each (grad_output . v) k


class Weighed(NamedTuple):
    """A step's softmax with the rest in it."""

    weights: Tensor  # [rows, k] of the kept keys
    share: Tensor  # [rows, 1], u, the weight of each key of the rest
    mass: Tensor  # [rows, 1], the weight of the rest for a scale of 1
    log_sums: Tensor  # [rows, 1], of all that the weights are divided by
    cut: Tensor  # [rows, 1] int64, which entry has the smallest kept score
    from_rest: Tensor  # [rows, k], to subtract from the weights of the kept values
    value_sum: Tensor  # [rows, E], to add times the share


def seen_by(
    rest: RestInputs, step: Step, query: Tensor, num_queries: int, is_causal: bool, grad_output: Tensor | None = None
) -> Seen:
    """The sums of one step's rows.

    query        [rows, D], scaled
    grad_output  [rows, E], in the backward pass
    """
    num_keys = rest.key.shape[2]
    last_keys = torch.arange(step.queries.start, step.queries.stop, device=query.device) + 1
    last_keys = (last_keys + num_keys - num_queries).clamp(min=0) if is_causal else torch.full_like(last_keys, num_keys)
    query = query.view(*step.shape, -1)
    grad = None if grad_output is None else grad_output.view(*step.shape, -1)
    sums = (
        _whole_sums(rest, step, query, grad)
        if rest.interval == 0
        else _running_sums(rest, step, query, grad, last_keys)
    )
    key_sum, value_sum, score_value, grad_key = sums
    count = last_keys.view(1, 1, 1, -1) if rest.counts is None else _narrow(rest.counts, step)
    scale = rest.mass_scale[step.query_heads.start : step.query_heads.stop].view(1, *step.shape[1:3], 1, 1)
    return Seen(
        _as_rows(scale, step),
        rest.lift,
        _as_rows(key_sum, step),
        _as_rows(value_sum, step),
        _as_rows(score_value, step),
        _as_rows(count.unsqueeze(-1).to(scale.dtype), step),
        None if rest.score_sums is None else _as_rows(_narrow(rest.score_sums, step).unsqueeze(-1), step),
        None if grad_key is None else _as_rows(grad_key, step),
    )


def weigh(
    query: Tensor,
    seen: Seen,
    key_table: Tensor,
    in_table: Tensor,
    scores: Tensor,
    empty_slots: Tensor | None,
    weights: Tensor,
    log_sums: Tensor,
) -> Weighed:
    """Let the rest into the softmax.

    query        [rows, D], scaled
    key_table    [b * g * M, D], and in_table [rows, k] the kept keys' rows in it
    scores       [rows, k], -inf in empty slots
    empty_slots  [rows, k] bool, None where there are none
    weights      [rows, k], the softmax of the scores, in which a sink may take part
    log_sums     [rows, 1], the logarithm of what they are divided by; with sinks inf in rows without keys
    """
    kept = scores if empty_slots is None else scores.masked_fill(empty_slots, 0)
    count = seen.num_seen - (scores.shape[1] if empty_slots is None else (~empty_slots).sum(1, keepdim=True))
    total = (query * seen.key_sum).sum(1, keepdim=True)
    products = kept
    if seen.score_sum is not None:  # the scores are not the products alone
        products = zero_in(empty_slots, dot_with_rows(query, key_table, in_table))
    mean_product = (total - products.sum(1, keepdim=True)) / count.clamp(min=1)
    if seen.score_sum is not None:
        total = total + seen.score_sum
    mean = (total - kept.sum(1, keepdim=True)) / count.clamp(min=1)
    cut = _last_smallest(scores, empty_slots)
    score = (1 - seen.lift) * mean + seen.lift * scores.gather(1, cut)
    mass = torch.where(count > 0, count * (score - log_sums).exp(), 0)
    whole = 1 + seen.mass_scale * mass
    mass = mass / whole
    share = seen.mass_scale * mass / count.clamp(min=1)
    value_sum = (1 - mean_product) * seen.value_sum + seen.score_value
    log_sums = log_sums + whole.log()
    return Weighed(weights / whole, share, mass, log_sums, cut, share * (1 + products - mean_product), value_sum)


class RowGradients(NamedTuple):
    """The gradients of one step. Those of kept entries lack what the rest sends to all visible keys, to them too."""

    products: Tensor  # [rows, k], of the kept q . k
    biases: Tensor  # [rows, k], of what is added to them
    values: Tensor  # [rows, k], the weight of the row's grad_output in each kept value's gradient
    query: Tensor  # [rows, D], of the scaled query through the sums
    mean_grad: Tensor  # [rows, 1], the sum of all weights times their gradients
    sent: RestGradients  # each [rows, 1]


def differentiate(
    seen: Seen,
    mass: Tensor,
    cut: Tensor,
    query: Tensor,
    key_table: Tensor,
    in_table: Tensor,
    empty_slots: Tensor | None,
    weights: Tensor,
    dropped_weights: Tensor,
    grad_output: Tensor,
    value_products: Tensor,
    grad_weights: Tensor,
) -> RowGradients:
    """The way back through `weigh` and the sum of values.

    mass, cut        [rows, 1], what `weigh` returned
    weights          [rows, k], what it returned, and dropped_weights after dropout
    value_products   [rows, k], grad_output times each kept value, and grad_weights the same after dropout
    The other arguments are those of `weigh`; 0 stands in empty slots.
    """
    assert seen.grad_key is not None
    num_kept = weights.shape[1] if empty_slots is None else (~empty_slots).sum(1, keepdim=True)
    count = (seen.num_seen - num_kept).clamp(min=1)
    has_rest = mass != 0
    rest_weight = seen.mass_scale * mass
    share = rest_weight / count
    value_product_sum = (grad_output * seen.value_sum).sum(1, keepdim=True) - value_products.sum(1, keepdim=True)
    value_product_mean = value_product_sum / count
    products = zero_in(empty_slots, dot_with_rows(query, key_table, in_table))
    mean_product = ((query * seen.key_sum).sum(1, keepdim=True) - products.sum(1, keepdim=True)) / count
    # grad_output times the value of the rest
    grad_rest = (1 - mean_product) * value_product_sum + (grad_output * seen.score_value).sum(1, keepdim=True)
    grad_rest = (grad_rest - (products * value_products).sum(1, keepdim=True)) / count
    mean_grad = (weights * grad_weights).sum(1, keepdim=True)
    mean_grad = mean_grad + torch.where(has_rest, rest_weight * grad_rest, 0)
    grad_mass = torch.where(has_rest, mass * (grad_rest - mean_grad), 0)
    grad_score = seen.mass_scale * grad_mass
    to_bias = (1 - seen.lift) * grad_score / count
    biases = weights * (grad_weights - mean_grad) - to_bias
    biases.scatter_add_(1, cut, seen.lift * grad_score)
    biases = zero_in(empty_slots, biases)
    to_key = to_bias - torch.where(has_rest, share * value_product_mean, 0)
    to_value = torch.where(has_rest, share * (1 - mean_product), 0)
    of_products = zero_in(empty_slots, biases - torch.where(has_rest, share * (value_products - value_product_mean), 0))
    values = dropped_weights - torch.where(has_rest, share * (1 + products - mean_product), 0)
    of_query = to_key * seen.key_sum + torch.where(has_rest, share * seen.grad_key, 0)
    sent = RestGradients(to_key, to_value, share, to_bias, grad_mass)
    return RowGradients(of_products, biases, zero_in(empty_slots, values), of_query, mean_grad, sent)


def _last_smallest(scores: Tensor, empty_slots: Tensor | None) -> Tensor:
    """[rows, 1]: the entry with the smallest score, of equal ones the last; slots come in the order of keys."""
    kept = scores if empty_slots is None else scores.masked_fill(empty_slots, torch.inf)
    return scores.shape[1] - 1 - kept.flip(1).argmin(1, keepdim=True)


def zero_in(empty_slots: Tensor | None, entries: Tensor) -> Tensor:
    """The entries with 0 in empty slots, None where there are none."""
    return entries if empty_slots is None else entries.masked_fill(empty_slots, 0)


def _whole_sums(
    rest: RestInputs, step: Step, query: Tensor, grad: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Sums for all queries, or for each one, [b, g, r|1, n|1, X]; products [b, g, r, n, X]"""
    parts = []
    for sums in (rest.key_sums, rest.value_sums):
        part = _of_heads(sums, step, rest)
        parts.append(part if part.shape[3] == 1 else part[:, :, :, step.queries.start : step.queries.stop])
    if rest.score_values is not None:
        grad_key = None if rest.grad_keys is None else _narrow(rest.grad_keys, step)
        return parts[0], parts[1], _narrow(rest.score_values, step), grad_key
    assert rest.products is not None
    products = _of_heads(rest.products, step, rest)[:, :, :, 0]
    return parts[0], parts[1], query @ products, None if grad is None else grad @ products.mT


def _running_sums(
    rest: RestInputs, step: Step, query: Tensor, grad: Tensor | None, last_keys: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The last running sums before the first query's last key, and for each query the keys from there on."""
    first = int(last_keys[0]) // rest.interval
    start, stop = first * rest.interval, int(last_keys[-1])
    key, value = (_of_heads(x, step, rest)[:, :, :, start:stop].to(query.dtype) for x in (rest.key, rest.value))
    key_sum, value_sum = (
        _of_heads(x, step, rest)[:, :, :, first : first + 1] for x in (rest.key_sums, rest.value_sums)
    )
    sees = torch.arange(start, stop, device=query.device) < last_keys.unsqueeze(1)  # [n, keys from the sums on]
    among = sees.to(query.dtype)
    broken = ~value.isfinite()
    if not key.sum().isfinite():  # a row that sees a broken key is NaN already
        key = key.nan_to_num(0, 0, 0)
    value_sum = value_sum + among @ value.masked_fill(broken, 0)
    if broken.any():
        value_sum = value_sum.masked_fill(among @ broken.to(among.dtype) > 0, torch.nan)
        value = value.masked_fill(broken, 0)
    assert rest.products is not None
    products = _of_heads(rest.products, step, rest)[:, :, :, first]
    score_value = query @ products + (query @ key.mT * among) @ value
    grad_key = None if grad is None else grad @ products.mT + (grad @ value.mT * among) @ key
    return key_sum + among @ key, value_sum, score_value, grad_key


def _of_heads(sums: Tensor, step: Step, rest: RestInputs) -> Tensor:
    """The step's heads of a tensor [B, S, ...], as [b, g, r|1, ...]."""
    by_head = sums.shape[1] == rest.mass_scale.shape[0]
    heads = step.query_heads if by_head else step.key_heads
    part = sums[step.batches.start : step.batches.stop, heads.start : heads.stop]
    return part.unflatten(1, (step.shape[1], step.shape[2] if by_head else 1))


def _narrow(tensor: Tensor, step: Step) -> Tensor:
    """The step's part of a tensor [B|1, H|1, N, ...] as [b|1, g|1, r|1, n, ...]."""
    for dim, part in enumerate((step.batches, step.query_heads, step.queries)):
        if tensor.shape[dim] != 1:
            tensor = tensor.narrow(dim, part.start, len(part))
    return tensor.unflatten(1, step.shape[1:3] if tensor.shape[1] != 1 else (1, 1))


def _as_rows(tensor: Tensor, step: Step) -> Tensor:
    """A tensor that broadcasts to [b, g, r, n, X], as [rows, X]."""
    return tensor.expand(*step.shape, tensor.shape[-1]).reshape(step.num_rows, tensor.shape[-1])
