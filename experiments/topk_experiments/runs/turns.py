"""Time of methods that take turns, so that whatever else the machine does meets them all alike."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .memory import PeakMemory, limit_memory, ran_out_of_memory
from .process import Send
from .records import Json
from .timing import Stopwatch

MODES = ("forward", "forward_backward")
_FEWEST_ROUNDS = 3
# Calls of a turn together take at least this long: a single one of a millisecond would be mostly noise.
_TURN_S = 0.02
# Of what is free at the start. Beyond it a method is out of memory, before others on the machine suffer.
_MEMORY_FRACTION = 0.9

Operation = Callable[..., Tensor]


def prepare(request: Json) -> None:
    """First thing in a process that measures."""
    torch.set_num_threads(request["threads"])
    limit_memory(_MEMORY_FRACTION)


def step(mode: str, operation: Operation, inputs: tuple[Tensor, ...], output_gradient: Tensor) -> Callable[[], object]:
    """One call of an operation in a mode; gradients are made anew and dropped."""

    def forward() -> None:
        with torch.no_grad():
            operation(*inputs)

    def forward_backward() -> None:
        torch.autograd.grad(operation(*inputs), inputs, output_gradient, allow_unused=True)

    return forward if mode == "forward" else forward_backward


def time_in_turns(
    steps: Mapping[tuple[str, str], Callable[[], object]],
    floor: Callable[[], object],
    checks: Mapping[str, float | None],
    request: Json,
    send: Send,
) -> Json:
    """Warm all methods up, then time them in turn, round after round.

    steps    (method, mode) -> one call
    floor    what no method can do without
    checks   method -> its largest error
    request  repetitions: rounds; fewer where they would take longer than `enough_s` together, but three at least

    Returns for each method its outcome and for each mode median, fastest and slowest, and the same of the floor alone.
    """
    floor_turn = ("", "")
    turns: dict[tuple[str, str], Callable[[], object]] = {floor_turn: floor, **steps}
    calls = dict.fromkeys(turns, 1)
    failures: dict[str, str] = {}
    stopwatches: dict[tuple[str, str], list[Stopwatch]] = {turn: [] for turn in turns}

    def take_turns() -> None:
        """One round; a method that runs out of memory is left out from then on."""
        for turn, run in turns.items():
            method, _ = turn
            if method in failures:
                continue
            try:
                with Stopwatch() as stopwatch:
                    for _ in range(calls[turn]):
                        run()
            except (RuntimeError, MemoryError) as error:
                if not ran_out_of_memory(error):
                    raise
                failures[method] = str(error).strip() or type(error).__name__
            else:
                stopwatches[turn].append(stopwatch)

    take_turns()
    take_turns_s = 0.0
    for turn, taken in stopwatches.items():
        if taken:
            calls[turn] = max(1, math.ceil(_TURN_S / taken[0].elapsed_s))
            take_turns_s += calls[turn] * taken[0].elapsed_s
        taken.clear()
    rounds = min(request["repetitions"], max(_FEWEST_ROUNDS, int(request["enough_s"] / take_turns_s)))
    for number in range(1, rounds + 1):
        send({"round": number, "rounds": rounds})
        take_turns()
    watches = [watch for taken in stopwatches.values() for watch in taken]

    def summary(turn: tuple[str, str]) -> Json:
        times = [watch.elapsed_s / calls[turn] for watch in stopwatches[turn]]
        return {
            "median_s": statistics.median(times),
            "fastest_s": min(times),
            "slowest_s": max(times),
            "calls_per_round": calls[turn],
        }

    return {
        "methods": {
            method: {"outcome": "out of memory", "message": failures[method]}
            if method in failures
            else {"outcome": "finished", "largest_error_in_check": checks[method]}
            | {mode: summary((method, mode)) for mode in MODES}
            for method in checks
        },
        "floor": summary(floor_turn),
        "rounds": rounds,
        "other_cores": max((watch.other_cores for watch in watches if watch.other_cores is not None), default=None),
    }


def memory_record(memory: PeakMemory, **more: Any) -> Json:
    return {
        "peak_mib": memory.peak_mib,
        "baseline_mib": memory.baseline_mib,
        "total_peak_mib": memory.total_peak_mib,
        "memory_method": memory.method,
        **more,
    }
