"""What the operations mean: the public functions, their argument checks and their biases."""

from ..backends.calls import KeySums
from .attention import Selection, topk_attention
from .bias import ALiBi, BucketedBias, RelativeBias
from .completion import Completion
from .feed_forward import topk_feed_forward
from .key_index import KeyIndex
from .stand_in import StandIn

__all__ = [
    "ALiBi",
    "BucketedBias",
    "Completion",
    "KeyIndex",
    "KeySums",
    "RelativeBias",
    "Selection",
    "StandIn",
    "topk_attention",
    "topk_feed_forward",
]
