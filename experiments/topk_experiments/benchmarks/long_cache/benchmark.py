"""The options, and which points are missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from topk_attention.files import check_writable

from ...runs.checks import check_at_least
from ...runs.process import Send
from ...runs.progress import say
from ...runs.records import Json
from ...runs.steps import run_within
from ..rounds import Benchmark, records_of
from . import measure
from .measure import Point
from .report import NAME, SCHEMA, in_words, report, show

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, kw_only=True)
class LongCacheBenchmark(Benchmark):
    """Which points to measure.

    folder  where the files of keys and values are made; None: in `out`
    """

    points: Sequence[Point]
    out: Annotated[Path, "Folder for the results."] = Path("results/long-cache")
    folder: Annotated[Path | None, "Folder for the files of keys and values. Default: in --out."] = None
    keep: Annotated[bool, "Leave the files of keys and values where they are."] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.points:
            raise ValueError("there is no point to measure: give at least one number of tokens")
        for point in self.points:
            check_at_least(1, point, "tokens", "k", "layers", "heads", "key_heads", "head_dim", "steps", "threads")
            if point.dtype not in ("bfloat16", "float16", "float32"):
                raise ValueError(f"dtype must be bfloat16, float16 or float32, got {point.dtype!r}")
            if point.heads % point.key_heads:
                raise ValueError(f"heads must be a multiple of key_heads, got {point.heads} and {point.key_heads}")


def run_long_cache(benchmark: LongCacheBenchmark, console: Console) -> list[Json]:
    """Measure every point that is not on file yet, append each to `long-cache.jsonl` when it finishes, and show them.

    Raises:
        OSError: the folder for the files cannot be written.
        WorkerError: an answer is wrong, a disk is full, or a process died; the files of keys and values stay, and the
            same command continues them.
    """
    limits, ledger = benchmark.limits, benchmark.ledger(NAME, SCHEMA, __name__)
    if benchmark.folder is not None:
        check_writable("folder", benchmark.folder, is_folder=True)
    files = benchmark.folder or benchmark.out / "work"

    def run(point: Point, on_message: Send) -> Json:
        request = {
            "point": asdict(point),
            "memory_limit_gib": limits.memory_gib,
            "folder": str(files / f"{point.tokens}-tokens"),
            "keep": benchmark.keep,
        }
        return run_within(limits, f"{measure.__name__}:measure_point", request, str(point), on_message)

    records = records_of(benchmark.points, ledger, run, spares=limits.spare, in_words=in_words, console=console)
    show(records, console)
    for path in report(benchmark.out):
        say(console, f"Written: {path}")
    say(console, f"Records: {ledger.path}")
    return records
