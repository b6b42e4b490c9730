"""One network in a process of its own: every answer is checked, then the methods take turns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...runs.checks import CheckFailedError
from ...runs.process import Send
from ...runs.records import Json
from ...runs.steps import start_point
from ...runs.turns import take_turns
from .layers import busiest, network_of, new_model, prepared, weights_of
from .works import OURS, Work

_FORWARD, _BOTH = "forward", "forward_backward"
# Of the largest entry. In float64, at a small size; and at the size that is measured, in float32.
_EXACT, _ROUNDED = 1e-8, 1e-4
_SMALL_SIZE, _SMALL_EXPERTS, _SMALL_TOKENS = 48, 4, 19


def measure_network(request: Json, send: Send) -> Json:
    """Check every method of the request, then time all of them in turns, for each number of tokens and mode.

    request  work: fields of `Work`; methods, repetitions, enough_s, threads and seed
    """
    start_point(request)
    work = Work(**request["work"])
    send({"doing": "checking the answers at a small size"})
    checks = {name: check_small(name, work) for name in ("topk-all", *request["methods"])}
    send({"doing": "drawing weights"})
    torch.manual_seed(request["seed"])
    model = new_model(work)
    send({"doing": "checking the answers"})
    largest = check_large(model, work)
    x = torch.randn(1, max(work.tokens), work.d_model)
    runs = []
    for mode in (_FORWARD, _BOTH):
        for tokens in work.tokens:
            if mode == _FORWARD or tokens > 1:
                send({"doing": f"{tokens:,} tokens, {mode.replace('_', ' and ')}"})
                runs.append(_time(model, work, x[:, :tokens], mode, request, send))
    return {
        "runs": runs,
        "largest_error_in_check": {"small": checks, "all neurons": largest},
        "busiest_expert": busiest(model, work, x),
        "weights_gib": work.weights_gib,
        "other_cores": max((run.pop("other_cores") for run in runs), default=None),
    }


def _time(model: Any, work: Work, x: Tensor, mode: str, request: Json, send: Send) -> Json:
    tokens, outcomes = x.shape[1], {}
    turns: dict[tuple[str, str], Callable[[], object]] = {}
    for name in request["methods"]:
        reason = work.why_not(name, tokens, mode)
        outcomes[name] = {"outcome": "left out", "message": reason}
        if reason is None:
            turns[name, mode] = _step(prepared(model, work, name, trains=mode == _BOTH), x, mode)
    times, failures = take_turns(turns, request, send)
    for (name, _), of in times.items():
        record = of.as_record()
        spread = {"fastest_s": record["fastest_s"], "slowest_s": record["slowest_s"]}
        outcomes[name] = {"outcome": "finished", "median_s": record["elapsed_s"], **spread}
    outcomes |= {name: {"outcome": "out of memory", "message": message} for name, message in failures.items()}
    busy = [of.other_cores for of in times.values() if of.other_cores is not None]
    return {"tokens": tokens, "mode": mode, "methods": outcomes, "other_cores": max(busy, default=0.0)}


def _step(model: Any, x: Tensor, mode: str) -> Callable[[], object]:
    """One call; in training with the gradients of the tokens and of all weights, which are made anew and dropped."""
    run, weights = network_of(model), weights_of(model)
    if mode == _FORWARD:
        return torch.no_grad()(lambda: run(x))
    x = x.clone().requires_grad_()
    gradient = torch.ones_like(x)
    return lambda: torch.autograd.grad(run(x), (x, *weights), gradient)


def check_small(method: str, work: Work, seed: int = 0) -> float:
    """Compare a method with the model's own code in float64, output and all gradients, at a small size.

    Top-k with every neuron is compared with the dense network; with fewer, with the reference backend.

    Returns the largest difference as a fraction of its tensor's largest entry.

    Raises:
        CheckFailedError: they differ by more than rounding.
    """
    shrink = max(work.d_model, work.d_ff) // _SMALL_SIZE
    small = replace(work, shrink=work.shrink * max(2, shrink), experts=min(_SMALL_EXPERTS, work.num_experts))
    torch.manual_seed(seed)
    model = new_model(small).double()
    x = torch.randn(1, _SMALL_TOKENS, small.d_model, dtype=torch.float64)
    if method == "grouped_mm":  # which knows no float64
        model, x = model.float(), x.float()

    def results(name: str, backend: str) -> list[Tensor]:
        one = prepared(model, small, name, trains=True, backend=backend)
        mine = x.clone().requires_grad_()
        output = network_of(one)(mine)
        return [output, *torch.autograd.grad(output.square().sum(), (mine, *weights_of(one)))]

    right = results(method, "reference") if method in OURS else results(work.rivals[0], "auto")
    most = _EXACT if x.dtype == torch.float64 else _ROUNDED
    return _largest_error(f"{method}, {small}", results(method, "auto"), right, most)


@torch.no_grad()
def check_large(model: Any, work: Work) -> float:
    """Compare top-k with every neuron, and all dense ways, with the model's own code at the size that is measured."""
    x = torch.randn(1, _SMALL_TOKENS, work.d_model)
    first, *others = [name for name in work.rivals if work.why_not(name, _SMALL_TOKENS, _FORWARD) is None]
    right = network_of(prepared(model, work, first, trains=True))(x)
    largest = 0.0
    for name in (*others, "topk-all"):
        found = network_of(prepared(model, work, name, trains=True))(x)
        largest = max(largest, _largest_error(f"{name}, {work}", [found], [right], _ROUNDED))
    return largest


def _largest_error(what: str, found: list[Tensor], right: list[Tensor], most: float) -> float:
    largest = 0.0
    for number, (one, other) in enumerate(zip(found, right, strict=True)):
        scale = other.abs().max().item() or 1.0
        error = (one - other).abs().max().item() / scale
        if not error <= most:
            name = "output" if number == 0 else f"gradient {number}"
            raise CheckFailedError(f"{what}: the {name} differs from the right one by {error:.1e} of its largest entry")
        largest = max(largest, error)
    return largest
