"""Time and memory of the methods. Both functions run in a process of their own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...runs.memory import PeakMeter
from ...runs.process import Send
from ...runs.records import Json
from ...runs.turns import MODES, memory_record, prepare, step, time_in_turns
from .check import check
from .methods import new_inputs, new_operation
from .works import Work

_WARM_UP_LENGTH = 64
# The buffer must stay in cache, so that the product is timed and not the memory behind it. Of the tiles tried (1 to 8
# MiB, 256 to 2,048 keys; L = 2,048, one thread) these were fastest: median 87 GFLOP/s, the others 72 to 81.
_TILE_BYTES = 2 * 2**20
_TILE_KEYS = 256


def time_methods(request: Json, send: Send) -> Json:
    """Check each method of a work, then time all in turn; the floor is the score product."""
    prepare(request)
    work = Work(**request["work"])
    checks = {method: check(method, work, request["seed"]) for method in request["methods"]}
    torch.manual_seed(request["seed"])
    inputs = new_inputs(work)
    output_gradient = torch.randn(inputs[0].shape)
    operations = {method: new_operation(method, work) for method in request["methods"]}
    steps = {
        (method, mode): step(mode, operation, inputs, output_gradient)
        for mode in MODES
        for method, operation in operations.items()
    }
    return time_in_turns(steps, score_product(work, inputs), checks, request, send)


def measure_memory(request: Json, send: Send) -> Json:
    """Peak memory of a method's first forward and backward pass.

    Inputs and the gradient of the output are there before and do not count; output, gradients of the inputs and all
    between do. A short pass before it loads what the method needs.
    """
    prepare(request)
    work = Work(**request["work"])
    torch.manual_seed(request["seed"])
    for length in (min(work.length, _WARM_UP_LENGTH), work.length):
        sized = replace(work, length=length)
        inputs = new_inputs(sized)
        run = step("forward_backward", new_operation(request["method"], sized), inputs, torch.randn(inputs[0].shape))
        with PeakMeter() as meter:
            run()
    return memory_record(meter.read())


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
