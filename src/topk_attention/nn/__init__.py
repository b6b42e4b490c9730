"""Layers that are built from existing linear layers, whose weights they use and never copy."""

from .attention import TopKAttention
from .feed_forward import TopKFeedForward

__all__ = ["TopKAttention", "TopKFeedForward"]
