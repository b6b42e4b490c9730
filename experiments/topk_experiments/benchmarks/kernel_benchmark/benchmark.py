"""Which points are missing, measured one after another, each written down as it finishes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from topk_attention.environment import environment

from ...runs.checks import check_at_least
from ...runs.process import WorkerError, run_in_fresh_process
from ...runs.records import Json, append_json_line, read_json_lines
from .subject import Subject

if TYPE_CHECKING:
    from rich.console import Console

_SAME_NUMBERS = ("topk_attention", "product_sha256", "torch", "cpu")


@dataclass(frozen=True)
class KernelBenchmark:
    """Which points to measure and how.

    name          of its files in `out`
    plan          work -> methods that take turns at it; the first is the one with goals
    step_limit_s  a method whose forward and backward pass is expected to take longer is left out
    time_limit_s  a process that is not done by then is recorded as such
    """

    subject: Subject
    name: str
    plan: Mapping[Any, Sequence[str]]
    out: Path
    threads: int = 2
    seed: int = 0
    repetitions: int = 7
    enough_s: float = 120.0
    step_limit_s: float = 120.0
    time_limit_s: float = 3600.0
    with_memory: bool = True
    fresh: bool = False

    def __post_init__(self) -> None:
        check_at_least(1, self, "repetitions", "threads")
        if not self.plan or not all(self.plan.values()):
            raise ValueError("there is nothing to measure: give at least one work and one method")
        for method in dict.fromkeys(method for methods in self.plan.values() for method in methods):
            self.subject.check_method(method)


@dataclass
class Result:
    """What is known of one work. Records are as on file.

    left_out  method -> why it was not measured
    """

    work: Any
    time: Json
    memory: dict[str, Json] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def time_of(self, method: str) -> Json:
        """The method's outcome, message and times."""
        return self.time if self.time["outcome"] != "finished" else self.time["methods"][method]

    def seconds(self, method: str, mode: str) -> float | None:
        """The median; None where there is none."""
        if method in self.left_out or self.time["outcome"] != "finished":
            return None
        return self.time["methods"].get(method, {}).get(mode, {}).get("median_s")

    def peak_mib(self, method: str) -> float | None:
        return self.memory.get(method, {}).get("peak_mib")


def run_kernel_benchmark(benchmark: KernelBenchmark, console: Console) -> list[Result]:
    """Measure every point that is not there yet and append each to `NAME.jsonl` as it finishes.

    Raises:
        WorkerError: an answer is wrong, or a process died; what was measured before is kept.
    """
    points = _Points(benchmark, console)
    results: list[Result] = []
    for number, (work, methods) in enumerate(benchmark.plan.items(), 1):
        console.print(f"[{number}/{len(benchmark.plan)}] {work}", markup=False, highlight=False)
        left_out = {}
        for method in methods:
            reason = benchmark.subject.why_not(method, work) or _too_long(method, work, results, benchmark)
            if reason is not None:
                left_out[method] = reason
                _say(console, f"{method} left out: {reason}")
        measured = [method for method in methods if method not in left_out]
        if not measured:
            continue
        result = Result(work, points.get("time_methods", work, methods=measured), left_out=left_out)
        results.append(result)
        for method in measured:
            if result.time_of(method)["outcome"] != "finished":
                _say(console, f"{method}: {result.time_of(method)['outcome']}")
            if benchmark.with_memory:
                # A method that keeps everything is the same whatever k: measured once.
                same = replace(work, k=1) if benchmark.subject.keeps_all(method, work) else work
                result.memory[method] = points.get("measure_memory", same, method=method)
    return results


def expected_s(measured: Mapping[int, float], size: int, power: float = 2.0) -> float | None:
    """Seconds at a size, from those at smaller ones; None where there are none.

    It goes on as it went between the last two, or with the given power of the size where there is only one.

    >>> expected_s({1024: 1.0, 2048: 2.0}, 4096)
    4.0
    """
    sizes = sorted(smaller for smaller in measured if smaller < size)
    if not sizes:
        return None
    last = sizes[-1]
    if len(sizes) > 1:
        before = sizes[-2]
        power = math.log(measured[last] / measured[before]) / math.log(last / before)
    return measured[last] * (size / last) ** power


def _too_long(method: str, work: Any, results: Sequence[Result], benchmark: KernelBenchmark) -> str | None:
    name, power = benchmark.subject.size
    size = getattr(work, name)
    same_but_for_size = {
        getattr(result.work, name): seconds
        for result in results
        if replace(result.work, **{name: size}) == work
        and (seconds := result.seconds(method, "forward_backward")) is not None
    }
    seconds = expected_s(same_but_for_size, size, power)
    if seconds is None or seconds <= benchmark.step_limit_s:
        return None
    return f"a forward and backward pass would take about {seconds:.0f} s, more than {benchmark.step_limit_s:g} s"


class _Points:
    """Points on file and the measuring of those that are not."""

    def __init__(self, benchmark: KernelBenchmark, console: Console) -> None:
        self._benchmark, self._console = benchmark, console
        self._lines = benchmark.out / f"{benchmark.name}.jsonl"
        self._here = environment()
        self._on_file = [] if benchmark.fresh else read_json_lines(self._lines)

    def get(self, function: str, work: Any, **settings: object) -> Json:
        """The record of one call of a function of the subject's measuring module."""
        benchmark = self._benchmark
        settings |= {"threads": benchmark.threads, "seed": benchmark.seed}
        if function == "time_methods":
            settings |= {"repetitions": benchmark.repetitions, "enough_s": benchmark.enough_s}
        request = {"work": asdict(work), **settings}
        record = self._find(function, request)
        if record is None:
            record = {
                "schema": benchmark.subject.schema,
                "measured": function,
                "request": request,
                "environment": environment(),
            }
            record |= self._measure(function, work, request)
            append_json_line(self._lines, record)
            self._on_file.append(record)
        return record

    def _find(self, function: str, request: Json) -> Json | None:
        for record in reversed(self._on_file):
            if record.get("measured") != function or record.get("request") != request:
                continue
            if any(record["environment"].get(name) != self._here[name] for name in _SAME_NUMBERS):
                continue
            # A point that was given up gets another chance with more time.
            if record["outcome"] != "time limit" or record["time_limit_s"] >= self._benchmark.time_limit_s:
                return record
        return None

    def _measure(self, function: str, work: Any, request: Json) -> Json:
        from rich.text import Text

        told = " ".join([function.replace("_", " "), request.get("method", "")]).strip()
        limit_s = self._benchmark.time_limit_s
        with self._console.status(Text(f"{told} ...")) as status:
            try:
                result = run_in_fresh_process(
                    f"{self._benchmark.subject.measure}:{function}",
                    request,
                    time_limit_s=limit_s,
                    on_message=lambda message: status.update(
                        Text(f"{told}, round {message['round']} of {message['rounds']} ...")
                    ),
                )
            except WorkerError as error:
                if error.outcome not in ("out of memory", "time limit"):
                    raise WorkerError(error.outcome, f"{told}, {work} failed ({error.outcome}): {error}") from error
                return {"outcome": error.outcome, "message": str(error), "time_limit_s": limit_s}
        return {"outcome": "finished"} | result


def _say(console: Console, line: str) -> None:
    console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
