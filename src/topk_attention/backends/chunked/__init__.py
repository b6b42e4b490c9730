"""Exact top-k attention and feed-forward in plain PyTorch, on any device, with memory linear in length.

Queries come in chunks and keys in blocks. The k best keys of all earlier blocks are merged with those of the next.
After a chunk only indices and weights of kept entries remain. The backward pass reads k rows per query.
"""

from .attention import attention, completed_backward, completed_forward, padded_entries
from .feed_forward import feed_forward

__all__ = ["attention", "completed_backward", "completed_forward", "feed_forward", "padded_entries"]
