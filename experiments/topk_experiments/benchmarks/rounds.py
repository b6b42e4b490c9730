"""Measures what is missing on file, by one of two protocols.

points  a process for each point, whose peak of memory is its own
rounds  one process for all methods of a work, where they take turns: their times can be compared. The memory of each
        method is measured in a process of its own
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..rivals import FOLDER as RIVALS
from ..rivals.names import TOPK, check_method, kept, on_backend
from ..runs import turns
from ..runs.checks import check_at_least
from ..runs.devices import check_device, device_name
from ..runs.ledger import Ledger
from ..runs.process import Send
from ..runs.progress import say
from ..runs.records import Json
from ..runs.steps import Limits, run_within
from .points import record_of, records_of
from .round_tables import Result, RoundTable, measured_work
from .tables import PointTable, memory_and_time

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Which method computes a point, and on what; "forward" instead of a whole step is the forward pass alone."""

    method: str
    mode: str = "forward_backward"
    device: str = "cpu"
    threads: int = 1
    seed: int = 0

    def check_setting(self) -> None:
        """
        Raises:
            ValueError: it cannot be measured here.
        """
        check_at_least(1, self, "threads")
        check_device(self.device)
        if self.method == f"{TOPK}cpu" and self.device != "cpu":
            raise ValueError(f'device must be "cpu" for {self.method}, got {self.device!r}; leave that method out')

    def setting_record(self) -> Json:
        """Device with its name, threads and seed."""
        device = self.device if self.device == "cpu" else f"{self.device} ({device_name(self.device)})"
        return {"device": device, "threads": self.threads, "seed": self.seed}


def grid(
    new_point: Callable[..., Any],
    size: str,
    sizes: Iterable[int],
    methods: Iterable[str],
    ks: Sequence[int],
    backend: str = "auto",
    **settings: Any,
) -> list[Any]:
    """One point for each size and method, and for top-k for each k; smallest first.

    size     the field that takes the sizes
    backend  of the method "topk"
    """
    points = []
    for number, name in itertools.product(sorted(set(sizes)), dict.fromkeys(methods)):
        method = on_backend(name, backend, settings.get("device", "cpu"))
        for k in sorted(set(ks))[: 1 if kept(method, 1) is None else None]:
            points.append(new_point(method=method, k=k, **{size: number}, **settings))
    return points


@dataclass(frozen=True)
class PointBenchmark:
    """Which points to measure and how.

    repetitions  timed steps of a point; fewer where they would take longer than `enough_s` together
    limits       a point that exceeds them is stopped, and its record says so
    """

    points: Sequence[Any]
    out: Path
    repetitions: int = 3
    enough_s: float = 240.0
    limits: Limits = Limits()  # noqa: RUF009 - frozen
    fresh: bool = False

    def __post_init__(self) -> None:
        check_at_least(1, self, "repetitions")
        if not self.points:
            raise ValueError("there is no point to measure: give at least one of each kind of setting")


@dataclass(frozen=True)
class RoundBenchmark:
    """Which methods to measure at which works and how.

    name          of its files in `out`
    plan          work -> methods that take turns at it; the first is the one with goals
    step_limit_s  a method whose forward and backward pass is expected to take longer is left out
    limits        a process that exceeds them is stopped, and its record says so
    """

    table: RoundTable
    name: str
    plan: Mapping[Any, Sequence[str]]
    out: Path
    threads: int = 2
    seed: int = 0
    repetitions: int = 7
    enough_s: float = 120.0
    step_limit_s: float = 120.0
    limits: Limits = Limits(3600.0)  # noqa: RUF009 - frozen
    with_memory: bool = True
    fresh: bool = False

    def __post_init__(self) -> None:
        check_at_least(1, self, "repetitions", "threads")
        if not self.plan or not all(self.plan.values()):
            raise ValueError("there is nothing to measure: give at least one work and one method")
        for method in dict.fromkeys(method for methods in self.plan.values() for method in methods):
            check_method(method, self.table.methods)


def run_points(table: PointTable, benchmark: PointBenchmark, console: Console) -> list[Json]:
    """Measure every point that is not on file and append each to `NAME.jsonl` as it finishes.

    Returns the records of all points asked for, in their order. A point that ran out of memory or time is one of them.

    Raises:
        WorkerError: a point's answer is wrong, or its process died; the points before it are kept.
    """
    ledger = _ledger(table, benchmark, table.name)
    limits = benchmark.limits
    request = {"operation": table.operation, "repetitions": benchmark.repetitions, "enough_s": benchmark.enough_s}

    def run(point: Any, send: Send) -> Json:
        asked = {"point": asdict(point), "memory_limit_gib": limits.memory_gib, **request}
        return run_within(limits, f"{turns.__name__}:measure_point", asked, str(point))

    return records_of(benchmark.points, ledger, run, spares=limits.spare, in_words=memory_and_time, console=console)


def run_and_show_points(table: PointTable, benchmark: PointBenchmark, console: Console) -> None:
    """Measure what is missing, show the tables of the points asked for, and write the reports of all on file."""
    for page in table.pages(run_points(table, benchmark, console)):
        page.show(console)
    for path in table.report(benchmark.out):
        say(console, f"Written: {path}")


def run_rounds(benchmark: RoundBenchmark, console: Console) -> list[Result]:
    """Measure everything that is not on file and append each record to `NAME.jsonl` as it finishes.

    Raises:
        WorkerError: an answer is wrong, or a process died; what was measured before is kept.
    """
    table, ledger = benchmark.table, _ledger(benchmark.table, benchmark, benchmark.name)
    rounds = {"repetitions": benchmark.repetitions, "enough_s": benchmark.enough_s}
    results: list[Result] = []

    def record(function: str, asked: Json, **more: Any) -> Json:
        """Of a function of `turns`."""
        request = asked | {"threads": benchmark.threads, "seed": benchmark.seed}
        what = " ".join([function.replace("_", " "), asked.get("method", "")]).strip()

        def run(send: Send) -> Json:
            worker, whole = f"{turns.__name__}:{function}", request | {"operation": table.operation}
            return more | run_within(benchmark.limits, worker, whole, f"{what}, {work}", send)

        return record_of(
            {"measured": function, "request": request},
            f"  {what}",
            ledger,
            run,
            spares=benchmark.limits.spare,
            in_words=lambda record: record["outcome"],
            console=console,
        )

    for number, (work, methods) in enumerate(benchmark.plan.items(), 1):
        say(console, f"[{number}/{len(benchmark.plan)}] {work}")
        reasons = {method: table.left_out(method, work, results, benchmark.step_limit_s) for method in methods}
        left_out = {method: reason for method, reason in reasons.items() if reason is not None}
        for method, reason in left_out.items():
            say(console, f"  {method} left out: {reason}")
        measured = [method for method in methods if method not in left_out]
        if not measured:
            continue
        asked = {"work": work.as_record(), "methods": measured, **rounds}
        result = Result(work, record("time_methods", asked, left_out=left_out))
        results.append(result)
        for method in measured:
            if result.time_of(method)["outcome"] != "finished":
                say(console, f"  {method}: {result.time_of(method)['outcome']}")
            if benchmark.with_memory:
                asked = {"work": measured_work(method, work).as_record(), "method": method}
                result.memory[method] = record("measure_memory", asked)
    return results


def run_and_show_rounds(benchmark: RoundBenchmark, console: Console) -> None:
    """Measure what is missing, show the works asked for, and write the report of all on file."""
    benchmark.table.show(run_rounds(benchmark, console), console)
    lines = benchmark.out / f"{benchmark.name}.jsonl"
    for path in (lines, *benchmark.table.report(benchmark.out, benchmark.name)):
        say(console, f"Written: {path}")


def _ledger(table: PointTable | RoundTable, benchmark: PointBenchmark | RoundBenchmark, name: str) -> Ledger:
    """The records of a table; the code that counts lies in the folder of its operation and in that of rivals."""
    folder = Path(str(importlib.import_module(table.operation).__file__)).parent
    lines = benchmark.out / f"{name}.jsonl"
    return Ledger(lines, schema=table.schema, folder=folder, also=[RIVALS], fresh=benchmark.fresh)
