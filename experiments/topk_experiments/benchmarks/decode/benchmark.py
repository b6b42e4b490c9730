"""Which works are missing on file. They are measured one after another, and each is written down when it finishes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from topk_attention.functional.checks import check_count

from ...runs.checks import check_at_least, check_different
from ...runs.process import Send
from ...runs.progress import say
from ...runs.records import Json
from ...runs.steps import Limits, run_within
from ..rounds import Benchmark, Seed, Threads, record_of
from . import measure
from .report import NAME, SCHEMA, in_words, pages, report
from .works import METHODS, WORKS, Work

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, kw_only=True)
class DecodeBenchmark(Benchmark):
    """Which works to measure with which methods.

    >>> DecodeBenchmark(works=["gpt"])
    Traceback (most recent call last):
    ValueError: works must be among llama, llama-bfloat16, smollm2, smollm2-bfloat16, got 'gpt'
    """

    out: Annotated[Path, "Folder for the results."] = Path("results/decode")
    works: Annotated[Sequence[str], f"Rows of the table: among {', '.join(WORKS)}."] = tuple(WORKS)
    methods: Annotated[Sequence[str], f"Among {', '.join(METHODS)}."] = tuple(METHODS)
    keys: Annotated[int | None, "Cached keys, in place of those of the works."] = None
    k: Annotated[int, "Keys kept per query (topk)."] = 64
    repetitions: Annotated[int, "Timed rounds of a work."] = 15
    enough_s: float = 120.0
    threads: Threads = 2
    seed: Seed = 0
    limits: Limits = Limits(900.0)  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("works", WORKS), ("methods", METHODS)):
            asked = getattr(self, name)
            if not asked:
                raise ValueError(f"{name} must name at least one of {', '.join(known)}, got none")
            for one in asked:
                if one not in known:
                    raise ValueError(f"{name} must be among {', '.join(known)}, got {one!r}")
            check_different(name, asked, name.removesuffix("s"))
        check_count("k", self.k)
        check_at_least(1, self, "keys", "threads")

    @property
    def sizes(self) -> list[Work]:
        works = (replace(WORKS[name], k=self.k) for name in self.works)
        return [work if self.keys is None else replace(work, num_keys=self.keys) for work in works]


def run_decode_benchmark(benchmark: DecodeBenchmark, console: Console) -> list[Json]:
    """Measure every work that is not on file and append each to `decode.jsonl` as it finishes.

    Raises:
        WorkerError: an answer is wrong, or a process died; the works before it are kept.
    """
    ledger, limits = benchmark.ledger(NAME, SCHEMA, __name__), benchmark.limits
    records = []
    for number, work in enumerate(benchmark.sizes, 1):
        request = {
            "work": work.as_record(),
            "methods": list(benchmark.methods),
            "repetitions": benchmark.repetitions,
            "enough_s": benchmark.enough_s,
            "threads": benchmark.threads,
            "seed": benchmark.seed,
        }
        label = f"[{number}/{len(benchmark.sizes)}] {work}"

        def run(send: Send, request: Json = request, label: str = label) -> Json:
            return run_within(limits, f"{measure.__name__}:time_methods", request, label, send)

        options: Json = {"spares": limits.spare, "in_words": in_words, "console": console}
        records.append(record_of({"request": request}, label, ledger, run, **options))
    return records


def run_and_show(benchmark: DecodeBenchmark, console: Console) -> None:
    """Measure what is missing, show the works asked for, and write the report of all on file."""
    for page in pages(run_decode_benchmark(benchmark, console)):
        page.show(console)
    for path in (benchmark.out / f"{NAME}.jsonl", *report(benchmark.out)):
        say(console, f"Written: {path}")
