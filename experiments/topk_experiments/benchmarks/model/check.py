"""Whether a method computes what it is timed for: whole models at a short length, without dropout, in float32."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from topk_attention.convert import unconvert

from ...runs.checking import CheckFailedError
from ...runs.records import Json
from .methods import use_library
from .points import ALL, RANDOM, Point
from .random_features import NAME, WRITTEN_OUT, use_random_features
from .shapes import is_smoothed, new_inputs, new_model

# Long enough that k leaves most keys out, short enough that the check costs seconds.
_LENGTH = 96
_DECODER_LENGTH = 16
_K = 24
_EVERY_NEURON = 2**31 - 1
# Of the loss, and of a gradient's largest entry. Rounding gives up to a tenth of it (twelve layers, float32).
_TOLERANCE = 1e-3
# Some gradients are zero but for rounding: those are held against this share of the largest of all.
_FLOOR = 1e-2


def check(point: Point) -> Json:
    """Compare loss and gradients of a point's method with those of eager attention, the same weights and input.

    Random features estimate something else: those are compared with the same features written out, all weights in
    memory.

    Top-k attention is compared twice: with k >= L (loss and gradients of the original), and with k < L (loss of the
    reference backend).

    Returns the settings of the check and the largest errors, as fractions.

    Raises:
        CheckFailedError: they differ by more than rounding.
    """
    small = replace(
        point,
        length=min(point.length, _LENGTH),
        decoder_length=min(point.decoder_length, _DECODER_LENGTH),
        k=min(point.k, _K),
        dropout_p=0.0,
        dtype="float32",
    )
    settings: Json = {"length": small.length, "dtype": small.dtype, "dropout_p": small.dropout_p}
    model = new_model(small, "eager", smooth=True)
    if is_smoothed(small):
        settings["activation"] = "GELU in place of ReLU"
    inputs = new_inputs(small, model)
    if point.method in RANDOM:
        use_random_features(model, small)
        model.set_attn_implementation(WRITTEN_OUT)
    loss, gradients = _loss_and_gradients(model, inputs)
    if point.method == "vanilla":  # nothing to compare, but as warm as the others when its steps are timed
        del model, gradients
        gc.collect()
        return settings | {"compared_with": None}
    compared: Json = {"compared_with": "eager attention: loss and all gradients"}
    if point.method == "sdpa":
        model.set_attn_implementation("sdpa")
    elif point.method in RANDOM:
        model.set_attn_implementation(NAME)
        compared["compared_with"] = "the same random features, every weight written out: loss and all gradients"
    elif point.method == "query-chunks":
        use_library(model, ALL, None if point.feed_forward_k is None else ALL, backend="chunked")
    else:
        # By name: "auto" would leave k >= L to PyTorch's attention.
        backend = str(point.backend_name)
        every_neuron = _EVERY_NEURON if isinstance(point.feed_forward_k, int) else point.feed_forward_k
        use_library(model, max(small.length, small.decoder_length), every_neuron, backend=backend)
    own_loss, own_gradients = _loss_and_gradients(model, inputs)
    compared |= {"loss_error": _loss_error(own_loss, loss), "gradient_error": _gradient_error(own_gradients, gradients)}
    if point.method == "topk":
        compared["compared_with"] = "eager attention, with k >= L: loss and all gradients"
        losses = {}
        for name in (backend, "reference"):
            use_library(model, small.k, point.feed_forward_k, backend=name)
            losses[name] = model(**inputs).loss.item()
        unconvert(model)
        compared |= {
            "k": small.k,
            "compared_with_below_length": "the reference backend, with this k: loss",
            "loss_error_below_length": _loss_error(losses[backend], losses["reference"]),
        }
    for name, error in compared.items():
        if "error" in name and not error <= _TOLERANCE:
            raise CheckFailedError(f"{small}: {name} is {error:.1e} ({compared})")
    del model
    gc.collect()
    return settings | compared


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
