"""Time of methods that take turns, so that whatever else the machine does affects them all alike."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import CheckFailedError
from .memory import PeakMeter, ran_out_of_memory
from .process import Send
from .records import Json
from .steps import Times, measure_step, start_point

MODES = ("forward", "forward_backward")
# Of a difference from the truth, as a fraction of its tensor's largest entry. In bfloat16, with 8 bits, PyTorch's own
# attention was off by 0.008.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
_FEWEST_ROUNDS = 3
# Calls of a turn together take at least this long: a single one of a millisecond would be mostly noise.
_TURN_S = 0.02

Tensors = tuple[Tensor, ...]
Turn = tuple[str, str]  # method, mode
_FLOOR: Turn = ("", "")


def leaves(tensors: Tensors) -> Tensors:
    """The same tensors, each requiring a gradient."""
    return tuple(tensor.detach().requires_grad_() for tensor in tensors)


class Method(NamedTuple):
    """A method, ready to compute one work.

    run     of the tensors that `stored` returns -> output
    stored  inputs and weights as the method wants them, from those of the work; all require a gradient
    truth   of the same tensors in float64 -> the right output; None: the operation's reference computes it
    """

    run: Callable[..., Tensor]
    stored: Callable[[Tensors], Tensors] = leaves
    truth: Callable[..., Tensor] | None = None


class Operation(NamedTuple):
    """What is timed: all that a process that measures needs to know of it. A request names the module that holds it.

    new_work    from the fields of a record
    new_point   from the fields of a point: a work with its method, device and mode
    new_method  (name, work) -> the method
    new_inputs  work -> random inputs and weights; the first has the shape of the output
    floor       (work, inputs) -> one call of the part that no method avoids
    tiny        fields of a work and their largest sizes in a pass that loads what a method needs

    For the check of an answer:
    small        (name, work) -> the same at a small size; None for an approximation, which is not checked
    reference    (name, work) -> what computes the right output from the tensors of a method
    is_clear     (name, work, tensors) -> 0 for rows that depend on a near-tie, otherwise 1
    input_names  work -> what errors call the tensors
    least_scale  work -> a tensor whose largest entry is below this share of the largest of all is compared at that
                 share: a gradient that is zero apart from rounding has no scale of its own
    """

    new_work: Callable[..., Any]
    new_point: Callable[..., Any]
    new_method: Callable[[str, Any], Method]
    new_inputs: Callable[[Any], Tensors]
    floor: Callable[[Any, Tensors], Callable[[], object]]
    tiny: Mapping[str, int]
    small: Callable[[str, Any], Any]
    reference: Callable[[str, Any], Callable[..., Tensor]]
    is_clear: Callable[[str, Any, Tensors], Tensor | float]
    input_names: Callable[[Any], Sequence[str]]
    least_scale: Callable[[Any], float] = lambda _: 0.0


def at_most(work: Any, sizes: Mapping[str, int]) -> Any:
    """The same work with no field above these sizes."""
    return replace(work, **{name: min(size, getattr(work, name)) for name, size in sizes.items()})


def check(operation: Operation, name: str, work: Any, seed: int = 0) -> float | None:
    """Compare output and all gradients of a method with the truth in float64, at a small size.

    Returns the largest difference as a fraction of its tensor's largest entry; None for an approximation.

    Raises:
        CheckFailedError: they differ by more than rounding.
    """
    small = operation.small(name, work)
    if small is None:
        return None
    torch.manual_seed(seed)
    method = operation.new_method(name, small)
    tensors = method.stored(operation.new_inputs(small))
    exact = tuple(tensor.detach().double().requires_grad_() for tensor in tensors)
    is_clear = operation.is_clear(name, small, tensors)
    output_gradient = torch.randn(exact[0].shape, dtype=torch.float64) * is_clear
    output_gradient = output_gradient.to(tensors[0].dtype).double()

    def results(function: Callable[..., Tensor], inputs: Tensors) -> list[Tensor]:
        torch.manual_seed(seed)
        output = function(*inputs)
        gradients = torch.autograd.grad(output, inputs, output_gradient.to(output.dtype))
        return [output.detach() * (output_gradient != 0), *gradients]

    expected, found = results(method.truth or operation.reference(name, small), exact), results(method.run, tensors)
    scales = [tensor.abs().max().item() for tensor in expected]
    least = operation.least_scale(small) * max(scales)
    names = ("output", *(f"gradient of {tensor}" for tensor in operation.input_names(small)))
    largest = 0.0
    for tensor, right, result, scale in zip(names, expected, found, scales, strict=False):
        error = (result - right).abs().max().item() / (max(scale, least) or 1.0)
        if not error <= TOLERANCES[tensors[0].dtype]:
            raise CheckFailedError(
                f"{name}, {small}: the {tensor} differs from the float64 reference by {error:.1e} of its largest entry"
            )
        largest = max(largest, error)
    return largest


def _started(request: Json) -> Operation:
    """OPERATION of the module that a request names, in a process that is set as the request asks."""
    start_point(request)
    return importlib.import_module(request["operation"]).OPERATION


def step(mode: str, run: Callable[..., Tensor], tensors: Tensors, output_gradient: Tensor) -> Callable[[], object]:
    """One call in a mode; gradients are made anew and dropped."""

    def forward() -> None:
        with torch.no_grad():
            run(*tensors)

    def forward_backward() -> None:
        torch.autograd.grad(run(*tensors), tensors, output_gradient, allow_unused=True)

    return forward if mode == "forward" else forward_backward


def time_methods(request: Json, send: Send) -> Json:
    """Check each method of a work, then time all of them and the floor in turns.

    Returns for each method its outcome and for each mode median, fastest and slowest, and the same of the floor alone.
    """
    operation = _started(request)
    work, seed = operation.new_work(**request["work"]), request["seed"]
    checks = {name: check(operation, name, work, seed) for name in request["methods"]}
    torch.manual_seed(seed)
    inputs = operation.new_inputs(work)
    output_gradient = torch.randn(inputs[0].shape).to(inputs[0].dtype)
    methods = {name: operation.new_method(name, work) for name in request["methods"]}
    # Methods that store the tensors alike share them.
    stored = {method.stored: method.stored(inputs) for method in methods.values()}
    turns: dict[Turn, Callable[[], object]] = {_FLOOR: operation.floor(work, inputs)}
    for mode in MODES:
        for name, method in methods.items():
            turns[name, mode] = step(mode, method.run, stored[method.stored], output_gradient)
    times, failures = take_turns(turns, request, send)

    def summary(turn: Turn) -> Json:
        record = times[turn].as_record()
        spread = {"fastest_s": record["fastest_s"], "slowest_s": record["slowest_s"]}
        return {"median_s": record["elapsed_s"], **spread, "calls_per_round": times[turn].calls}

    outcomes: Json = {name: {"outcome": "out of memory", "message": message} for name, message in failures.items()}
    for name in methods.keys() - failures.keys():
        outcomes[name] = {"outcome": "finished", "largest_error_in_check": checks[name]}
        outcomes[name] |= {mode: summary((name, mode)) for mode in MODES}
    busy = [of_turn.other_cores for of_turn in times.values() if of_turn.other_cores is not None]
    return {
        "methods": {name: outcomes[name] for name in methods},
        "floor": summary(_FLOOR),
        "rounds": times[_FLOOR].as_record()["repetitions"],
        "other_cores": max(busy, default=None),
    }


def take_turns(
    turns: Mapping[Turn, Callable[[], object]], request: Json, send: Send
) -> tuple[dict[Turn, Times], dict[str, str]]:
    """Warm all methods up, then time them in turn, round after round.

    turns    one call of each method in each mode
    request  repetitions: rounds; fewer where they would take longer than `enough_s` together, but three at least

    Returns their times, and method -> message of those that ran out of memory: they are left out from then on.
    """
    failures: dict[str, str] = {}

    def one_round(times: Mapping[Turn, Times]) -> None:
        for (method, mode), run in turns.items():
            if method in failures:
                continue
            try:
                times[method, mode].take(run)
            except (RuntimeError, MemoryError) as error:
                if not ran_out_of_memory(error):
                    raise
                failures[method] = str(error).strip() or type(error).__name__

    warm_up = {turn: Times("cpu") for turn in turns}
    one_round(warm_up)
    times = {turn: Times("cpu", calls=math.ceil(_TURN_S / (once.seconds or _TURN_S))) for turn, once in warm_up.items()}
    round_s = sum(times[turn].calls * once.seconds for turn, once in warm_up.items())
    rounds = min(request["repetitions"], max(_FEWEST_ROUNDS, int(request["enough_s"] / round_s)))
    for number in range(1, rounds + 1):
        send({"doing": f"round {number} of {rounds}"})
        one_round(times)
    return times, failures


def measure_memory(request: Json, send: Send) -> Json:
    """Peak memory of a method's first forward and backward pass, beyond its tensors and the weights' gradients.

    Inputs, weights and the gradient of the output exist, and have been written to, before the first pass. The weights'
    gradients are allocated during it, and their size is subtracted; output, gradients of the inputs and everything
    between count. A layer with weights has a second pass, in which new gradients are added to those of the first:
    autograd holds what it adds, a second gradient of a weight, until it has been added. A tiny pass before the first
    loads what the method needs.
    """
    operation = _started(request)
    work = operation.new_work(**request["work"])
    torch.manual_seed(request["seed"])
    for sized in (at_most(work, operation.tiny), work):
        method = operation.new_method(request["method"], sized)
        tensors = method.stored(operation.new_inputs(sized))
        output_gradient = torch.randn(tensors[0].shape).to(tensors[0].dtype)
        with PeakMeter() as meter:
            method.run(*tensors).backward(output_gradient)
    memory = meter.read()
    record = memory.as_record() | {"peak_mib": memory.peak_mib - work.gradients_mib}
    if not work.gradients_mib:
        return record
    tensors[0].grad = None
    with PeakMeter() as second:
        method.run(*tensors).backward(output_gradient)
    return record | {"gradients_mib": work.gradients_mib, "peak_of_second_pass_mib": second.read().peak_mib}


def measure_point(request: Json, send: Send) -> Json:
    """Check one method at one work, then measure memory and time of its steps.

    In mode "forward" its tensors exist before; in mode "forward_backward" they count as memory, with all gradients.
    """
    operation = _started(request)
    point = operation.new_point(**request["point"])
    with torch.device(point.device):
        largest_error = check(operation, point.method, point, point.seed)  # also the warm-up, at a tiny size

        def new_step() -> Callable[[], object]:
            method = operation.new_method(point.method, point)
            tensors = method.stored(operation.new_inputs(point))
            return step(point.mode, method.run, tensors, torch.randn(tensors[0].shape))

        if point.mode == "forward":
            ready = new_step()
            result = measure_step(lambda: ready, point.device, request, send)
        else:
            result = measure_step(new_step, point.device, request, send)
    return result | {"largest_error_in_check": largest_error}
