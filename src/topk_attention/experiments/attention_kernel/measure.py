"""Time and memory of the methods. Both functions run in a process of their own.

In `time_methods` the methods of one work take turns, so that whatever else the machine does meets them all alike.
In `measure_memory` each method is alone.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..memory import PeakMeter, limit_memory, ran_out_of_memory
from ..records import Json
from ..timing import Stopwatch
from ..workers import Send
from .check import check
from .methods import Operation, new_inputs, new_operation
from .works import Work

MODES = ("forward", "forward_backward")
SCORES = "q @ k.T alone"
_FEWEST_ROUNDS = 3
_WARM_UP_LENGTH = 64
# Of what is free at the start. Beyond it a method is out of memory, before others on the machine suffer.
_MEMORY_FRACTION = 0.9
# The buffer must stay in cache, so that the product is timed and not the memory behind it. Of the tiles tried (1 to 8
# MiB, 256 to 2,048 keys; L = 2,048, one thread) these were fastest: median 87 GFLOP/s, the others 72 to 81.
_TILE_BYTES = 2 * 2**20
_TILE_KEYS = 256


def time_methods(request: Json, send: Send) -> Json:
    """Check each method of a work, warm it up, then time all in turn, round after round.

    repetitions  rounds; fewer where they would take longer than `enough_s` together, but three at least

    Returns for each method its outcome and for each mode median, fastest and slowest, and the same of the scores alone.
    """
    work = _prepare(request)
    checks = {method: check(method, work, request["seed"]) for method in request["methods"]}
    torch.manual_seed(request["seed"])
    inputs = new_inputs(work)
    output_gradient = torch.randn(inputs[0].shape)
    operations = {method: new_operation(method, work) for method in request["methods"]}
    turns: dict[tuple[str, str], Callable[[], object]] = {(SCORES, "forward"): score_product(work, inputs)}
    for mode in MODES:
        for method, operation in operations.items():
            turns[method, mode] = _step(mode, operation, inputs, output_gradient)
    failures: dict[str, str] = {}
    stopwatches: dict[tuple[str, str], list[Stopwatch]] = {turn: [] for turn in turns}

    def take_turns() -> None:
        """One round; a method that runs out of memory is left out from then on."""
        for (method, mode), run in turns.items():
            if method in failures:
                continue
            try:
                with Stopwatch() as stopwatch:
                    run()
            except (RuntimeError, MemoryError) as error:
                if not ran_out_of_memory(error):
                    raise
                failures[method] = str(error).strip() or type(error).__name__
            else:
                stopwatches[method, mode].append(stopwatch)

    take_turns()
    warm_up_s = sum(stopwatch.elapsed_s for taken in stopwatches.values() for stopwatch in taken)
    for taken in stopwatches.values():
        taken.clear()
    rounds = min(request["repetitions"], max(_FEWEST_ROUNDS, int(request["enough_s"] / warm_up_s)))
    for number in range(1, rounds + 1):
        send({"round": number, "rounds": rounds})
        take_turns()
    watches = [watch for taken in stopwatches.values() for watch in taken]
    return {
        "methods": {
            method: {"outcome": "out of memory", "message": failures[method]}
            if method in failures
            else {"outcome": "finished", "largest_error_in_check": checks[method]}
            | {mode: _summary(stopwatches[method, mode]) for mode in MODES}
            for method in request["methods"]
        },
        "scores": _summary(stopwatches[SCORES, "forward"]),
        "rounds": rounds,
        "other_cores": max((watch.other_cores for watch in watches if watch.other_cores is not None), default=None),
    }


def measure_memory(request: Json, send: Send) -> Json:
    """Peak memory of a method's first forward and backward pass.

    Inputs and the gradient of the output are there before and do not count; output, gradients of the inputs and all
    between do. A short pass before it loads what the method needs.
    """
    work = _prepare(request)
    torch.manual_seed(request["seed"])
    for length in (min(work.length, _WARM_UP_LENGTH), work.length):
        sized = replace(work, length=length)
        inputs = new_inputs(sized)
        step = _step("forward_backward", new_operation(request["method"], sized), inputs, torch.randn(inputs[0].shape))
        with PeakMeter() as meter:
            step()
    memory = meter.read()
    return {
        "peak_mib": memory.peak_mib,
        "baseline_mib": memory.baseline_mib,
        "total_peak_mib": memory.total_peak_mib,
        "memory_method": memory.method,
    }


def score_product(work: Work, inputs: Sequence[Tensor]) -> Callable[[], None]:
    """All scores that attention must look at, tile by tile into one buffer."""
    query, key = (tensor.detach()[0] for tensor in inputs[:2])  # [H, L, D]
    num_keys = min(work.length, _TILE_KEYS)
    num_queries = max(1, min(work.length, _TILE_BYTES // (query.element_size() * work.num_heads * num_keys)))
    buffer = query.new_empty(work.num_heads * num_queries * num_keys)

    def run() -> None:
        for start in range(0, work.length, num_queries):
            end = min(start + num_queries, work.length)
            visible = end if work.is_causal else work.length
            for first_key in range(0, visible, num_keys):
                queries = query[:, max(start, first_key) if work.is_causal else start : end]
                keys = key[:, first_key : min(first_key + num_keys, visible)]
                shape = (work.num_heads, queries.shape[1], keys.shape[1])
                torch.bmm(queries, keys.mT, out=buffer[: math.prod(shape)].view(shape))

    return run


def _prepare(request: Json) -> Work:
    torch.set_num_threads(request["threads"])
    limit_memory(_MEMORY_FRACTION)
    return Work(**request["work"])


def _step(mode: str, operation: Operation, inputs: tuple[Tensor, ...], output_gradient: Tensor) -> Callable[[], object]:
    def forward() -> None:
        with torch.no_grad():
            operation(*inputs)

    def forward_backward() -> None:
        torch.autograd.grad(operation(*inputs), inputs, output_gradient)

    return forward if mode == "forward" else forward_backward


def _summary(stopwatches: Sequence[Stopwatch]) -> Json:
    times = [stopwatch.elapsed_s for stopwatch in stopwatches]
    return {"median_s": statistics.median(times), "fastest_s": min(times), "slowest_s": max(times)}
