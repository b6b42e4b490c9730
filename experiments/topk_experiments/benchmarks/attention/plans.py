"""Which points of layers and of chunk sizes are measured; the rounds are planned by their table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ...rivals.names import among, check_method, method_of, on_backend
from .. import rounds
from .works import CHUNK_METHODS, LAYER_METHODS, TABLE, Point


def grid(
    lengths: Iterable[int], methods: Sequence[str], ks: Sequence[int] = (128,), backend: str = "auto", **settings: Any
) -> list[Point]:
    """Points of causal layers: one for each length and method, and for top-k for each k; shortest first.

    methods   names of LAYER_METHODS, or "topk-BACKEND"
    backend   of "topk"
    settings  of the points: by default the layer has projections

    >>> [(point.length, point.method) for point in grid([512, 1024], ["topk-chunked"])]
    [(512, 'topk-chunked'), (1024, 'topk-chunked')]
    >>> [(point.method, point.k) for point in grid([512], ["topk-chunked", "sdpa"], [64, 32])]
    [('topk-chunked', 32), ('topk-chunked', 64), ('sdpa', 32)]
    """
    for method in methods:
        check_method(method, LAYER_METHODS, argument="implementations")
    settings = {"is_causal": True, "projections": True} | settings
    return rounds.grid(Point, "length", lengths, methods, ks, backend, **settings)


def able_to(bias: str, dropout_p: float) -> list[str]:
    """The methods that can do a bias and dropout; top-k also with the backend in plain PyTorch.

    >>> able_to("learned", 0.0)
    ['topk', 'topk-chunked', 'query-chunks', 'sdpa']
    """
    takes_bias, is_random = (True if bias != "none" else None), (False if dropout_p > 0 else None)
    topk, *others = among(LAYER_METHODS, takes_bias=takes_bias, is_random=is_random)
    return [topk, "topk-chunked", *others]


def bias_and_dropout(k: int = 128, backend: str = "auto", **settings: Any) -> list[Point]:
    """Causal points at the two works of the table for which PyTorch's attention on a CPU takes an L x L path."""
    settings |= {"projections": False}
    points: list[Point] = []
    for work in (TABLE["learned-bias"], TABLE["dropout"]):
        options = {"num_heads": work.num_heads, "bias": work.bias, "dropout_p": work.dropout_p}
        points += grid([work.length], ["topk", "sdpa"], [k], backend, **options, **settings)
    return points


def chunk_grid(methods: Sequence[str], chunk_sizes: Sequence[int], **settings: Any) -> list[Point]:
    """Points of forward passes: one for each method and chunk size, smallest first; one for a method without chunks.

    methods  names of CHUNK_METHODS

    >>> [(point.method, point.chunk_size) for point in chunk_grid(["topk", "sdpa"], [256, 128])]
    [('topk-chunked', 128), ('topk-chunked', 256), ('sdpa', None)]
    """
    points = []
    shared: dict[str, Any] = {"length": 32768, "mode": "forward"} | settings
    for name in dict.fromkeys(methods):
        if name not in CHUNK_METHODS:
            raise ValueError(f"methods must be among {', '.join(CHUNK_METHODS)}, got {name!r}")
        has_chunks = method_of(name).has_chunks and name != "topk-cpu"
        for size in sorted(set(chunk_sizes)) if has_chunks else [None]:
            points.append(Point(method=on_backend(name, "chunked"), chunk_size=size, **shared))
    return points
