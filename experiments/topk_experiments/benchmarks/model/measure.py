"""One point, in a process of its own: memory and time of a training step, after a check of the answer.

The check is of whole models at a short length, without dropout, in float32.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...runs.checks import CheckFailedError
from ...runs.devices import limit_memory_on, peak_meter
from ...runs.process import Send
from ...runs.records import Json
from ...runs.steps import Times
from .methods import WRITTEN_OUT, names_of_relu, new_config, new_inputs, new_model, prepared_model, use_method
from .points import RANDOM, Point

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


# Long enough that k leaves most keys out, short enough that the check costs seconds.
_LENGTH = 96
_DECODER_LENGTH = 16
_K = 24
_EVERY_NEURON = 2**31 - 1
# Limit for the error of the loss, and for that of gradients relative to their largest entry. Rounding alone gives up to
# a tenth of it (twelve layers, float32).
_TOLERANCE = 1e-3
# Gradients that are zero except for rounding are compared relative to this share of the largest gradient.
_FLOOR = 1e-2
_COMPARED_WITH = {
    "vanilla": None,
    "topk": "eager attention, with k >= L: loss and all gradients",
    **dict.fromkeys(RANDOM, "the same random features, every weight written out: loss and all gradients"),
}


def check(point: Point) -> Json:
    """Compare the loss and all gradients of a point's method with those of eager attention, weights and input equal.

    Random features estimate something else. They are compared with the same features written out, with all weights in
    memory.

    Top-k attention is compared twice: with k >= L (loss and gradients of the original), and with k < L (loss of the
    reference backend).

    Returns the settings of the check and the largest errors, as fractions.

    Raises:
        CheckFailedError: the results differ by more than rounding.
    """
    small = replace(
        point,
        length=min(point.length, _LENGTH),
        decoder_length=min(point.decoder_length, _DECODER_LENGTH),
        k=min(point.k, _K),
        dropout_p=0.0,
        dtype="float32",
        # By name: "auto" would leave k >= L to PyTorch's attention.
        backend=point.backend_name or point.backend,
    )
    result: Json = {"length": small.length, "dtype": small.dtype, "dropout_p": small.dropout_p}
    model = new_model(small, "eager", smooth=True)
    if names_of_relu(new_config(small)):
        result["activation"] = "GELU in place of ReLU"
    inputs = new_inputs(small, model)
    if point.method in RANDOM:
        use_method(model, small)
        model.set_attn_implementation(WRITTEN_OUT)
    loss, gradients = _loss_and_gradients(model, inputs)
    result["compared_with"] = _COMPARED_WITH.get(point.method, "eager attention: loss and all gradients")
    if point.method != "vanilla":  # eager attention itself only warms up, so that it starts as warm as the others
        use_method(model, _keeping_everything(small))
        own_loss, own_gradients = _loss_and_gradients(model, inputs)
        result["loss_error"] = _loss_error(own_loss, loss)
        result["gradient_error"] = _gradient_error(own_gradients, gradients)
    if point.method == "topk":
        result |= _below_length(model, inputs, small)
    for name, error in result.items():
        if "error" in name and not error <= _TOLERANCE:
            raise CheckFailedError(f"{small}: {name} is {error:.1e} ({result})")
    return result


def _keeping_everything(point: Point) -> Point:
    """The same point with k of every key and neuron; a feed-forward k of None or "all" stays."""
    feed_forward_k = _EVERY_NEURON if isinstance(point.feed_forward_k, int) else point.feed_forward_k
    return replace(point, k=max(point.length, point.decoder_length), feed_forward_k=feed_forward_k)


def _below_length(model: Any, inputs: Mapping[str, Tensor], point: Point) -> Json:
    """Compare the loss of top-k attention with k < L on the point's backend and on the reference backend."""
    losses = []
    for backend in (point.backend, "reference"):
        use_method(model, replace(point, backend=backend))
        losses.append(model(**inputs).loss.item())
    return {
        "k": point.k,
        "compared_with_below_length": "the reference backend, with this k: loss",
        "loss_error_below_length": _loss_error(*losses),
    }


def _loss_and_gradients(model: Any, inputs: Mapping[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = model(**inputs).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _loss_error(loss: float, truth: float) -> float:
    return abs(loss - truth) / abs(truth)


def _gradient_error(gradients: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> float:
    """The largest difference in any gradient, as a fraction of its largest entry."""
    if gradients.keys() != truth.keys():
        raise CheckFailedError(f"other parameters get a gradient: {sorted(gradients.keys() ^ truth.keys())}")
    largest = {name: gradient.abs().max().item() for name, gradient in truth.items()}
    floor = _FLOOR * max(largest.values())
    return max(
        (gradients[name] - gradient).abs().max().item() / max(largest[name], floor) for name, gradient in truth.items()
    )
