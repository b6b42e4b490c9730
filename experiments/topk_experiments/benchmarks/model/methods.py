"""Who computes the attention of a model."""

from __future__ import annotations

from typing import Any, Literal

from topk_attention.convert import convert

from .points import ALL, RANDOM, Point
from .random_features import use_random_features
from .shapes import new_model

K = int | Literal["all"]


def prepared_model(point: Point) -> Any:
    """A model of a point's shape that runs the point's method."""
    model = new_model(point, "eager" if point.method == "vanilla" else "sdpa")
    use_method(model, point)
    return model


def use_method(model: Any, point: Point) -> None:
    """Let the point's method compute the attention of a model; method "vanilla" leaves the model as it is."""
    if point.method == "sdpa":
        model.set_attn_implementation("sdpa")
    elif point.method in RANDOM:
        use_random_features(model, point)
    elif point.method == "query-chunks":
        use_library(model, ALL, None if point.feed_forward_k is None else ALL, backend="chunked")
    elif point.method == "topk":
        use_library(model, point.k, point.feed_forward_k, backend=point.backend)


def use_library(model: Any, attention_k: K, feed_forward_k: K | None, *, backend: str) -> None:
    """Convert a model. Networks that keep every neuron are computed in token chunks on any backend."""
    convert(model, attention_k=attention_k, backend=backend)
    if feed_forward_k is not None:
        convert(model, feed_forward_k=feed_forward_k, backend="auto" if feed_forward_k == ALL else backend)
