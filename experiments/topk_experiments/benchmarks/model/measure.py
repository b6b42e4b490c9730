"""One point: memory and time of a training step, in a process of its own."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor

from ...runs.devices import limit_memory_on, peak_meter
from ...runs.process import Send
from ...runs.records import Json
from ...runs.timing import Stopwatch
from .check import check
from .methods import prepared_model
from .points import Point
from .shapes import new_inputs

_MIB = 2**20


def measure_step(request: Json, send: Send) -> Json:
    """Check a point's answer, then take its steps.

    request  point: as `Point.of` takes it
             memory_limit_mib: of the whole process (on the CPU) or on the GPU; beyond it the point is out of memory
             repetitions: steps that are timed, the first one among them; fewer where they would take longer than
             `enough_s` together

    Memory is that of the first step above what the process held before the model was made: weights, gradients and
    everything between.
    """
    point = Point.of(request["point"])
    torch.set_num_threads(point.threads)
    torch.manual_seed(point.seed)
    limit_memory_on(point.device, request["memory_limit_mib"])
    send({"doing": "checking the answer"})
    checked = check(point)  # also the warm-up: it loads all code and touches every kernel
    torch.manual_seed(point.seed)
    send({"doing": "step 1"})
    watches: dict[str, list[Stopwatch]] = {"forward": [], "backward": []}
    with peak_meter(point.device) as meter:
        model = prepared_model(point)
        inputs = new_inputs(point, model)
        loss = _forward(model, inputs, watches)
        after_forward = {"held_after_forward_mib": meter.held_mib(), "peak_of_forward_mib": meter.read().peak_mib}
        _backward(loss, watches)
    memory = meter.read()
    losses = [loss.item()]
    del loss
    step_s = _step_seconds(watches)
    while len(step_s) < request["repetitions"] and sum(step_s) + step_s[-1] < request["enough_s"]:
        send({"doing": f"step {len(step_s) + 1}"})
        model.zero_grad(set_to_none=True)
        loss = _forward(model, inputs, watches)
        _backward(loss, watches)
        losses.append(loss.item())
        step_s = _step_seconds(watches)
    parameters = list(model.parameters())
    other_cores = [watch.other_cores for both in watches.values() for watch in both if watch.other_cores is not None]
    return {
        "elapsed_s": statistics.median(step_s),
        "fastest_s": min(step_s),
        "slowest_s": max(step_s),
        "forward_s": statistics.median(watch.elapsed_s for watch in watches["forward"]),
        "backward_s": statistics.median(watch.elapsed_s for watch in watches["backward"]),
        "repetitions": len(step_s),
        "other_cores": max(other_cores, default=None),
        "peak_mib": memory.peak_mib,
        "baseline_mib": memory.baseline_mib,
        "total_peak_mib": memory.total_peak_mib,
        "memory_method": memory.method,
        "weights_mib": sum(parameter.numel() * parameter.element_size() for parameter in parameters) / _MIB,
        **after_forward,
        "num_parameters": sum(parameter.numel() for parameter in parameters),
        "losses": losses,
        "check": checked,
    }


def _forward(model: Any, inputs: dict[str, Tensor], watches: dict[str, list[Stopwatch]]) -> Tensor:
    with Stopwatch() as watch:
        loss = model(**inputs).loss
        _wait_for(loss)
    watches["forward"].append(watch)
    return loss


def _backward(loss: Tensor, watches: dict[str, list[Stopwatch]]) -> None:
    with Stopwatch() as watch:
        loss.backward()
        _wait_for(loss)
    watches["backward"].append(watch)


def _step_seconds(watches: dict[str, list[Stopwatch]]) -> list[float]:
    return [
        forward.elapsed_s + backward.elapsed_s
        for forward, backward in zip(watches["forward"], watches["backward"], strict=True)
    ]


def _wait_for(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()
