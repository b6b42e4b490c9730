"""Attention whose weights are products of feature vectors: linear time and memory, causal by prefix sums over chunks.

    output_i = sum_j (f(q_i) . f(k_j)) exp(s_j) v_j  /  sum_j (f(q_i) . f(k_j)) exp(s_j)

The sums over keys do not depend on queries, so a state of size F x E represents all keys before a chunk. Each key has a
logarithm s_j beside its features, and sums are kept relative to the largest s_j in them. Exponents are therefore never
large, and no constant has to be added to the features to keep them away from zero.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Rows [B, H, C, D] -> features f [B, H, C, F] and logarithms s, which broadcast to [B, H, C, 1]: together f exp(s).
# The logarithm of a query has no effect, because it is a factor of both numerator and denominator.
FeatureMap = Callable[[Tensor], tuple[Tensor, Tensor]]

_TINY = 1e-30


class _Keys(NamedTuple):
    """A chunk of keys and its values.

    features  [B, H, C, F]
    logs      [B|1, H|1, C, 1]  s, -inf for a masked key
    values    [B, H, C, E + 1]  the last column is 1, so that one product computes numerator and denominator
    """

    features: Tensor
    logs: Tensor
    values: Tensor


class _State(NamedTuple):
    """Sums over all keys so far, divided by exp(largest).

    total    [B, H, F, E + 1]  features and values
    plain    [B, H, 1, E + 1]  values alone
    largest  [B|1, H|1, 1, 1]  of the logarithms, -inf before the first visible key
    """

    total: Tensor
    plain: Tensor
    largest: Tensor


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    feature_map: FeatureMap,
    *,
    key_mask: Tensor | None,
    is_causal: bool,
    chunk_size: int,
    smallest_weight: float,
    smallest_share: float,
) -> Tensor:
    """Attention with products of features instead of exp(score).

    query            [B, H, N, D]
    key              [B, H, M, D]
    value            [B, H, M, E]
    key_mask         [B, M]  bool, True = may attend
    is_causal        query i sees keys j <= i + M - N
    chunk_size       rows at a time; for causal attention also the side of the score blocks on the diagonal
    smallest_weight  added to each product of features
    smallest_share   the denominator is raised to this share of what it would be if all products of features were 1

    Returns [B, H, N, E]; zeros for a query that sees no key. Memory: chunks and one state, and for the backward pass
    the features of all rows and a state per chunk of queries.
    """
    num_queries, num_keys = query.shape[2], key.shape[2]
    output = _Rows(query, value)

    def divide(sums: Tensor, of_ones: Tensor) -> Tensor:
        bound = (smallest_share * of_ones).clamp_min(_TINY)  # above zero where a query sees no key
        return sums[..., :-1] / torch.maximum(sums[..., -1:], bound)

    def read(state: _State, features: Tensor) -> Tensor:
        return features @ state.total + smallest_weight * state.plain

    state = _no_keys(query, value, feature_map)
    first_query = max(0, num_queries - num_keys) if is_causal else 0  # those before it see nothing
    shared_keys = max(0, num_keys - num_queries) if is_causal else num_keys  # every query sees these
    query_lengths = _chunks(num_queries - first_query, chunk_size)
    shared_lengths = _chunks(shared_keys, chunk_size)
    # Split once: the backward pass of a slice would make a gradient as long as the whole tensor, for each chunk.
    queries = iter(query.split([first_query, *query_lengths], 2))
    keys = _all_keys(key, value, key_mask, [*shared_lengths, *(query_lengths if is_causal else [])], feature_map)
    for _ in shared_lengths:
        state = _absorb(state, next(keys))
    output.append_zeros(next(queries).shape[2])
    for rows in queries:
        features, _ = feature_map(rows)
        if not is_causal:
            output.append(divide(read(state, features), state.plain[..., -1:]))
            continue
        chunk = next(keys)
        largest = torch.maximum(chunk.logs.detach().cummax(-2).values, state.largest)  # [B|1, H|1, C, 1]
        shift = _finite(largest)
        is_later = torch.ones(rows.shape[2], rows.shape[2], dtype=torch.bool, device=query.device).triu_(1)
        factors = (chunk.logs.mT - shift).masked_fill(is_later, -torch.inf).exp()  # of key j for query i
        weights = (features @ chunk.features.mT + smallest_weight) * factors  # [B, H, C, C]
        fade = (state.largest - shift).exp()
        of_ones = factors.sum(-1, keepdim=True) + fade * state.plain[..., -1:]
        output.append(divide(weights @ chunk.values + fade * read(state, features), of_ones.detach()))
        state = _absorb(state, chunk)
    return output.joined()


def _chunks(length: int, chunk_size: int) -> list[int]:
    """
    >>> _chunks(7, 3)
    [3, 3, 1]
    """
    return [min(chunk_size, length - start) for start in range(0, length, chunk_size)]


def _all_keys(
    key: Tensor, value: Tensor, key_mask: Tensor | None, lengths: list[int], feature_map: FeatureMap
) -> Iterator[_Keys]:
    """The keys in chunks of these lengths, which cover all of them."""
    masks = itertools.repeat(None) if key_mask is None else key_mask.split(lengths, 1)
    for keys, values, mask in zip(key.split(lengths, 2), value.split(lengths, 2), masks, strict=False):
        yield _keys(keys, values, mask, feature_map)


def _keys(key: Tensor, value: Tensor, key_mask: Tensor | None, feature_map: FeatureMap) -> _Keys:
    ones = value.new_ones(*value.shape[:-1], 1)
    if key_mask is None:
        features, logs = feature_map(key)
        return _Keys(features, logs, torch.cat([value, ones], -1))
    is_masked = ~key_mask[:, None, :, None]  # [B, 1, C, 1]
    # Masked entries become zeros: 0 times NaN would be NaN.
    features, logs = feature_map(key.masked_fill(is_masked, 0))
    values = torch.cat([value.masked_fill(is_masked, 0), ones], -1)
    return _Keys(features, logs.masked_fill(is_masked, -torch.inf), values)


def _no_keys(query: Tensor, value: Tensor, feature_map: FeatureMap) -> _State:
    batch, heads = query.shape[:2]
    num_features = feature_map(query[:1, :1, :0])[0].shape[-1]
    return _State(
        query.new_zeros(batch, heads, num_features, value.shape[-1] + 1),
        query.new_zeros(batch, heads, 1, value.shape[-1] + 1),
        query.new_full((1, 1, 1, 1), -torch.inf),
    )


def _absorb(state: _State, keys: _Keys) -> _State:
    largest = torch.maximum(state.largest, keys.logs.detach().amax(-2, keepdim=True))
    shift = _finite(largest)
    weighted = keys.values * (keys.logs - shift).exp()
    fade = (state.largest - shift).exp()
    return _State(
        state.total * fade + keys.features.mT @ weighted,
        state.plain * fade + weighted.sum(-2, keepdim=True),
        largest,
    )


def _finite(largest: Tensor) -> Tensor:
    """The same with 0 instead of -inf: -inf - -inf would be NaN."""
    return largest.masked_fill(largest == -torch.inf, 0)


class _Rows:
    """[B, H, N, E] filled row by row; written in place if no gradient is needed, so that rows never exist twice."""

    def __init__(self, query: Tensor, value: Tensor) -> None:
        self._shape = (*query.shape[:3], value.shape[-1])
        self._value = value
        self._parts: list[Tensor] = []
        self._whole = None if torch.is_grad_enabled() else value.new_empty(self._shape)
        self._filled = 0

    def append(self, rows: Tensor) -> None:
        if self._whole is None:
            self._parts.append(rows)
        else:
            self._whole[:, :, self._filled : self._filled + rows.shape[2]] = rows
        self._filled += rows.shape[2]

    def append_zeros(self, number: int) -> None:
        self.append(self._value.new_zeros(*self._shape[:2], number, self._shape[3]))

    def joined(self) -> Tensor:
        return torch.cat(self._parts, 2) if self._whole is None else self._whole
