"""Random Feature Attention (Peng et al. 2021): a Gaussian kernel in expectation, from sines and cosines."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .linear_attention import FeatureMap
from .random_features import RandomFeatureMethod, random_directions


class RandomFeatureAttention(RandomFeatureMethod):
    """Attention weights exp(-|sigma * (x - y)|^2 / 2) estimated without bias by the mean over F / 2 random w of

        sin(w . sigma x) sin(w . sigma y) + cos(w . sigma x) cos(w . sigma y),    x = q / |q|,  y = k / |k|.

    For one sigma in all dimensions that is softmax attention of unit vectors, exp(sigma^2 x . y) up to a constant.

    head_dim          D
    num_features      F, size of the feature vector: half sines, half cosines
    query_chunk_size  rows at a time, 128 by default
    num_heads         number of heads, each with its own sigma and random vectors; by default all heads share both
    sigma             initial value of the learned sigma
    normalize         False: x = q / D^(1/4) and y = k / D^(1/4) are not scaled to length 1, and weights are multiplied
                      by exp(|sigma y|^2 / 2). For sigma = 1 they are then those of softmax attention
    orthogonal        random vectors in blocks of D are orthogonal; each is still Gaussian
    smallest_share    the denominator is an estimate, which may be zero or negative. It is raised to this share of its
                      value for x equal to every y

    sigma [H or 1, D] is learned with the rest, by reparametrisation as in the paper. The random vectors w are a buffer,
    [H or 1, F / 2, D], saved with the module; `redraw` draws new ones. The paper's gate is left out. Features and sums
    are float32 (float64 for float64).
    """

    directions: Tensor

    def __init__(
        self,
        head_dim: int,
        num_features: int = 256,
        query_chunk_size: int | None = None,
        num_heads: int | None = None,
        sigma: float = 1.0,
        normalize: bool = True,
        orthogonal: bool = False,
        smallest_share: float = 1e-2,
    ) -> None:
        super().__init__(head_dim, num_features, query_chunk_size, smallest_weight=0.0, smallest_share=smallest_share)
        if num_features % 2:
            raise ValueError(f"num_features must be even, half sines and half cosines, got {num_features}")
        for name, positive in (("sigma", sigma), ("smallest_share", smallest_share)):
            if not positive > 0:
                raise ValueError(f"{name} must be above 0, got {positive}")
        self.normalize = normalize
        self.orthogonal = orthogonal
        self.sigma = nn.Parameter(torch.full((num_heads or 1, head_dim), float(sigma)))
        self.register_buffer("directions", torch.empty(num_heads or 1, num_features // 2, head_dim))
        self.redraw()

    @torch.no_grad()
    def redraw(self) -> None:
        """Draw new random vectors from torch's random numbers."""
        for of_head in self.directions:
            of_head.copy_(random_directions(*of_head.shape, orthogonal=self.orthogonal))

    def feature_map(self, dtype: torch.dtype) -> FeatureMap:
        """Features whose products are unbiased estimates of the weights, for rows of this dtype."""
        _, half, head_dim = self.directions.shape
        scaled_sigma = self.sigma.to(dtype)[:, None, :] * (1.0 if self.normalize else head_dim**-0.25)  # [H|1, 1, D]
        projection = (self.directions.to(dtype) * scaled_sigma).mT  # [H|1, D, F / 2]

        def features_of(rows: Tensor) -> tuple[Tensor, Tensor]:
            if self.normalize:
                rows = F.normalize(rows, dim=-1)
                logs = rows.new_zeros(1, 1, rows.shape[2], 1)
            else:
                logs = (rows * scaled_sigma).square().sum(-1, keepdim=True) / 2
            projected = rows @ projection
            return torch.cat([projected.sin(), projected.cos()], -1).mul_(half**-0.5), logs

        return features_of

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, is_causal: bool, dropout_p: float
    ) -> Tensor:
        heads = self.sigma.shape[0]
        if heads not in (1, query.shape[1]):
            raise ValueError(f"query must have {heads} heads like this module, got {query.shape[1]}")
        return super().attend(query, key, value, key_mask, is_causal, dropout_p)

    def extra_repr(self) -> str:
        heads, half, head_dim = self.directions.shape
        return f"head_dim={head_dim}, num_features={2 * half}, num_heads={heads}, normalize={self.normalize}"
