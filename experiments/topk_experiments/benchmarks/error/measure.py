"""Error, time and memory of one setting of one method; runs in a process of its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...runs.devices import device_name, peak_meter
from ...runs.points import Times, start_point
from ...runs.process import Send
from ...runs.records import Json
from .capture import load_layers
from .methods import METHODS, Attention, largest_errors, relative_errors
from .settings import Point

_WARM_UP_LENGTH = 64
Inputs = tuple[Tensor, Tensor, Tensor]


def measure_point(request: Json, send: Send) -> Json:
    """Errors in every layer and draw, times of one layer by all layers, and the peak of memory in the first."""
    start_point(request)
    point = Point(**request["point"])
    times = {"forward": Times(point.device), "forward_backward": Times(point.device)}
    layers: list[Json] = []
    memory: Json = {}
    for number, layer in load_layers(request["captured"], point.device):
        draws = []
        for _ in range(point.draws if METHODS[point.method].is_random else 1):
            attention = _new(point, *layer[:3])
            inputs = attention.prepare(*layer[:3])
            if not memory:
                memory = _memory(attention, inputs, point)
            attention.tune(layer)
            inputs = attention.prepare(*layer[:3])
            with torch.no_grad():
                output = attention(*inputs)
            draws.append(
                (relative_errors(output, layer.output), largest_errors(output, layer.output), attention.sharpness)
            )
            del output
        layers.append({"layer": number, **_summary(draws)})
        send({"layer": number})
        for mode, step in _steps(attention, inputs).items():
            times[mode].take(step)
            times[mode].take_more(step, request["repetitions"] - 1, request["enough_s"] / len(point.layers))
    return {
        "relative_error": _mean([layer["relative_error"] for layer in layers]),
        "worst_relative_error": max(max(layer["relative_error_of_heads"]) for layer in layers),
        "largest_error": max(layer["largest_error"] for layer in layers),
        "layers": layers,
        **{mode: taken.as_record() for mode, taken in times.items()},
        **memory,
        "device_name": device_name(point.device),
    }


def _new(point: Point, query: Tensor, key: Tensor, value: Tensor) -> Attention:
    return Attention(point.method, point.size, query.shape[1], query.shape[3], point.device)


def _steps(attention: Attention, inputs: Inputs) -> dict[str, Callable[[], object]]:
    """mode -> one call. Gradients are those of query, key and value."""
    leaves = tuple(tensor.detach().requires_grad_() for tensor in inputs)
    output_gradient = torch.randn(*inputs[0].shape[:3], inputs[2].shape[3], device=inputs[0].device)

    def forward() -> None:
        with torch.no_grad():
            attention(*inputs)

    def forward_backward() -> None:
        torch.autograd.grad(attention(*leaves), leaves, output_gradient, allow_unused=True)

    return {"forward": forward, "forward_backward": forward_backward}


def _memory(attention: Attention, inputs: Inputs, point: Point) -> Json:
    """Peaks above the inputs and the gradient of the output; a short call before loads what the method needs."""
    result: Json = {}
    for rows in (_WARM_UP_LENGTH, inputs[0].shape[2]):
        shortened = (inputs[0][:, :, :rows], inputs[1][:, :, :rows], inputs[2][:, :, :rows])
        for mode, step in _steps(attention, shortened).items():
            with peak_meter(point.device) as meter:
                step()
            peak = meter.read()
            result[f"{mode}_peak_mib"] = peak.peak_mib
            result["memory_method"] = peak.method
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


def _mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)
