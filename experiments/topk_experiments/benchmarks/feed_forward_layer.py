"""Memory and time of one feed-forward layer, forward and backward, against its number of neurons.

The paper's figure (Gupta et al. 2021): d_model 768, ReLU, k = 512, 262,144 tokens, which are fewer here. Each point has
a process of its own. Before it is measured, its output and all its gradients are compared at a small size with the
reference backend in float64.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from topk_attention.functional.checks import check_count

from ..rivals.names import check_method, kept, topk_method
from ..runs.checks import check_at_least
from ..runs.devices import check_device, device_name
from ..runs.points import PointBenchmark, measure_step, start_point
from ..runs.process import Send
from ..runs.records import Json
from .feed_forward_kernel.check import check
from .feed_forward_kernel.methods import PAPERS, RIVALS, new_inputs, new_method
from .feed_forward_kernel.works import Work
from .tables import measured_in_words

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = "topk_attention/feed-forward-layer/1"
LINES = "feed-forward.jsonl"
# name -> what it is; every other method is top-k on a backend, "topk" that on the best one
METHODS = {
    "vanilla": "vanilla (linear, ReLU, linear)",
    "vanilla-chunks": "vanilla, a sixteenth of the tokens at a time",
    "token-chunks": "every neuron, in this library's token chunks",
    "topk-torch-sparse": "top-k, torch.sparse",
}
DEFAULT = ("topk", "topk-chunked", *METHODS)
_KERNEL_NAMES = {"vanilla": "dense", "vanilla-chunks": "dense-chunks"}


@dataclass(frozen=True)
class Point:
    """One measurement. `method` is one of METHODS, "topk" or "topk-BACKEND"; `k` counts for top-k alone."""

    method: str
    d_ff: int
    k: int = 512
    tokens: int = 4096
    d_model: int = 768
    device: str = "cpu"
    threads: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("k", self.k)
        check_at_least(1, self, "d_ff", "tokens", "d_model", "threads")
        check_device(self.device)
        check_method(self.kernel_method, (*RIVALS, *PAPERS))
        if self.kernel_method == "topk-cpu" and self.device != "cpu":
            raise ValueError(f'device must be "cpu" for {self.method}, got {self.device!r}; leave that method out')

    @property
    def kernel_method(self) -> str:
        """What `feed_forward_kernel` calls it."""
        if self.method == "topk":
            return topk_method("auto" if self.device == "cpu" else "chunked")
        return _KERNEL_NAMES.get(self.method, self.method)

    @property
    def work(self) -> Work:
        """The layer."""
        return Work(self.d_model, self.d_ff, self.k, self.tokens)

    def as_record(self) -> Json:
        """What tells this point from others: without settings that its method does not look at."""
        record = asdict(self) | {"k": kept(self.kernel_method, self.k)}
        record["method"] = self.kernel_method if self.method == "topk" else self.method
        if self.device != "cpu":
            record["device"] = f"{self.device} ({device_name(self.device)})"
        return record

    def __str__(self) -> str:
        k = kept(self.kernel_method, self.k)
        return f"d_ff = {self.d_ff:,}, {self.method}" + ("" if k is None else f" k = {k}")


def grid(d_ffs: Iterable[int], methods: Iterable[str], ks: Sequence[int] = (512,), **settings: Any) -> list[Point]:
    """One point for each number of neurons and method, and for top-k for each k; fewest neurons first.

    >>> [(point.d_ff, point.method, point.k) for point in grid([128], ["vanilla", "topk-chunked"], [32, 16])]
    [(128, 'vanilla', 16), (128, 'topk-chunked', 16), (128, 'topk-chunked', 32)]
    """
    points = []
    for d_ff, method in itertools.product(sorted(set(d_ffs)), dict.fromkeys(methods)):
        for k in sorted(set(ks))[: None if method.startswith("topk") else 1]:
            points.append(Point(method, d_ff, k, **settings))
    return points


def run_feed_forward_benchmark(benchmark: PointBenchmark, console: Console) -> list[Json]:
    """Measure every point that is not there yet and append each to `feed-forward.jsonl` as it finishes.

    Raises:
        WorkerError: a point's answer is wrong, or its process died; the points before it are kept.
    """
    file = benchmark.file(LINES, schema=SCHEMA, function=f"{__name__}:measure_point")
    return file.measure(benchmark.points, benchmark.request, measured_in_words, console)


def measure_point(request: Json, send: Send) -> Json:
    """One point, in a process of its own."""
    start_point(request)
    point = Point(**request["point"])
    with torch.device(point.device):
        largest_error = check(point.kernel_method, point.work, point.seed)  # also the warm-up, at a tiny size

        def new_step() -> Callable[[], None]:
            # Made here: weights, input and all gradients count.
            method = new_method(point.kernel_method, point.work)
            inputs = method.stored(new_inputs(point.work))
            output_gradient = torch.randn_like(inputs[0])

            def step() -> None:
                for tensor in inputs:
                    tensor.grad = None
                method.operation(*inputs).backward(output_gradient)

            return step

        result = measure_step(new_step, point.device, request, send)
    return result | {"largest_error_in_check": largest_error}
