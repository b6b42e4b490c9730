"""The benchmarks of the paper's figures, in sizes for half an hour or ten minutes on two cores, and their page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..runs.points import PointBenchmark, say
from ..runs.steps import Limits
from . import (
    attention_layer,
    attention_layer_report,
    chunk_size,
    chunk_size_report,
    feed_forward_layer,
    feed_forward_layer_report,
)
from .error import ErrorBenchmark, run_error_benchmark
from .tables import run_and_show

if TYPE_CHECKING:
    from rich.console import Console

NAMES = ("attention", "feed-forward", "chunk-size", "error")
_RANDOM = ("performer", "rfa")


class Sweep(NamedTuple):
    """What of `attention_layer.grid` or `feed_forward_layer.grid` to measure: every name at every size with every k."""

    sizes: tuple[int, ...]
    names: tuple[str, ...]
    ks: tuple[int, ...]


class Reading(NamedTuple):
    """Tokens that a model reads, and the sizes of methods whose error is measured on what it attends to."""

    length: int
    k: tuple[int, ...]
    features: tuple[int, ...]
    draws: int


@dataclass(frozen=True)
class Sizes:
    """
    attention       over L, and over k
    feed_forward    over d_ff, and over k
    tokens          of a feed-forward layer
    chunk_sizes, chunk_length  chunks, and the length that they cut
    error           what the model reads and what is measured on it
    enough_s        a point's steps are not repeated beyond this
    """

    attention: tuple[Sweep, ...]
    feed_forward: tuple[Sweep, ...]
    tokens: int
    chunk_sizes: tuple[int, ...]
    chunk_length: int
    error: tuple[Reading, ...]
    enough_s: float


# A method stands out of the longest inputs where a step of it would take minutes.
FULL = Sizes(
    attention=(
        Sweep((2048, 4096, 8192, 16384), (*attention_layer.able_to("none", 0.0), "topk-reference"), (128,)),
        Sweep((32768,), ("topk", "sdpa", *_RANDOM), (128,)),
        Sweep((61440,), ("topk", *_RANDOM), (128,)),
        Sweep((8192,), ("topk",), (16, 32, 64, 128, 256, 512, 1024)),
        Sweep((8192,), ("topk-chunked",), (32, 128, 512)),
    ),
    feed_forward=(
        Sweep((2048, 6144, 16384), (*feed_forward_layer.DEFAULT, "topk-reference"), (512,)),
        Sweep((32768, 65536), ("topk", "topk-chunked", "vanilla", "vanilla-chunks"), (512,)),
        Sweep((16384,), ("topk",), (64, 128, 256, 512, 1024, 2048)),
        Sweep((16384,), ("topk-chunked",), (128, 512, 2048)),
    ),
    tokens=4096,
    chunk_sizes=(64, 128, 256, 512, 1024, 2048, 4096),
    chunk_length=8192,
    error=(
        Reading(2048, k=(4, 16, 64, 256, 1024), features=(64, 256, 1024, 4096), draws=2),
        Reading(8192, k=(16, 64, 256), features=(64, 256, 1024), draws=1),
    ),
    enough_s=15.0,
)
QUICK = Sizes(
    attention=(
        Sweep((1024, 2048, 4096), (*attention_layer.able_to("none", 0.0), "topk-reference"), (128,)),
        Sweep((2048,), ("topk",), (32, 512)),
    ),
    feed_forward=(
        Sweep((2048, 6144, 16384), feed_forward_layer.DEFAULT, (512,)),
        Sweep((6144,), ("topk",), (128, 2048)),
    ),
    tokens=1024,
    chunk_sizes=(128, 512, 2048),
    chunk_length=4096,
    error=(Reading(1024, k=(16, 64, 256), features=(64, 256, 1024), draws=1),),
    enough_s=5.0,
)


def run_figures(
    *,
    is_full: bool,
    only: Sequence[str] | None,
    memory_gib: float,
    out: Path,
    device: str,
    threads: int,
    console: Console,
) -> None:
    """Measure the points of each benchmark that are not there yet.

    only  names of NAMES; None: all

    Raises:
        ValueError: a name or a setting does not fit.
        WorkerError: a point's answer is wrong, or its process died; the points before it are kept.
    """
    for name in only or ():
        if name not in NAMES:
            raise ValueError(f"only must be among {', '.join(NAMES)}, got {name!r}")
    sizes = FULL if is_full else QUICK
    shared: dict[str, Any] = {"device": device, "threads": threads}
    limits = Limits(memory_gib=memory_gib)
    settings: dict[str, Any] = {"enough_s": sizes.enough_s, "limits": limits}

    def attention() -> None:
        points = [
            point
            for lengths, names, ks in sizes.attention
            for point in attention_layer.grid(lengths, _on(device, names), ks, **shared)
        ]
        benchmark = PointBenchmark(_once(points), out / "attention", **settings)
        run_and_show(attention_layer.run_attention_benchmark, attention_layer_report, benchmark, console)

    def feed_forward() -> None:
        points = [
            point
            for d_ffs, names, ks in sizes.feed_forward
            for point in feed_forward_layer.grid(d_ffs, _on(device, names), ks, tokens=sizes.tokens, **shared)
        ]
        benchmark = PointBenchmark(_once(points), out / "feed-forward", **settings)
        run_and_show(feed_forward_layer.run_feed_forward_benchmark, feed_forward_layer_report, benchmark, console)

    def chunks() -> None:
        methods = [name for name in chunk_size.METHODS if device == "cpu" or name != "topk-cpu"]
        points = chunk_size.grid(methods, sizes.chunk_sizes, length=sizes.chunk_length, **shared)
        benchmark = PointBenchmark(points, out / "chunk-size", **settings)
        run_and_show(chunk_size.run_chunk_size_benchmark, chunk_size_report, benchmark, console)

    def error() -> None:
        for length, k, features, draws in sizes.error:
            run_error_benchmark(
                ErrorBenchmark(
                    lengths=(length,),
                    k=k,
                    features=features,
                    draws=draws,
                    out=out / "attention-error",
                    **settings,
                    **shared,
                ),
                console,
            )

    runs: dict[str, Callable[[], None]] = dict(zip(NAMES, (attention, feed_forward, chunks, error), strict=True))
    for number, name in enumerate(names := list(only or NAMES), 1):
        say(console, f"Benchmark {number} of {len(names)}: {name}")
        runs[name]()


def _once(points: Sequence[Any]) -> list[Any]:
    """Without those that several sweeps have in common."""
    return list(dict.fromkeys(points))


def _on(device: str, names: Sequence[str]) -> list[str]:
    """Without a second name for the one backend that a GPU has."""
    return [name for name in names if device == "cpu" or name != "topk-chunked"]
