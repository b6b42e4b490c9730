"""Multi-head top-k attention as a layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from ..functional import Completion, topk_attention
from ..functional.bias import Bias
from ..functional.checks import as_k
from ..functional.completion import check_completion


class TopKAttention(nn.Module):
    """Multi-head attention in which each query uses its k best keys, built from four given projections.

    B batch, N queries, M keys, C input size, H heads, G key heads, D head size

    query_projection   C -> H * D
    key_projection     C -> G * D
    value_projection   C -> G * E
    output_projection  H * E -> any size
    num_heads          H
    num_key_heads      G, by default H
    k                  keys kept per query, as in `topk_attention`
    completion         as in `topk_attention`. A tensor of scales becomes the layer's `mass_scale`: a parameter if it is
                       one, which then trains with the others, otherwise a buffer

    sinks              as in `topk_attention`; a parameter trains with the others, another tensor becomes a buffer

    The other options are those of `topk_attention`; dropout applies in training mode only.

    >>> import torch
    >>> attention = TopKAttention(*(nn.Linear(64, 64) for _ in range(4)), num_heads=8, k=16, is_causal=True)
    >>> attention(torch.randn(2, 100, 64)).shape
    torch.Size([2, 100, 64])
    """

    sinks: Tensor | None
    mass_scale: float | Sequence[float] | Tensor

    def __init__(
        self,
        query_projection: nn.Module,
        key_projection: nn.Module,
        value_projection: nn.Module,
        output_projection: nn.Module,
        *,
        num_heads: int,
        k: int | Sequence[int] | Tensor | Literal["all"] | None,
        num_key_heads: int | None = None,
        is_causal: bool = False,
        dropout_p: float = 0.0,
        scale: float | None = None,
        sinks: Tensor | None = None,
        softcap: float | None = None,
        backend: str = "auto",
        query_chunk_size: int | None = None,
        completion: Completion | None = None,
    ) -> None:
        super().__init__()
        per_head = as_k("k", k)
        if isinstance(per_head, tuple) and len(per_head) != num_heads:
            raise ValueError(f"k must hold one number for each of the {num_heads} query heads, got {len(per_head)}")
        self.query_projection = query_projection
        self.key_projection = key_projection
        self.value_projection = value_projection
        self.output_projection = output_projection
        self.num_heads = num_heads
        self.num_key_heads = num_key_heads or num_heads
        self.k = per_head
        self.is_causal = is_causal
        self.dropout_p = dropout_p
        self.scale = scale
        self._hold("sinks", sinks)
        self.softcap = softcap
        self.backend = backend
        self.query_chunk_size = query_chunk_size
        self._lift: float | None = None
        if completion is not None:
            check_completion("completion", completion, num_heads)
            self._lift = completion.lift
            self._hold("mass_scale", completion.mass_scale)

    def _hold(self, name: str, value: Any) -> None:
        """Set an attribute: a tensor that is no parameter becomes a buffer."""
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            self.register_buffer(name, value)
        else:
            setattr(self, name, value)

    @property
    def completion(self) -> Completion | None:
        """What the layer adds for the keys that are not kept, with the scales as they are now."""
        return None if self._lift is None else Completion(self.mass_scale, self._lift)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        attn_mask: Tensor | None = None,
        bias: Tensor | Bias | None = None,
    ) -> Tensor:
        """Attend from x [B, N, C] to context [B, M, C], or to x itself; returns [B, N, output size]."""
        context = x if context is None else context
        output = topk_attention(
            self._heads(self.query_projection(x), self.num_heads),
            self._heads(self.key_projection(context), self.num_key_heads),
            self._heads(self.value_projection(context), self.num_key_heads),
            k=self.k,
            attn_mask=attn_mask,
            bias=bias,
            is_causal=self.is_causal,
            dropout_p=self.dropout_p if self.training else 0.0,
            scale=self.scale,
            enable_gqa=self.num_key_heads != self.num_heads,
            sinks=self.sinks,
            softcap=self.softcap,
            backend=self.backend,
            query_chunk_size=self.query_chunk_size,
            completion=self.completion,
        )
        return self.output_projection(output.transpose(-2, -3).flatten(-2))

    @staticmethod
    def _heads(projected: Tensor, num_heads: int) -> Tensor:
        """[B, N, H * D] -> [B, H, N, D]"""
        if projected.shape[-1] % num_heads != 0:
            raise ValueError(
                f"a projection's size must be a multiple of its {num_heads} heads, got {projected.shape[-1]}"
            )
        return projected.unflatten(-1, (num_heads, -1)).transpose(-2, -3)

    def extra_repr(self) -> str:
        options = f"k={self.k}, num_heads={self.num_heads}, is_causal={self.is_causal}, backend={self.backend!r}"
        options += f", softcap={self.softcap:g}" if self.softcap is not None else ""
        return options if self._lift is None else f"{options}, completion=({self.completion})"
