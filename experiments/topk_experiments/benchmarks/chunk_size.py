"""Time and memory of attention against the number of queries that are handled at a time.

The paper's figure (Gupta et al. 2021): batch 1, 12 heads of 64, no mask, forward pass, top-k off, L = 65,536. Here also
with top-k, and beside implementations that have no chunk size. Each point has a process of its own; its output is
compared at a short length with a dense computation in float64 before it is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from topk_attention.backends import choose_backend
from topk_attention.functional.checks import check_k

from ..rivals import AttentionMethod, new_attention
from ..runs.checking import NEAR_TIE, CheckFailedError
from ..runs.checks import check_at_least
from ..runs.devices import check_device, device_name
from ..runs.points import PointBenchmark, measure_step, start_point
from ..runs.process import Send
from ..runs.records import Json
from .tables import measured_in_words

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = "topk_attention/chunk-size/1"
LINES = "chunk-size.jsonl"


class Method(NamedTuple):
    description: str
    baseline: str
    backend: str | None = None
    has_chunks: bool = True


METHODS = {
    "vanilla-chunks": Method("vanilla, a chunk of queries at a time", "vanilla-chunks"),
    "query-chunks": Method("every key, in query chunks (chunked)", "query-chunks", "chunked"),
    "topk": Method("top-k (chunked)", "topk", "chunked"),
    "topk-cpu": Method("top-k (compiled kernels)", "topk", "cpu", has_chunks=False),
    "sdpa": Method("PyTorch's scaled_dot_product_attention", "sdpa", has_chunks=False),
}
_CHECK_LENGTH = 160
_CHECK_CHUNK = 48
_CHECK_K = 20
_CHECK_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Point:
    """One measurement. `chunk_size` is None for methods without one; `k` counts for top-k alone."""

    method: str
    chunk_size: int | None
    length: int = 32768
    k: int = 128
    num_heads: int = 12
    head_dim: int = 64
    is_causal: bool = False
    device: str = "cpu"
    threads: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"methods must be among {', '.join(METHODS)}, got {self.method!r}")
        if self.chunk_size is not None:
            check_k("chunk-sizes", self.chunk_size)
        check_k("k", self.k)
        check_at_least(1, self, "length", "num_heads", "head_dim", "threads")
        check_device(self.device)
        backend = METHODS[self.method].backend
        if backend is not None:
            choose_backend(backend)
        if backend == "cpu" and self.device != "cpu":
            raise ValueError(f'device must be "cpu" for {self.method}, got {self.device!r}; leave that method out')

    def as_record(self) -> Json:
        """What tells this point from others: without settings that its method does not look at."""
        record = asdict(self) | {"k": self.k if self.method.startswith("topk") else None}
        if self.device != "cpu":
            record["device"] = f"{self.device} ({device_name(self.device)})"
        return record

    def __str__(self) -> str:
        k = f" k = {self.k}" if self.method.startswith("topk") else ""
        chunk = "" if self.chunk_size is None else f", chunks of {self.chunk_size:,}"
        return f"L = {self.length:,}, {self.method}{k}{chunk}"

    def new_attention(self) -> AttentionMethod:
        method = METHODS[self.method]
        options: Json = {} if method.backend is None else {"backend": method.backend}
        return new_attention(
            method.baseline, head_dim=self.head_dim, k=self.k, query_chunk_size=self.chunk_size, **options
        )


def grid(methods: Sequence[str], chunk_sizes: Sequence[int], **settings: object) -> list[Point]:
    """One point for each method and chunk size, smallest chunks first; methods without a chunk size have one point.

    >>> [(point.method, point.chunk_size) for point in grid(["topk", "sdpa"], [256, 128])]
    [('topk', 128), ('topk', 256), ('sdpa', None)]
    """
    points = []
    for method in dict.fromkeys(methods):
        has_chunks = METHODS[method].has_chunks if method in METHODS else False
        sizes = sorted(set(chunk_sizes)) if has_chunks else [None]
        points += [Point(method, size, **settings) for size in sizes]  # type: ignore[arg-type]
    return points


def run_chunk_size_benchmark(benchmark: PointBenchmark, console: Console) -> list[Json]:
    """Measure every point that is not there yet and append each to `chunk-size.jsonl` as it finishes.

    Raises:
        WorkerError: a point's answer is wrong, or its process died; the points before it are kept.
    """
    file = benchmark.file(LINES, schema=SCHEMA, function=f"{__name__}:measure_point")
    return file.measure(benchmark.points, benchmark.request, measured_in_words, console)


def measure_point(request: Json, send: Send) -> Json:
    """One point, in a process of its own."""
    start_point(request)
    point = Point(**request["point"])
    largest_error = check(point)  # also the warm-up, at a tiny length
    attention = point.new_attention()
    shape = (1, point.num_heads, point.length, point.head_dim)
    tensors = [torch.randn(shape, device=point.device) for _ in range(3)]

    @torch.no_grad()
    def step() -> None:
        attention(*tensors, is_causal=point.is_causal)

    return measure_step(lambda: step, point.device, request, send) | {"largest_error_in_check": largest_error}


def check(point: Point) -> float:
    """Compare a method at a short length, with several chunks and few keys kept, with a dense computation in float64.

    Returns the largest difference, as a fraction of the largest entry.

    Raises:
        CheckFailedError: they differ by more than rounding.
    """
    settings = asdict(point) | {"length": min(point.length, _CHECK_LENGTH), "k": min(point.k, _CHECK_K)}
    if point.chunk_size is not None:
        settings["chunk_size"] = min(point.chunk_size, _CHECK_CHUNK)
    small = Point(**settings)
    shape = (1, small.num_heads, small.length, small.head_dim)
    query, key, value = (torch.randn(shape, device=small.device) for _ in range(3))
    with torch.no_grad():
        output = small.new_attention()(query, key, value, is_causal=small.is_causal)
    expected, is_clear = _dense(small, query.double(), key.double(), value.double())
    difference = ((output - expected).abs() * is_clear).max().item()
    error = difference / expected.abs().max().item()
    if not error <= _CHECK_TOLERANCE:
        raise CheckFailedError(
            f"{small}: the output differs from a dense computation by {error:.1e} of its largest entry"
        )
    return error


def _dense(point: Point, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and [1, H, L, 1]: False for rows in which rounding could choose another key."""
    scores = query @ key.mT / point.head_dim**0.5
    if point.is_causal:
        scores = scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), -torch.inf)
    is_clear = torch.ones_like(scores[..., :1], dtype=torch.bool)
    if point.method.startswith("topk") and point.k < point.length:
        best = scores.topk(point.k + 1).values  # [1, H, L, k + 1]
        is_clear = ~(best[..., -2:-1] - best[..., -1:] < NEAR_TIE)
        scores = scores.masked_fill(scores < best[..., -2:-1], -torch.inf)
    return scores.softmax(-1) @ value, is_clear
