"""Exact top-k attention and feed-forward in plain PyTorch, on any device, with memory linear in length.

Queries are taken in chunks and keys in blocks; the k best of all earlier blocks are merged with those of the next.
Only indices and weights of kept entries outlive a chunk. The backward pass touches k rows a query.
"""

from .attention import attention
from .feed_forward import feed_forward

__all__ = ["attention", "feed_forward"]
