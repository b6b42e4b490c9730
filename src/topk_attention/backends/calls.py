"""What the public functions pass to a backend, after they have checked every argument.

A call is plain data: tensors in canonical shapes, and the options that apply to them. Backends do not check it again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .activations import NO_CUT, Cut


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which scores, weights and sums are kept: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_output(query: Tensor, value: Tensor) -> Tensor:
    """Memory for an output [B, H, N, E] that stores the heads of each query side by side.

    The next projection reads them in this order, so that joining the heads copies nothing.
    """
    batch, num_heads, num_queries, _ = query.shape
    return query.new_empty(batch, num_queries, num_heads, value.shape[3]).transpose(1, 2)


def adds_to_scores(attn_mask: Tensor | None, bias: Tensor | None, relative_bias: Tensor | None) -> bool:
    """Whether these may change the order of scores; a boolean mask only hides."""
    has_float_mask = attn_mask is not None and attn_mask.is_floating_point()
    return has_float_mask or bias is not None or relative_bias is not None


class KeySums(NamedTuple):
    """Sums over keys, in the accumulation dtype.

    keys      [..., D]
    values    [..., E]
    products  [..., D, E]  of each key times its value
    """

    keys: Tensor
    values: Tensor
    products: Tensor

    def plus(self, others: KeySums) -> KeySums:
        """The sums over these keys and others."""
        return KeySums(*(mine + further for mine, further in zip(self, others, strict=True)))


class KeyPanels(NamedTuple):
    """A kept index of keys as the compiled kernels read it: 8-bit integers in panels of 32 keys, P of them.

    The panels behind the last indexed key are room for more.

    panels      [B, G, P, panel bytes] uint8
    numbers     [B, G, P, 4]  float32: scale, its inverse, error and norm of each panel
    unscreened  [B, G, P] int32: a bit for each key that has no bound
    centre      [B, G, ...]  float32: the mean that is taken from the keys
    """

    panels: Tensor
    numbers: Tensor
    unscreened: Tensor
    centre: Tensor


class RestInputs(NamedTuple):
    """What a backend reads to complete top-k attention: sums over the keys that each query sees, kept or not.

    S is G, or H where a mask hides other keys from other heads of a group. All but counts in the accumulation dtype.

    mass_scale    [H]  factor on the weight of the rest
    lift          0 to 1, as in `AttentionCall`
    key_sums      [B, S, C, D]  and
    value_sums    [B, S, C, E]  with interval 0: of all queries (C = 1), or of each query (C = N). With an interval: of
                  the first c * interval keys, c = 0..C - 1; a query adds the keys from there to its last one
    products      [B, S, C, D, E]  the same of each key times its value; None where C = N
    score_values  [B, H, N, E]  where C = N: over visible keys the sum of scale * query . key times the value
    grad_keys     [B, H, N, D]  in the backward pass, where score_values are given: the sum of grad_output . value times
                  the key
    key, value    [B, S, M, D] and [B, S, M, E]  in the dtype of the call: the rows to add, 0 where a mask hides them
    counts        [B|1, H|1, N] int32, visible keys of each query; None: all, or under causality all that are not in its
                  future
    score_sums    [B|1, H|1, N]  what masks and biases add to the scores of the visible keys, summed; None: nothing
    """

    mass_scale: Tensor
    lift: float
    key_sums: Tensor
    value_sums: Tensor
    products: Tensor | None
    score_values: Tensor | None
    grad_keys: Tensor | None
    key: Tensor
    value: Tensor
    counts: Tensor | None
    score_sums: Tensor | None
    interval: int


class RestGradients(NamedTuple):
    """What the rest sends to all keys that a query sees, kept or not; each [B, H, N], 0 in rows without a rest.

    A key j that query i sees gets scale * (key[i] * query[i] + cross[i] * (grad_output[i] . value[j]) * query[i]), its
    value (value[i] + cross[i] * scale * (query[i] . key[j])) * grad_output[i], and its bias bias[i].
    """

    key: Tensor
    value: Tensor
    cross: Tensor
    bias: Tensor
    mass_scale: Tensor  # each row's part of the gradient of the head's scale


@dataclass(frozen=True)
class AttentionCall:
    """One attention call.

    B batch, H query heads, G key heads (H is a multiple of G), N queries, M keys, D head size, E value size

    query          [B, H, N, D]  float16, bfloat16, float32 or float64
    key            [B, G, M, D]  same dtype and device
    value          [B, G, M, E]  same dtype and device
    head_k         one k per query head, each in 1..M; None keeps every visible key
    attn_mask      [B|1, H|1, N|1, M|1]  bool, True = may attend, or float, added; no gradient
    bias           [B|1, H|1, N|1, M|1]  float, added to the scores, differentiable
    relative_bias  [H|1, N + M - 1]  float, added as relative_bias[h, j - i + N - 1], differentiable
    is_causal      query i sees keys j <= i + M - N
    sinks          [H]  accumulation dtype, differentiable: one more score for every query of a head, without a value
    softcap        c: a score s, before biases and masks are added, counts as c * tanh(s / c)
    seed           int64 scalar that decides the dropout draw; None without dropout
    mass_scale     [H]  accumulation dtype, differentiable: factor on the weight of the keys that are not kept; None
                   leaves these keys out
    rest_lift      0 to 1: how far the score of these keys, their mean, is raised towards the smallest kept one
    sums           over all keys, where the caller has them; only with mass_scale
    key_index      of all keys, where the caller has kept one; what a backend makes of it changes no result
    keys_in_files  whether key and value lie in files that are mapped into memory; likewise
    """

    query: Tensor
    key: Tensor
    value: Tensor
    head_k: tuple[int, ...] | None
    attn_mask: Tensor | None
    bias: Tensor | None
    relative_bias: Tensor | None
    is_causal: bool
    scale: float
    dropout_p: float
    seed: Tensor | None
    query_chunk_size: int | None
    return_selection: bool
    sinks: Tensor | None = None
    softcap: float | None = None
    mass_scale: Tensor | None = None
    rest_lift: float = 0.0
    sums: KeySums | None = None
    key_index: KeyPanels | None = None
    keys_in_files: bool = False

    def is_full_attention(self) -> bool:
        """Whether every head keeps all keys that its queries see, so that nothing is selected."""
        return self.head_k is None or all(k >= self.key.shape[2] for k in self.head_k)

    def is_completed(self) -> bool:
        """Whether some query may have a rest that enters its softmax."""
        return self.mass_scale is not None and not self.is_full_attention()

    def differentiable(self) -> tuple[Tensor | None, ...]:
        """The tensors that may get a gradient."""
        return self.query, self.key, self.value, self.bias, self.relative_bias, self.sinks, self.mass_scale

    def adds_to_scores(self) -> bool:
        """Whether something is added to scores that may change their order; a boolean mask only hides."""
        return adds_to_scores(self.attn_mask, self.bias, self.relative_bias)


@dataclass(frozen=True)
class FeedForwardCall:
    """One feed-forward call.

    T tokens, D model size, F neurons (d_ff), O output size

    x       [T, D]
    w_in    [F, D]
    w_out   [O, F]
    w_gate  [F, D] or None
    b_in, b_gate  [F] or None
    b_out   [O] or None
    k       neurons kept per token, in 1..F; None keeps all
    cut     what a gated layer does before it multiplies
    seed    int64 scalar that decides the dropout draw; None without dropout
    """

    x: Tensor
    w_in: Tensor
    w_out: Tensor
    w_gate: Tensor | None
    b_in: Tensor | None
    b_gate: Tensor | None
    b_out: Tensor | None
    k: int | None
    activation: str
    dropout_p: float
    seed: Tensor | None
    token_chunk_size: int | None
    cut: Cut = NO_CUT
