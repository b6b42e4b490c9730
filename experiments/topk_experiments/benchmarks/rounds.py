"""Measures what is missing on file, by one of two protocols.

points  a process for each point, whose peak of memory is its own
rounds  one process for all methods of a work, where they take turns: their times can be compared. The memory of each
        method is measured in a process of its own
"""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ..rivals import FOLDER as RIVALS
from ..rivals.names import TOPK, check_method, kept, on_backend
from ..runs import turns
from ..runs.checks import check_above_0, check_at_least
from ..runs.devices import check_device, device_name
from ..runs.ledger import Ledger, is_finished, made_when
from ..runs.process import Send
from ..runs.progress import say
from ..runs.records import Json
from ..runs.steps import Limits, run_within
from .round_tables import Result, RoundTable, measured_work
from .tables import PointTable, memory_and_time

if TYPE_CHECKING:
    from rich.console import Console

# A field with a text is an option of the commands that take it (`cli.options.taking`).
Device = Annotated[str, '"cpu" or "cuda".']
Threads = Annotated[int, "CPU threads."]
Seed = Annotated[int, "Seed of random numbers."]
StepLimit = Annotated[float, "Leave out what should take more seconds a step, forward and backward."]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Which method computes a point, and on what; "forward" instead of a whole step is the forward pass alone."""

    method: str
    mode: str = "forward_backward"
    device: Device = "cpu"
    threads: Threads = 1
    seed: Seed = 0

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
    new_point: Any,
    size: str,
    sizes: Iterable[int],
    methods: Iterable[str],
    ks: Sequence[int] | None = None,
    backend: str = "auto",
    **settings: Any,
) -> list[Any]:
    """One point for each size and method, and for top-k for each k; smallest first.

    size     the field that takes the sizes
    methods  names that the points know, "topk-BACKEND", or "topk", which is computed on `backend`
    ks       None: the default of the points
    """
    points, chosen = [], [new_point.k] if ks is None else sorted(set(ks))
    for number, name in itertools.product(sorted(set(sizes)), dict.fromkeys(methods)):
        method = on_backend(name, backend, settings.get("device", "cpu"))
        for k in chosen[: 1 if kept(method, 1) is None else None]:
            points.append(new_point(method=method, k=k, **{size: number}, **settings))
    return points


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """How to measure what is missing on file.

    enough_s  repetitions are fewer where they would take longer together
    limits    of each process
    """

    out: Annotated[Path, "Folder for the results."]
    repetitions: Annotated[int, "Timed steps of a point; long ones get fewer."] = 3
    enough_s: float = 240.0
    limits: Limits = Limits()  # noqa: RUF009 - frozen
    fresh: Annotated[bool, "Measure again what is on file."] = False

    def __post_init__(self) -> None:
        check_at_least(1, self, "repetitions")

    def ledger(self, name: str, schema: str, module: str) -> Ledger:
        """The records in `NAME.jsonl`; the code that counts lies in the folder of a module and in that of rivals."""
        folder = Path(str(importlib.import_module(module).__file__)).parent
        return Ledger(self.out / f"{name}.jsonl", schema=schema, folder=folder, also=[RIVALS], fresh=self.fresh)


@dataclass(frozen=True)
class PointBenchmark(Benchmark):
    """Which points to measure: they have `as_record`, which identifies them, and their strings say what is measured."""

    points: Sequence[Any]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.points:
            raise ValueError("there is no point to measure: give at least one of each kind of setting")


@dataclass(frozen=True)
class RoundBenchmark(Benchmark):
    """Which methods to measure at which works.

    name  of its files in `out`
    plan  work -> methods that take turns at it; the first is the one with goals
    """

    table: RoundTable
    name: str
    plan: Mapping[Any, Sequence[str]]
    _: KW_ONLY
    threads: Threads = 2
    seed: Seed = 0
    repetitions: Annotated[int, "Timed rounds of a work; long ones get fewer, but three."] = 7
    enough_s: float = 120.0
    step_limit_s: StepLimit = 120.0
    limits: Limits = Limits(3600.0)  # noqa: RUF009 - frozen
    with_memory: Annotated[bool, "Measure peak memory too."] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(1, self, "threads")
        check_above_0(self, "step_limit_s")
        if not self.plan or not all(self.plan.values()):
            raise ValueError("there is nothing to measure: give at least one work and one method")
        for method in dict.fromkeys(itertools.chain(*self.plan.values())):
            check_method(method, self.table.methods)


def run_points(table: PointTable, benchmark: PointBenchmark, console: Console) -> list[Json]:
    """Measure every point that is not on file and append each to `NAME.jsonl` as it finishes.

    Returns the records of all points asked for, in their order. A point that ran out of memory or time is one of them.

    Raises:
        WorkerError: a point's answer is wrong, or its process died; the points before it are kept.
    """
    limits = benchmark.limits
    shared = {"operation": table.operation, "repetitions": benchmark.repetitions, "enough_s": benchmark.enough_s}

    def run(point: Any, send: Send) -> Json:
        request = {"point": asdict(point), "memory_limit_gib": limits.memory_gib, **shared}
        return run_within(limits, f"{turns.__name__}:measure_point", request, str(point))

    ledger = benchmark.ledger(table.name, table.schema, table.operation)
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
    table = benchmark.table
    ledger = benchmark.ledger(benchmark.name, table.schema, table.operation)
    results: list[Result] = []

    def record(function: str, work: Any, asked: Json, **more: Any) -> Json:
        """Of a function of `turns`."""
        request = {"work": work.as_record(), **asked, "threads": benchmark.threads, "seed": benchmark.seed}
        what = " ".join([function.replace("_", " "), asked.get("method", "")]).strip()

        def run(send: Send) -> Json:
            worker = f"{turns.__name__}:{function}"
            whole = request | {"work": asdict(work), "operation": table.operation}  # also where its tensors lie
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
        left_out = table.left_out(methods, work, results, benchmark.step_limit_s)
        for method, reason in left_out.items():
            say(console, f"  {method} left out: {reason}")
        measured = [method for method in methods if method not in left_out]
        if not measured:
            continue
        asked = {"methods": measured, "repetitions": benchmark.repetitions, "enough_s": benchmark.enough_s}
        result = Result(work, record("time_methods", work, asked, left_out=left_out))
        results.append(result)
        for method in measured:
            if result.time_of(method)["outcome"] != "finished":
                say(console, f"  {method}: {result.time_of(method)['outcome']}")
            if benchmark.with_memory:
                result.memory[method] = record("measure_memory", measured_work(method, work), {"method": method})
    return results


def run_and_show_rounds(benchmark: RoundBenchmark, console: Console) -> None:
    """Measure what is missing, show the works asked for, and write the report of all on file."""
    results = run_rounds(benchmark, console)
    for page in benchmark.table.pages(results):
        page.show(console)
    for note in benchmark.table.notes(results):
        say(console, note)
    lines = benchmark.out / f"{benchmark.name}.jsonl"
    for path in (lines, *benchmark.table.report(benchmark.out, benchmark.name)):
        say(console, f"Written: {path}")


def records_of(points: Sequence[Any], ledger: Ledger, run: Callable[[Any, Send], Json], **how: Any) -> list[Json]:
    """The record of each point, as `record_of` finds or makes it, in the order of the points."""
    return [
        record_of(
            {"point": point.as_record()},
            f"[{number}/{len(points)}] {point}",
            ledger,
            functools.partial(run, point),
            **how,
        )
        for number, point in enumerate(points, 1)
    ]


def record_of(
    configuration: Json,
    label: str,
    ledger: Ledger,
    run: Callable[[Send], Json],
    *,
    spares: Callable[[Json], bool],
    in_words: Callable[[Json], str],
    console: Console,
) -> Json:
    """The record of a configuration: the one on file if it spares the run, otherwise that of a new run.

    run       the outcome and the results of a new run; it may send {"doing": what it does now}
    spares    as `Ledger.find` takes it
    in_words  the results of a finished run, in a few words

    Raises:
        WorkerError: the answer is wrong, or the process died. Nothing is written for this configuration.
    """
    from rich.text import Text

    record, note = ledger.find(configuration, spares=spares), ""
    if record is None:
        with console.status(Text(f"{label} ...")) as status:
            result = run(lambda message: status.update(Text(f"{label}: {message['doing']} ...")))
        record = ledger.new_record(configuration) | result
        ledger.append(record)
    else:
        note = f" ({made_when(record)})"
    words = in_words(record) if is_finished(record) else f"{record['outcome']} ({record['message'].splitlines()[0]})"
    say(console, f"{label}: {words}{note}")
    return record
