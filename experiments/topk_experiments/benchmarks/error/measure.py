"""The methods whose error is measured, and error, time and memory of one point, in a process of its own."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor

from ...rivals import METHODS as EVERY_METHOD
from ...rivals import new_attention
from ...runs.devices import device_name, peak_meter
from ...runs.process import Send
from ...runs.records import Json
from ...runs.steps import Times, start_point
from ...runs.turns import MODES, step
from .capture import Layer, load_layers

_KS = (4, 8, 16, 32, 64, 128, 256, 512, 1024)
_NUM_FEATURES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


class Method(NamedTuple):
    """
    description  its name in tables and pictures
    size         the name of its size; None where it has none
    sizes        those measured by default
    sharpness    factors on the scores; each head uses the best of them
    is_random    its error depends on random directions
    """

    description: str
    size: str | None = None
    sizes: tuple[int, ...] = ()
    sharpness: tuple[float, ...] = ()
    is_random: bool = False


METHODS = {
    "topk": Method(EVERY_METHOD["topk"].description, "k", _KS),
    "topk-completed": Method(EVERY_METHOD["topk-completed"].description, "k", _KS),
    "performer": Method(EVERY_METHOD["performer"].description, "features", _NUM_FEATURES, is_random=True),
    "performer-tuned": Method(
        "Performer, each head with its best sharpness",
        "features",
        _NUM_FEATURES,
        sharpness=(1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0),
        is_random=True,
    ),
    "rfa": Method(
        "RFA, each head with its best sigma",
        "features",
        _NUM_FEATURES,
        sharpness=(1 / 16, 1 / 4, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0),  # of unit vectors: sigma squared
        is_random=True,
    ),
    "uniform": Method("mean of the visible values"),
    "sdpa": Method(EVERY_METHOD["sdpa"].description),
}


def sizes_of(method: str, sizes: Sequence[int] | None) -> tuple[int | None, ...]:
    """The sizes of a method to measure: those given, otherwise its own."""
    if METHODS[method].size is None:
        return (None,)
    return METHODS[method].sizes if sizes is None else tuple(dict.fromkeys(sizes))


class Attention:
    """Causal attention by a method, for the heads of one layer. Each object draws random features of its own.

    sharpness  [H]  factor on the scores of each head, initially 1
    """

    def __init__(self, method: str, size: int | None, num_heads: int, head_dim: int, device: str) -> None:
        self._candidates = METHODS[method].sharpness
        self.sharpness = torch.ones(num_heads, device=device)
        self._is_uniform, self._is_rfa = method == "uniform", method == "rfa"
        if not self._is_uniform:
            options = {"num_heads": num_heads} if self._is_rfa else {}
            name = method.removesuffix("-tuned")
            attention = new_attention(name, head_dim=head_dim, k=size, num_features=size or 1, **options)
            self._attention = attention.to(device).requires_grad_(False)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[1, H, N, D], ... -> [1, H, N, E], of the tensors that `prepare` returned."""
        if self._is_uniform:
            count = torch.arange(1, value.shape[2] + 1, device=value.device, dtype=value.dtype)
            return value.cumsum(2) / count[:, None]
        return self._attention(query, key, value, is_causal=True)

    @torch.no_grad()
    def prepare(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value scaled by each head's sharpness, which a model would have in its weights."""
        root = self.sharpness.sqrt()[:, None]  # [H, 1]
        if self._is_rfa:
            sigma = cast(Tensor, self._attention.sigma)  # [H, D]
            sigma.copy_(root.expand_as(sigma))
        elif self._candidates:
            query, key = query * root[..., None], key * root[..., None]
        return query, key, value

    @torch.no_grad()
    def tune(self, layer: Layer) -> None:
        """Set the sharpness of each head to the candidate with the lowest error on these very tensors."""
        if not self._candidates:
            return
        errors = []
        for candidate in self._candidates:
            self.sharpness.fill_(candidate)
            errors.append(relative_errors(self(*self.prepare(*layer[:3])), layer.output))
        best = torch.stack(errors).nan_to_num(torch.inf).argmin(0)
        self.sharpness = torch.tensor(self._candidates, device=best.device)[best]


def relative_errors(output: Tensor, exact: Tensor) -> Tensor:
    """|output - exact| / |exact| of each head, Euclidean norms over queries and dimensions: [1, H, N, E] -> [H]."""
    difference, whole = (
        torch.linalg.vector_norm(tensor, dim=(0, 2, 3), dtype=torch.float64) for tensor in (output - exact, exact)
    )
    return difference / whole


def largest_errors(output: Tensor, exact: Tensor) -> Tensor:
    """The largest difference of each head, as a fraction of its largest entry: [1, H, N, E] -> [H]."""
    return (output - exact).abs().amax((0, 2, 3)).double() / exact.abs().amax((0, 2, 3))


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
            memory = memory or _memory(point, attention, inputs)
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


def _memory(point: Point, attention: Attention, inputs: Inputs) -> Json:
    """Peaks above the inputs and the gradient of the output. A short call before it loads what the method needs."""
    result: Json = {}
    for rows, measured in ((_WARM_UP_LENGTH, _for_warm_up(point, attention, inputs)), (inputs[0].shape[2], attention)):
        query, key, value = (tensor[:, :, :rows] for tensor in inputs)
        for mode, run in _steps(measured, (query, key, value)).items():
            with peak_meter(point.device) as meter:
                run()
            peak = meter.read()
            result |= {f"{mode}_peak_mib": peak.peak_mib, "memory_method": peak.method}
    return result


def _for_warm_up(point: Point, attention: Attention, inputs: Inputs) -> Attention:
    """The method with a k that leaves keys out of a short call, as it does of a long one; others as they are.

    Where every key is kept, PyTorch's attention runs. The completed backward pass then loaded 45 MiB of torch's
    compiler only when it was measured.
    """
    if METHODS[point.method].size != "k":
        return attention
    _, num_heads, _, head_dim = inputs[0].shape
    return Attention(point.method, min(point.size or 1, _WARM_UP_LENGTH // 2), num_heads, head_dim, point.device)


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
