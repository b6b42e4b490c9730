"""Which networks are missing on file. They are measured one by one, and each is written down when it finishes."""

from __future__ import annotations

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
from .works import NETWORKS, OURS, Work

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, kw_only=True)
class NetworkBenchmark(Benchmark):
    """Which networks to measure.

    >>> NetworkBenchmark(networks=["gpt"])
    Traceback (most recent call last):
    ValueError: networks must be among mixtral-8x7b, qwen3-30b-a3b, gpt-oss-20b, olmoe-1b-7b, phi3-mini, glm4-9b, \
modernbert-base, got 'gpt'
    """

    out: Annotated[Path, "Folder for the results."] = Path("results/networks")
    networks: Annotated[Sequence[str], f"Among {', '.join(NETWORKS)}."] = tuple(NETWORKS)
    tokens: Annotated[Sequence[int] | None, "Tokens of a call, in place of 1 and those of the network."] = None
    shrink: Annotated[int, "Divide the sizes of the networks by this, to try the command."] = 1
    repetitions: Annotated[int, "Timed rounds; long ones get fewer, but three."] = 7
    enough_s: float = 10.0
    threads: Threads = 2
    seed: Seed = 0
    limits: Limits = Limits(1800.0)  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.networks:
            raise ValueError(f"networks must name at least one of {', '.join(NETWORKS)}, got none")
        for name in self.networks:
            if name not in NETWORKS:
                raise ValueError(f"networks must be among {', '.join(NETWORKS)}, got {name!r}")
        check_different("networks", self.networks, "network")
        check_at_least(1, self, "threads")
        assert self.works

    @property
    def works(self) -> list[Work]:
        return [Work(name, tuple(sorted(set(self.tokens or ()))), self.shrink) for name in self.networks]


def run_network_benchmark(benchmark: NetworkBenchmark, console: Console) -> list[Json]:
    """Measure every network that is not on file and append each to `networks.jsonl` as it finishes.

    Raises:
        WorkerError: an answer is wrong, or a process died; the networks before it are kept.
    """
    ledger, limits = benchmark.ledger(NAME, SCHEMA, __name__), benchmark.limits
    records = []
    for number, work in enumerate(benchmark.works, 1):
        request = {
            "work": work.as_record(),
            "methods": [*work.rivals, *OURS],
            "repetitions": benchmark.repetitions,
            "enough_s": benchmark.enough_s,
            "threads": benchmark.threads,
            "seed": benchmark.seed,
        }
        label = f"[{number}/{len(benchmark.works)}] {work}"

        def run(send: Send, request: Json = request, label: str = label) -> Json:
            return run_within(limits, f"{measure.__name__}:measure_network", request, label, send)

        options: Json = {"spares": limits.spare, "in_words": in_words, "console": console}
        records.append(record_of({"request": request}, label, ledger, run, **options))
    return records


def run_and_show(benchmark: NetworkBenchmark, console: Console) -> None:
    """Measure what is missing, show the networks asked for, and write the report of all on file."""
    for page in pages(run_network_benchmark(benchmark, console)):
        page.show(console)
    for path in (benchmark.out / f"{NAME}.jsonl", *report(benchmark.out)):
        say(console, f"Written: {path}")
