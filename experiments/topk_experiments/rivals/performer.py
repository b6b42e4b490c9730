"""Performer's FAVOR+ (Choromanski et al. 2021): softmax attention in expectation, from positive random features."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .linear_attention import FeatureMap
from .random_features import RandomFeatureMethod, random_directions

# Added to each product of two feature vectors. It matters only where all products of a query underflow.
_SMALLEST_WEIGHT = 1e-30


class PerformerAttention(RandomFeatureMethod):
    """Attention weights exp(q . k / sqrt(D)) estimated without bias by the mean over F random directions w of

        exp(w . x - |x|^2 / 2) exp(w . y - |y|^2 / 2),    x = q / D^(1/4),  y = k / D^(1/4).

    head_dim          D
    num_features      F
    query_chunk_size  rows at a time, 128 by default
    orthogonal        directions in blocks of D are orthogonal, which lowers the variance; each is still Gaussian

    The directions are a buffer, [F, D], saved with the module; `redraw` draws new ones. Features and sums are float32
    (float64 for float64). Exponentials are taken relative to the largest one of each row. So nothing has to be added to
    the features, and the estimate of each weight stays unbiased.
    """

    directions: Tensor

    def __init__(
        self, head_dim: int, num_features: int = 256, query_chunk_size: int | None = None, orthogonal: bool = True
    ) -> None:
        super().__init__(head_dim, num_features, query_chunk_size, smallest_weight=_SMALLEST_WEIGHT, smallest_share=0.0)
        self.orthogonal = orthogonal
        self.register_buffer("directions", torch.empty(num_features, head_dim))
        self.redraw()

    @torch.no_grad()
    def redraw(self) -> None:
        """Draw new directions from torch's random numbers."""
        self.directions.copy_(random_directions(*self.directions.shape, orthogonal=self.orthogonal))

    def feature_map(self, dtype: torch.dtype) -> FeatureMap:
        """Features whose products are unbiased estimates of exp(q . k / sqrt(D)), for rows of this dtype."""
        num_features, head_dim = self.directions.shape
        scaled = self.directions.to(dtype).mT * head_dim**-0.25  # [D, F]
        log_mean = math.log(num_features) / 2

        def features_of(rows: Tensor) -> tuple[Tensor, Tensor]:
            projected = rows @ scaled
            # Gradients treat the largest entry as a constant. The logarithm cancels it in the result.
            largest = projected.detach().amax(-1, keepdim=True)
            logs = largest - rows.square().sum(-1, keepdim=True) * (0.5 * head_dim**-0.5) - log_mean
            return projected.sub_(largest).exp_(), logs

        return features_of

    def extra_repr(self) -> str:
        num_features, head_dim = self.directions.shape
        return f"head_dim={head_dim}, num_features={num_features}, orthogonal={self.orthogonal}"
