"""Exact top-k attention and feed-forward in plain PyTorch, on any device, with memory linear in length.

Queries come in chunks and keys in blocks. The k best keys of all earlier blocks are merged with those of the next.
After a chunk only indices and weights of kept entries remain. The backward pass reads k rows per query.
"""

from .attention import attention, completed_backward, completed_forward, padded_entries
from .feed_forward import choose_neurons, feed_forward, feed_forward_backward_op, sum_neurons

__all__ = [
    "attention",
    "choose_neurons",
    "completed_backward",
    "completed_forward",
    "feed_forward",
    "feed_forward_backward_op",
    "padded_entries",
    "sum_neurons",
]
