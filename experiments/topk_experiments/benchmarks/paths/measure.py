"""One way and method in a process of its own: the peak of memory at every length, forward and training step."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from topk_attention import convert

from ...runs.checks import CheckFailedError
from ...runs.memory import PeakMeter, ran_out_of_memory
from ...runs.process import Send
from ...runs.records import Json
from ...runs.steps import start_point
from .works import ATTENTION_K, NEURONS_SHARE, PATHS, Path, inputs, new_model

MODES = ("forward", "training")
_CHECKED = 48
_ALLOWED = 1e-4
# Gradients that are zero apart from rounding, such as those of biases of keys, are below this share of the largest.
_NEGLIGIBLE = 1e-3


def measure_path(request: Json, send: Send) -> Json:
    """Check top-k with everything kept against the model's own code, then measure the method.

    request  path, method, lengths, threads, seed and memory_limit_gib

    Returns a point for each length and mode: its outcome, peak_mib and cpu_s.
    """
    start_point(request)
    path, longest = PATHS[request["path"]], max(request["lengths"])
    send({"doing": "checking the answer"})
    error = check(path, longest)
    model = prepared(new_model(path, longest), path, request["method"])
    for mode in MODES:  # what is loaded on the way, and the gradients of weights, are there before
        _step(model, inputs(path, _CHECKED), mode)
    points: list[Json] = []
    for mode in MODES:
        fits = True
        for length in sorted(request["lengths"]):
            send({"doing": f"{mode}, {length:,} tokens"})
            point: Json = {"mode": mode, "length": length, "outcome": "out of memory"}
            if fits:
                point |= _measured(model, inputs(path, length), mode)
            fits = point["outcome"] == "finished"
            points.append(point)
    return {"points": points, "largest_error_in_check": error}


def _measured(model: Any, given: dict[str, Tensor], mode: str) -> Json:
    begun = time.process_time()
    try:
        with PeakMeter() as meter:
            _step(model, given, mode)
    except (RuntimeError, MemoryError) as error:
        if not ran_out_of_memory(error):
            raise
        return {"outcome": "out of memory"}
    return {"outcome": "finished", "peak_mib": meter.read().peak_mib, "cpu_s": time.process_time() - begun}


def prepared(model: Any, path: Path, method: str, *, everything: bool = False) -> Any:
    """Converted, or with the rival's attention; `everything` keeps all keys and neurons."""
    if method != "top-k":
        model.set_attn_implementation(path.rival)
        return model
    neurons: Any = None
    if path.networks:
        neurons = "all" if everything else model.config.intermediate_size // NEURONS_SHARE
    convert(model, attention_k="all" if everything else ATTENTION_K, feed_forward_k=neurons)
    return model


def _step(model: Any, given: dict[str, Tensor], mode: str) -> Tensor:
    with torch.set_grad_enabled(mode == "training"):
        output = model(**given)[0]
        if mode == "training":
            # Weighted, as a mean of squares would hardly change through a final norm.
            (output * torch.arange(output.shape[-1]).cos()).mean().backward()
    return output.detach()


def check(path: Path, longest: int) -> float:
    """The largest difference of output and gradients with all keys and neurons from the model's own code, as a share
    of their tensor's largest entry; of tensors that are rounding beside the others, as a share of theirs.

    Raises:
        CheckFailedError: it is more than rounding.
    """
    results = []
    for method in ("dense", "top-k"):
        torch.manual_seed(0)
        model = prepared(new_model(path, longest), path, method, everything=True)
        output = _step(model, inputs(path, _CHECKED), "training")
        gradients = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
        results.append({"output": output} | gradients)
    right, found = results
    if right.keys() != found.keys():
        raise CheckFailedError(f"{path.label}: other parameters have gradients, {sorted(right.keys() ^ found.keys())}")
    least = _NEGLIGIBLE * max(one.abs().max().item() for name, one in right.items() if name != "output")
    largest = 0.0
    for name, one in right.items():
        error = (found[name] - one).abs().max().item() / max(one.abs().max().item(), least)
        if not error <= _ALLOWED:
            what = name if name == "output" else f"gradient of {name}"
            raise CheckFailedError(f"{path.label}: with all keys the {what} is off by {error:.1e} of its largest entry")
        largest = max(largest, error)
    return largest
