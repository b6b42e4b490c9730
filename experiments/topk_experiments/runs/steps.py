"""A step that a fresh process measures: its limits, its times, and the peak of memory while it is made and run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch

from .devices import device_name, limit_memory_on, peak_meter, synchronize
from .memory import limit_memory
from .process import Send, WorkerError, run_in_fresh_process
from .records import Json
from .timing import Stopwatch

# Of the memory that is free when a process starts. Beyond it the process runs out of memory, before others suffer.
_MEMORY_FRACTION = 0.9


@dataclass(frozen=True)
class Limits:
    """A process that exceeds one of these is stopped, and its record says so."""

    time_s: Annotated[float, "Seconds after which a process is stopped and recorded so."] = 900.0
    memory_gib: Annotated[
        float | None,
        "GiB that a point's process may take, on a GPU there. Default: 0.9 of what is free when it starts, on a GPU "
        "all of it.",
    ] = None

    def __post_init__(self) -> None:
        for name, limit in (("time-limit", self.time_s), ("memory-limit", self.memory_gib)):
            if limit is not None and not limit > 0:
                raise ValueError(f"{name} must be above 0, got {limit:g}")
            if limit == math.inf:
                raise ValueError(f"{name} must be finite, got {limit:g}")

    def spare(self, record: Json) -> bool:
        """Whether a record spares a run under these limits: it finished, or was allowed as much."""
        if record["outcome"] == "time limit":
            return self.time_s <= record["time_limit_s"]
        before = record.get("memory_limit_gib")
        is_more = before is not None and (self.memory_gib is None or self.memory_gib > before)
        return record["outcome"] == "finished" or not is_more


def run_within(
    limits: Limits,
    function: str,
    request: Json,
    what: str,
    on_message: Send | None = None,
    *,
    memory_in_use: bool = False,
) -> Json:
    """The outcome of a function in a fresh process, with what it returned, or with the limits that stopped it.

    function, memory_in_use  as `run_in_fresh_process` takes them
    what                     named in errors

    Raises:
        WorkerError: the function raised an error, or its process died.
    """
    try:
        options: Json = {"time_limit_s": limits.time_s, "on_message": on_message, "memory_in_use": memory_in_use}
        result = run_in_fresh_process(function, request, **options)
    except WorkerError as error:
        if error.outcome not in ("out of memory", "time limit"):
            raise WorkerError(error.outcome, f"{what} failed ({error.outcome}): {error}") from error
        stopped_by = {"time_limit_s": limits.time_s, "memory_limit_gib": limits.memory_gib}
        return {"outcome": error.outcome, "message": str(error), **stopped_by}
    return {"outcome": "finished"} | result


def start_point(request: Json) -> None:
    """Set threads, seed and the limit of memory; called first in a process that measures.

    request  holds threads, seed and device in its "point", or itself where it has no point
    """
    settings = request.get("point", request)
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(settings["seed"])
    limit_gib = request.get("memory_limit_gib")
    if settings.get("device", "cpu") == "cpu":
        limit_memory(_MEMORY_FRACTION, limit_gib)
    elif limit_gib is not None:
        limit_memory_on(settings["device"], 1024 * limit_gib)


class Times:
    """Times of a function that is called several times.

    device  "cpu" or "cuda"
    calls   that are timed together; a time is that of one of them
    """

    def __init__(self, device: str, calls: int = 1) -> None:
        self.calls = calls
        self._device = device
        self._elapsed_s: list[float] = []
        self._other_cores: list[float] = []

    def take(self, function: Callable[[], object]) -> float:
        """Seconds that a call takes."""
        synchronize(self._device)
        with Stopwatch() as stopwatch:
            for _ in range(self.calls):
                function()
            synchronize(self._device)
        self._elapsed_s.append(stopwatch.elapsed_s / self.calls)
        if stopwatch.other_cores is not None:
            self._other_cores.append(stopwatch.other_cores)
        return self._elapsed_s[-1]

    def take_more(self, function: Callable[[], object], number: int, enough_s: float) -> None:
        """Call it up to `number` times more, as long as a call like the last one fits into what is left of enough_s."""
        for _ in range(number):
            if self._elapsed_s[-1] > enough_s:
                return
            enough_s -= self.take(function)

    @property
    def seconds(self) -> float:
        """Their sum."""
        return sum(self._elapsed_s)

    @property
    def other_cores(self) -> float | None:
        """The most that other processes kept busy; None for times too short to tell."""
        return max(self._other_cores, default=None)

    def as_record(self) -> Json:
        return {
            "elapsed_s": statistics.median(self._elapsed_s),
            "fastest_s": min(self._elapsed_s),
            "slowest_s": max(self._elapsed_s),
            "repetitions": len(self._elapsed_s),
            "other_cores": self.other_cores,
        }


def measure_step(new_step: Callable[[], Callable[[], object]], device: str, request: Json, send: Send) -> Json:
    """Times of a step, and the peak of memory while it is made and runs for the first time.

    new_step  makes the step; what it allocates counts as memory
    request   repetitions: timed steps; fewer where they would take longer than `enough_s` together
    """
    times = Times(device)
    with peak_meter(device) as first_meter:
        step = new_step()
        times.take(step)
    send({"doing": "steps after the first"})
    with peak_meter(device) as later_meter:
        times.take_more(step, request["repetitions"] - 1, request["enough_s"] - times.seconds)
    memory, later_memory = first_meter.read(), later_meter.read()
    return {
        **times.as_record(),
        **memory.as_record(),
        # Memory that the allocator keeps between steps is in this one.
        "peak_of_later_steps_mib": later_memory.total_peak_mib - memory.baseline_mib,
        "device_name": device_name(device),
    }
