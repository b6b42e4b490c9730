"""One point: memory and time of a training step, in a process of its own."""

from __future__ import annotations

import statistics

import torch
from torch import Tensor

from ...runs.devices import limit_memory_on, peak_meter
from ...runs.process import Send
from ...runs.records import Json
from ...runs.steps import Times
from .check import check
from .methods import prepared_model
from .points import Point
from .shapes import new_inputs

_MIB = 2**20


def measure_step(request: Json, send: Send) -> Json:
    """Check a point's answer, then time its training steps.

    request  point: as `Point.of` takes it
             memory_limit_mib: of the whole process (on the CPU) or on the GPU; beyond it the point is out of memory
             repetitions: timed steps, including the first; fewer where they would take longer than `enough_s` together

    Memory is that of the first step above what the process held before the model was made: weights, gradients and
    everything between.
    """
    point = Point.of(request["point"])
    torch.set_num_threads(point.threads)
    torch.manual_seed(point.seed)
    limit_memory_on(point.device, request["memory_limit_mib"])
    send({"doing": "checking the answer"})
    checked = check(point)  # also the warm-up: it loads all code and runs every kernel once
    torch.manual_seed(point.seed)
    send({"doing": "step 1"})
    forward, backward = Times(point.device), Times(point.device)
    losses: list[Tensor] = []
    with peak_meter(point.device) as meter:
        model = prepared_model(point)
        inputs = new_inputs(point, model)

        def run_forward() -> None:
            losses.append(model(**inputs).loss)

        def run_backward() -> None:
            losses[-1].backward()
            losses[-1] = losses[-1].detach()

        step_s = [forward.take(run_forward)]
        after_forward = {"held_after_forward_mib": meter.held_mib(), "peak_of_forward_mib": meter.read().peak_mib}
        step_s[0] += backward.take(run_backward)
    memory = meter.read()
    while len(step_s) < request["repetitions"] and sum(step_s) + step_s[-1] < request["enough_s"]:
        send({"doing": f"step {len(step_s) + 1}"})
        model.zero_grad(set_to_none=True)
        step_s.append(forward.take(run_forward) + backward.take(run_backward))
    parameters = list(model.parameters())
    other_cores = [cores for cores in (forward.other_cores, backward.other_cores) if cores is not None]
    return {
        "elapsed_s": statistics.median(step_s),
        "fastest_s": min(step_s),
        "slowest_s": max(step_s),
        "forward_s": forward.as_record()["elapsed_s"],
        "backward_s": backward.as_record()["elapsed_s"],
        "repetitions": len(step_s),
        "other_cores": max(other_cores, default=None),
        **memory.as_record(),
        "weights_mib": sum(parameter.numel() * parameter.element_size() for parameter in parameters) / _MIB,
        **after_forward,
        "num_parameters": sum(parameter.numel() for parameter in parameters),
        "losses": [loss.item() for loss in losses],
        "check": checked,
    }
