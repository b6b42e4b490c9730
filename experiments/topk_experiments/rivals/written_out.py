"""Attention with random features by its definition, with every weight in memory. The linear form must equal it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .performer import PerformerAttention
from .rfa import RandomFeatureAttention


def random_feature_weights(
    attention: PerformerAttention | RandomFeatureAttention,
    query: Tensor,
    key: Tensor,
    *,
    visible: Tensor | None = None,
    sigma: Tensor | None = None,
) -> Tensor:
    """The attention weights that a module with random features represents, in the dtype of query.

    B batch, H heads, N queries, M keys, D head size

    query    [B, H, N, D]
    key      [B, H, M, D]
    visible  [B, H, N, M]  bool, True = may attend; size-1 axes broadcast; each query sees a key
    sigma    in place of RandomFeatureAttention's own

    Returns [B, H, N, M]; `weights @ value` is the module's output. Gradients reach query, key and sigma. No maximum is
    subtracted from exponents: float64 is safer than float32.

    Raises:
        ValueError: RandomFeatureAttention without normalize=True.

    >>> attention = PerformerAttention(head_dim=8).double()
    >>> query, key, value = torch.randn(3, 1, 2, 5, 8, dtype=torch.float64)
    >>> torch.allclose(random_feature_weights(attention, query, key) @ value, attention(query, key, value))
    True
    """
    if visible is None:
        visible = torch.ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
    directions = attention.directions.to(query.dtype)
    if isinstance(attention, PerformerAttention):
        scaled = (rows * query.shape[3] ** -0.25 for rows in (query, key))
        features = [(x @ directions.mT - x.square().sum(-1, keepdim=True) / 2).exp() for x in scaled]
        smallest_share = 0.0
    else:
        if not attention.normalize:
            raise ValueError("attention must be a RandomFeatureAttention with normalize=True, got normalize=False")
        projection = (directions * (attention.sigma if sigma is None else sigma).to(query.dtype)[:, None]).mT
        projected = [F.normalize(rows, dim=-1) @ projection for rows in (query, key)]
        features = [torch.cat([x.sin(), x.cos()], -1) / directions.shape[-2] ** 0.5 for x in projected]
        smallest_share = attention.smallest_share
    weights = (features[0] @ features[1].mT).masked_fill(~visible, 0)
    smallest = smallest_share * visible.sum(-1, keepdim=True)
    return weights / torch.maximum(weights.sum(-1, keepdim=True), smallest)
