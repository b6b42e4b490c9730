"""Which ways are missing on file. They are measured one after another, and each is written down when it finishes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from ...runs.checks import check_at_least, check_different
from ...runs.process import Send
from ...runs.progress import say
from ...runs.records import Json
from ...runs.steps import Limits, run_within
from ..rounds import Benchmark, Seed, Threads, record_of
from . import measure
from .report import NAME, SCHEMA, in_words, pages, report
from .works import LONGEST_RIVAL, METHODS, PATHS

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, kw_only=True)
class PathBenchmark(Benchmark):
    """Which ways to measure at which lengths.

    >>> PathBenchmark(paths=["mpnet"], lengths=[0])
    Traceback (most recent call last):
    ValueError: lengths must be at least 1, got 0
    """

    out: Annotated[Path, "Folder for the results."] = Path("results/paths")
    paths: Annotated[Sequence[str], f"Among {', '.join(PATHS)}."] = tuple(PATHS)
    methods: Annotated[Sequence[str], f"Among {', '.join(METHODS)}."] = METHODS
    lengths: Annotated[Sequence[int], f"Tokens; beyond {LONGEST_RIVAL:,} top-k alone."] = (4096, 8192, 16384)
    repetitions: int = 1
    threads: Threads = 2
    seed: Seed = 0
    limits: Limits = Limits(1800.0)  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("paths", tuple(PATHS)), ("methods", METHODS)):
            asked = getattr(self, name)
            if not asked:
                raise ValueError(f"{name} must name at least one of {', '.join(known)}, got none")
            for one in asked:
                if one not in known:
                    raise ValueError(f"{name} must be among {', '.join(known)}, got {one!r}")
            check_different(name, asked, name.removesuffix("s"))
        if not self.lengths:
            raise ValueError("lengths must hold at least one length, got none")
        if min(self.lengths) < 1:
            raise ValueError(f"lengths must be at least 1, got {min(self.lengths)}")
        check_different("lengths", self.lengths)
        check_at_least(1, self, "threads")

    def lengths_of(self, method: str) -> list[int]:
        lengths = sorted(self.lengths)
        return lengths if method == "top-k" else [length for length in lengths if length <= LONGEST_RIVAL]


def run_path_benchmark(benchmark: PathBenchmark, console: Console) -> list[Json]:
    """Measure every way and method that is not on file and append each to `paths.jsonl` as it finishes.

    Raises:
        WorkerError: an answer is wrong, or a process died; the ways before it are kept.
    """
    ledger, limits = benchmark.ledger(NAME, SCHEMA, __name__), benchmark.limits
    asked = [(path, method) for path, method in itertools.product(benchmark.paths, benchmark.methods)]
    asked = [(path, method) for path, method in asked if benchmark.lengths_of(method)]
    records = []
    for number, (path, method) in enumerate(asked, 1):
        request = {
            "path": path,
            "method": method,
            "lengths": benchmark.lengths_of(method),
            "threads": benchmark.threads,
            "seed": benchmark.seed,
        }
        label = f"[{number}/{len(asked)}] {PATHS[path].label}, {method}"

        def run(send: Send, request: Json = request, label: str = label) -> Json:
            function, whole = f"{measure.__name__}:measure_path", request | {"memory_limit_gib": limits.memory_gib}
            return run_within(limits, function, whole, label, send, memory_in_use=True)

        options: Json = {"spares": limits.spare, "in_words": in_words, "console": console}
        records.append(record_of({"request": request}, label, ledger, run, **options))
    return records


def run_and_show(benchmark: PathBenchmark, console: Console) -> None:
    """Measure what is missing, show the ways asked for, and write the report of all on file."""
    for page in pages(run_path_benchmark(benchmark, console)):
        page.show(console)
    for path in (benchmark.out / f"{NAME}.jsonl", *report(benchmark.out)):
        say(console, f"Written: {path}")
