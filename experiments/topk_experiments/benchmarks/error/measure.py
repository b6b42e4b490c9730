"""Error, time and memory of one point; runs in a process of its own."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ...runs.devices import device_name, peak_meter
from ...runs.process import Send
from ...runs.records import Json
from ...runs.steps import Times, start_point
from ...runs.turns import MODES, step
from .capture import load_layers
from .methods import METHODS, Attention, largest_errors, relative_errors

_WARM_UP_LENGTH = 64
Inputs = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Point:
    """One method of one size on the queries, keys and values of one model reading one text.

    model, text  name and revision, source and hash, which identify them
    layers       numbers, from 0
    draws        of random features; errors are means over them. None for other methods
    """

    method: str
    size: int | None
    length: int
    model: list[str]
    text: list[str]
    layers: list[int]
    draws: int | None
    device: str
    threads: int
    seed: int

    def as_record(self) -> Json:
        """What identifies this point."""
        device = self.device if self.device == "cpu" else f"{self.device} ({device_name(self.device)})"
        return asdict(self) | {"device": device}

    def __str__(self) -> str:
        size = "" if self.size is None else f", {METHODS[self.method].size} = {self.size}"
        return f"L = {self.length:,}, {self.method}{size}"


def measure_point(request: Json, send: Send) -> Json:
    """Errors in every layer and draw, times of one layer over all layers, and the peak of memory in the first layer."""
    start_point(request)
    point = Point(**request["point"])
    times = {mode: Times(point.device) for mode in MODES}
    layers: list[Json] = []
    memory: Json = {}
    for number, layer in load_layers(request["captured"], point.device):
        draws = []
        for _ in range(point.draws or 1):
            attention = Attention(point.method, point.size, layer.query.shape[1], layer.query.shape[3], point.device)
            inputs = attention.prepare(*layer[:3])
            memory = memory or _memory(attention, inputs, point.device)
            attention.tune(layer)
            inputs = attention.prepare(*layer[:3])
            with torch.no_grad():
                output = attention(*inputs)
            draws.append(
                (relative_errors(output, layer.output), largest_errors(output, layer.output), attention.sharpness)
            )
            del output
        layers.append({"layer": number, **_summary(draws)})
        send({"doing": f"layer {number}"})
        for mode, run in _steps(attention, inputs).items():
            times[mode].take(run)
            times[mode].take_more(run, request["repetitions"] - 1, request["enough_s"] / len(point.layers))
    return {
        "relative_error": statistics.fmean(layer["relative_error"] for layer in layers),
        "worst_relative_error": max(max(layer["relative_error_of_heads"]) for layer in layers),
        "largest_error": max(layer["largest_error"] for layer in layers),
        "layers": layers,
        **{mode: of_mode.as_record() for mode, of_mode in times.items()},
        **memory,
        "device_name": device_name(point.device),
    }


def _steps(attention: Attention, inputs: Inputs) -> dict[str, Callable[[], object]]:
    """mode -> one call. Gradients are those of query, key and value."""
    leaves = tuple(tensor.detach().requires_grad_() for tensor in inputs)
    output_gradient = torch.randn(*inputs[0].shape[:3], inputs[2].shape[3], device=inputs[0].device)
    return {mode: step(mode, attention, leaves, output_gradient) for mode in MODES}


def _memory(attention: Attention, inputs: Inputs, device: str) -> Json:
    """Peaks above the inputs and the gradient of the output. A short call before it loads what the method needs."""
    result: Json = {}
    for rows in (_WARM_UP_LENGTH, inputs[0].shape[2]):
        query, key, value = (tensor[:, :, :rows] for tensor in inputs)
        for mode, run in _steps(attention, (query, key, value)).items():
            with peak_meter(device) as meter:
                run()
            peak = meter.read()
            result |= {f"{mode}_peak_mib": peak.peak_mib, "memory_method": peak.method}
    return result


def _summary(draws: list[tuple[Tensor, Tensor, Tensor]]) -> Json:
    """Of one layer: means over draws, and over heads."""
    errors, largest, sharpness = (torch.stack(of_draws).double().cpu() for of_draws in zip(*draws, strict=True))
    return {
        "relative_error": errors.mean().item(),
        "relative_error_of_heads": errors.mean(0).tolist(),
        "relative_error_of_draws": errors.mean(1).tolist(),
        "largest_error": largest.max().item(),
        "sharpness_of_heads": sharpness.mean(0).tolist(),
    }
