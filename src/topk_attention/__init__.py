"""Transformers that use only the k best keys per query and the k best feed-forward neurons per token."""

from .functional import ALiBi, BucketedBias, RelativeBias, Selection, topk_attention, topk_feed_forward

__all__ = ["ALiBi", "BucketedBias", "RelativeBias", "Selection", "topk_attention", "topk_feed_forward"]
