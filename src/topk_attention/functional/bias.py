"""Biases that attention adds to its scores, without an [N, M] tensor at any time.

Each class describes a bias that depends only on the distance between query and key. Pass it to
`topk_attention(bias=...)`. The gradient reaches the tensor that the bias is made from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends.calls import accumulation_dtype


@dataclass(frozen=True, eq=False)
class RelativeBias:
    """A bias read from a table of relative positions: bias[h, i, j] = values[h, j - i + N - 1].

    H heads (or 1 for all), N queries, M keys

    values  [H, N + M - 1]  any floating dtype; gets a gradient

    Column N - 1 is for the key with the query's own index. Columns to its left are for earlier keys.

    >>> import torch
    >>> bias = RelativeBias(torch.zeros(8, 128 + 128 - 1, requires_grad=True))
    """

    values: Tensor

    def __post_init__(self) -> None:
        _require_matrix("RelativeBias values", self.values, "[heads, queries + keys - 1]")

    def relative_values(self, num_queries: int, num_keys: int) -> Tensor:
        """The table [H, N + M - 1] for a call with N queries and M keys."""
        if self.values.shape[1] != num_queries + num_keys - 1:
            raise ValueError(
                f"RelativeBias values must have {num_queries + num_keys - 1} columns for {num_queries} queries and "
                f"{num_keys} keys (queries + keys - 1), got {self.values.shape[1]}"
            )
        return self.values


@dataclass(frozen=True, eq=False)
class BucketedBias:
    """T5's relative position bias: each near distance has its own bucket, far distances share logarithmic buckets.

    R buckets, H heads (or 1 for all)

    table          [R, H]  any floating dtype; gets a gradient (`nn.Embedding.weight` of T5's first layer)
    bidirectional  half of the buckets for keys after the query (T5's encoder); otherwise those keys share bucket 0
    max_distance   distances from here on share the last bucket

    The last query is aligned with the last key, as in `is_causal`: query i stands at position i + M - N.

    Source: Raffel et al. 2020, "Exploring the limits of transfer learning", section 2.1.

    >>> import torch
    >>> bias = BucketedBias(torch.zeros(32, 12, requires_grad=True), bidirectional=True)
    """

    table: Tensor
    bidirectional: bool = True
    max_distance: int = 128

    def __post_init__(self) -> None:
        _require_matrix("BucketedBias table", self.table, "[buckets, heads]")
        exact = self.table.shape[0] // (4 if self.bidirectional else 2)
        if exact < 1:
            raise ValueError(
                f"BucketedBias table needs at least {4 if self.bidirectional else 2} buckets, got {self.table.shape[0]}"
            )
        if self.max_distance <= exact:
            raise ValueError(
                f"BucketedBias max_distance must be larger than the {exact} distances with a bucket of their own, "
                f"got {self.max_distance}"
            )

    def relative_values(self, num_queries: int, num_keys: int) -> Tensor:
        """The table [H, N + M - 1] for a call with N queries and M keys."""
        distance = _key_minus_query(num_queries, num_keys, self.table.device)
        return _accumulated(self.table)[self._bucket(distance)].t()

    def _bucket(self, distance: Tensor) -> Tensor:
        num_buckets = self.table.shape[0]
        if self.bidirectional:
            num_buckets //= 2
            first_bucket = torch.where(distance > 0, num_buckets, 0)
            distance = distance.abs()
        else:
            first_bucket = torch.zeros_like(distance)
            distance = (-distance).clamp(min=0)
        num_exact = num_buckets // 2
        growth = torch.log(distance.clamp(min=1).float() / num_exact) / math.log(self.max_distance / num_exact)
        far_bucket = num_exact + (growth * (num_buckets - num_exact)).long()
        return first_bucket + torch.where(distance < num_exact, distance, far_bucket.clamp(max=num_buckets - 1))


@dataclass(frozen=True, eq=False)
class ALiBi:
    """Attention with linear biases: bias[h, i, j] = -slopes[h] * |distance between query i and key j|.

    slopes  [H] (or [1] for all heads)  any floating dtype; gets a gradient

    The last query is aligned with the last key, as in `is_causal`: query i stands at position i + M - N.

    Source: Press et al. 2022, "Train short, test long".

    >>> bias = ALiBi(ALiBi.geometric_slopes(8))
    """

    slopes: Tensor

    def __post_init__(self) -> None:
        if self.slopes.ndim != 1 or not self.slopes.is_floating_point():
            raise ValueError(
                f"ALiBi slopes must be a floating tensor of shape [heads], got {self.slopes.dtype} "
                f"{list(self.slopes.shape)}"
            )

    @staticmethod
    def geometric_slopes(num_heads: int) -> Tensor:
        """The slopes of the paper, [num_heads] float32.

        For H a power of two they are a geometric sequence that begins at 2^(-8 / H). Otherwise they are the sequence of
        the next smaller power, followed by every other slope of the next larger one.
        """
        if num_heads < 1:
            raise ValueError(f"num_heads must be at least 1, got {num_heads}")
        power = 2 ** int(math.log2(num_heads))

        def sequence(n: int) -> Tensor:
            return 2.0 ** (-8.0 * torch.arange(1, n + 1) / n)

        return torch.cat([sequence(power), sequence(2 * power)[::2][: num_heads - power]])

    def relative_values(self, num_queries: int, num_keys: int) -> Tensor:
        """The table [H, N + M - 1] for a call with N queries and M keys."""
        distance = _key_minus_query(num_queries, num_keys, self.slopes.device).abs()
        return -_accumulated(self.slopes).unsqueeze(1) * distance


Bias = RelativeBias | BucketedBias | ALiBi


def _accumulated(parameters: Tensor) -> Tensor:
    """The parameters in the accumulation dtype.

    In half precision a bucket's gradient would stop growing at 256, and far distances would round or overflow.
    """
    return parameters.to(accumulation_dtype(parameters.dtype))


def _key_minus_query(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """Position of the key minus that of the query, for each column of a relative table, int64 [N + M - 1]."""
    # Column j - i + N - 1; the query stands at i + M - N.
    return torch.arange(num_queries + num_keys - 1, device=device) - (num_keys - 1)


def _require_matrix(name: str, tensor: Tensor, shape: str) -> None:
    if tensor.ndim != 2 or not tensor.is_floating_point():
        raise ValueError(f"{name} must be a floating tensor of shape {shape}, got {tensor.dtype} {list(tensor.shape)}")
