"""What the operations mean: the public functions, their argument checks and their biases."""

from .attention import Selection, topk_attention
from .bias import ALiBi, BucketedBias, RelativeBias
from .feed_forward import topk_feed_forward

__all__ = ["ALiBi", "BucketedBias", "RelativeBias", "Selection", "topk_attention", "topk_feed_forward"]
