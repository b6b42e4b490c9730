"""Layers that are handed their projections: weights are used where they are, never copied."""

from .attention import TopKAttention
from .feed_forward import TopKFeedForward

__all__ = ["TopKAttention", "TopKFeedForward"]
