"""The benchmarks of the paper's figures, in sizes for half an hour or ten minutes on two cores, and their page."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..rivals.names import METHODS, among
from ..runs.progress import say
from ..runs.steps import Limits
from . import attention, feed_forward
from .attention.works import CHUNK_METHODS, able_to, chunk_grid
from .attention.works import grid as attention_grid
from .error import ErrorBenchmark, run_error_benchmark
from .feed_forward.works import DEFAULT
from .feed_forward.works import grid as feed_forward_grid
from .rounds import PointBenchmark, run_and_show_points

if TYPE_CHECKING:
    from rich.console import Console

NAMES = ("attention", "feed-forward", "chunk-size", "error")
_RANDOM = among(METHODS, is_random=True)


class Sweep(NamedTuple):
    """Points of layers: every method at every size with every k."""

    sizes: tuple[int, ...]
    methods: tuple[str, ...]
    ks: tuple[int, ...]


@dataclass(frozen=True)
class Sizes:
    """
    attention       over L, and over k
    feed_forward    over d_ff, and over k
    tokens          of a feed-forward layer
    chunk_sizes, chunk_length  chunks, and the length that they cut
    error           settings of `ErrorBenchmark`
    enough_s        a point's steps are not repeated beyond this
    """

    attention: tuple[Sweep, ...]
    feed_forward: tuple[Sweep, ...]
    tokens: int
    chunk_sizes: tuple[int, ...]
    chunk_length: int
    error: tuple[dict[str, Any], ...]
    enough_s: float


# A method whose step would take minutes is left out at the longest inputs.
FULL = Sizes(
    attention=(
        Sweep((2048, 4096, 8192, 16384), (*able_to("none", 0.0), "topk-reference"), (128,)),
        Sweep((32768,), ("topk", "sdpa", *_RANDOM), (128,)),
        Sweep((61440,), ("topk", *_RANDOM), (128,)),
        Sweep((8192,), ("topk",), (16, 32, 64, 128, 256, 512, 1024)),
        Sweep((8192,), ("topk-chunked",), (32, 128, 512)),
    ),
    feed_forward=(
        Sweep((2048, 6144, 16384), (*DEFAULT, "topk-reference"), (512,)),
        Sweep((32768, 65536), ("topk", "topk-chunked", "vanilla", "vanilla-chunks"), (512,)),
        Sweep((16384,), ("topk",), (64, 128, 256, 512, 1024, 2048)),
        Sweep((16384,), ("topk-chunked",), (128, 512, 2048)),
    ),
    tokens=4096,
    chunk_sizes=(64, 128, 256, 512, 1024, 2048, 4096),
    chunk_length=8192,
    error=(
        {"lengths": (2048,), "k": (4, 16, 64, 256, 1024), "features": (64, 256, 1024, 4096), "draws": 2},
        {"lengths": (8192,), "k": (16, 64, 256), "features": (64, 256, 1024), "draws": 1},
    ),
    enough_s=15.0,
)
QUICK = Sizes(
    attention=(
        Sweep((1024, 2048, 4096), (*able_to("none", 0.0), "topk-reference"), (128,)),
        Sweep((2048,), ("topk",), (32, 512)),
    ),
    feed_forward=(
        Sweep((2048, 6144, 16384), DEFAULT, (512,)),
        Sweep((6144,), ("topk",), (128, 2048)),
    ),
    tokens=1024,
    chunk_sizes=(128, 512, 2048),
    chunk_length=4096,
    error=({"lengths": (1024,), "k": (16, 64, 256), "features": (64, 256, 1024), "draws": 1},),
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
    """Measure the points of each benchmark that are not on file.

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
    how: dict[str, Any] = {"enough_s": sizes.enough_s, "limits": Limits(memory_gib=memory_gib)}

    def without(method: str, methods: Iterable[str]) -> list[str]:
        """A GPU has one backend, and needs no second name for it."""
        return [name for name in methods if device == "cpu" or name != method]

    def layers(grid: Callable[..., list[Any]], sweeps: Sequence[Sweep], **more: int) -> list[Any]:
        grids = [grid(s.sizes, without("topk-chunked", s.methods), s.ks, **more, **shared) for s in sweeps]
        return list(dict.fromkeys(itertools.chain(*grids)))  # several sweeps may have a point in common

    chunks = without("topk-cpu", CHUNK_METHODS)
    points = {
        "attention": (attention.LAYERS, layers(attention_grid, sizes.attention)),
        "feed-forward": (feed_forward.LAYERS, layers(feed_forward_grid, sizes.feed_forward, tokens=sizes.tokens)),
        "chunk-size": (attention.CHUNKS, chunk_grid(chunks, sizes.chunk_sizes, sizes.chunk_length, **shared)),
    }
    for number, name in enumerate(names := list(only or NAMES), 1):
        say(console, f"Benchmark {number} of {len(names)}: {name}")
        if name in points:
            table, of_table = points[name]
            run_and_show_points(table, PointBenchmark(of_table, out=out / table.name, **how), console)
            continue
        for asked in sizes.error:
            run_error_benchmark(ErrorBenchmark(out=out / "attention-error", **asked, **how, **shared), console)
