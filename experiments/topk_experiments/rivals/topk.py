"""This library's attention with the interface of all methods."""

from __future__ import annotations

from torch import Tensor

from topk_attention.functional import Completion, topk_attention
from topk_attention.functional.checks import check_count

from .interface import AttentionMethod


class LibraryAttention(AttentionMethod):
    """`topk_attention`.

    k                 keys kept per query; None: every key, in query chunks
    backend           as in `topk_attention`
    query_chunk_size  as in `topk_attention`
    completion        as in `topk_attention`
    """

    def __init__(
        self,
        k: int | None = None,
        backend: str = "auto",
        query_chunk_size: int | None = None,
        completion: Completion | None = None,
    ) -> None:
        super().__init__()
        for name, number in (("k", k), ("query_chunk_size", query_chunk_size)):
            if number is not None:
                check_count(name, number)
        self.k = k
        self.backend = backend
        self.query_chunk_size = query_chunk_size
        self.completion = completion

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, is_causal: bool, dropout_p: float
    ) -> Tensor:
        return topk_attention(
            query,
            key,
            value,
            k=self.k,
            attn_mask=None if key_mask is None else key_mask[:, None, None, :],
            is_causal=is_causal,
            dropout_p=dropout_p,
            backend=self.backend,
            query_chunk_size=self.query_chunk_size,
            completion=self.completion,
        )

    def extra_repr(self) -> str:
        completed = "" if self.completion is None else f", completed with {self.completion}"
        return f"k={self.k}, backend={self.backend!r}{completed}"
