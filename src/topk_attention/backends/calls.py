"""What the public functions pass to a backend, after they have checked every argument.

A call is plain data: tensors in canonical shapes, and the options that apply to them. Backends do not check it again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which scores, weights and sums are kept: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_output(query: Tensor, value: Tensor) -> Tensor:
    """Memory for an output [B, H, N, E] that stores the heads of each query side by side.

    The next projection reads them in this order, so that joining the heads copies nothing.
    """
    batch, num_heads, num_queries, _ = query.shape
    return query.new_empty(batch, num_queries, num_heads, value.shape[3]).transpose(1, 2)


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
    seed           int64 scalar that decides the dropout draw; None without dropout
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

    def is_full_attention(self) -> bool:
        """Whether every head keeps all keys that its queries see, so that nothing is selected."""
        return self.head_k is None or all(k >= self.key.shape[2] for k in self.head_k)


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
