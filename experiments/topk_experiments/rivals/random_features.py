"""What methods with random features share: drawing directions, and attention by products of features."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from topk_attention.backends.autocast import autocast_off
from topk_attention.backends.calls import accumulation_dtype
from topk_attention.functional.checks import check_count

from .interface import AttentionMethod
from .linear_attention import FeatureMap, linear_attention

# Rows at a time. On the diagonal of causal attention a chunk costs C x C scores per head beside the linear part.
CHUNK_SIZE = 128


class RandomFeatureMethod(AttentionMethod):
    """Attention whose weights are products of random features, see `linear_attention`.

    head_dim          D
    num_features      F
    query_chunk_size  rows at a time, 128 by default
    smallest_weight, smallest_share  as in `linear_attention`
    """

    can_drop = False

    def __init__(
        self,
        head_dim: int,
        num_features: int,
        query_chunk_size: int | None,
        *,
        smallest_weight: float,
        smallest_share: float,
    ) -> None:
        super().__init__()
        self.chunk_size = CHUNK_SIZE if query_chunk_size is None else query_chunk_size
        for name, number in (
            ("head_dim", head_dim),
            ("num_features", num_features),
            ("query_chunk_size", self.chunk_size),
        ):
            check_count(name, number)
        self.smallest_weight = smallest_weight
        self.smallest_share = smallest_share

    def feature_map(self, dtype: torch.dtype) -> FeatureMap:
        """Features whose products are unbiased estimates of the weights, for rows of this dtype."""
        raise NotImplementedError

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, is_causal: bool, dropout_p: float
    ) -> Tensor:
        with accumulation_tensors(query, key, value) as tensors:
            output = linear_attention(
                *tensors,
                self.feature_map(tensors[0].dtype),
                key_mask=key_mask,
                is_causal=is_causal,
                chunk_size=self.chunk_size,
                smallest_weight=self.smallest_weight,
                smallest_share=self.smallest_share,
            )
        return output.to(query.dtype)


def random_directions(number: int, size: int, *, orthogonal: bool) -> Tensor:
    """Vectors of independent standard normal entries, float32 [number, size].

    orthogonal  each block of `size` vectors is orthogonal; the distribution of a single vector stays the same
    """
    gaussian = torch.randn(number, size)
    if not orthogonal:
        return gaussian
    rotations = [_random_rotation(size) for _ in range(0, number, size)]
    # A uniform direction times the length of a Gaussian vector is a Gaussian vector.
    return torch.cat(rotations)[:number] * gaussian.norm(dim=1, keepdim=True)


def _random_rotation(size: int) -> Tensor:
    """A uniformly distributed orthogonal matrix [size, size]."""
    q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))
    # Without the signs the distribution depends on the signs that the factorisation chooses (Mezzadri 2007).
    return (q * r.diagonal().sign()).float()


@contextmanager
def accumulation_tensors(query: Tensor, key: Tensor, value: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The tensors in float32, or in float64 if the first is float64; autocast is off inside the block."""
    dtype = accumulation_dtype(query.dtype)
    with autocast_off(query.device.type):
        yield query.to(dtype), key.to(dtype), value.to(dtype)
