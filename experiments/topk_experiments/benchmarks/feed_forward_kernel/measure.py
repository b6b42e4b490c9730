"""Time and memory of the methods. Both functions run in a process of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ...runs.memory import PeakMeter
from ...runs.process import Send
from ...runs.records import Json
from ...runs.turns import MODES, memory_record, prepare, step, time_in_turns
from .check import check
from .methods import Method, new_inputs, new_method
from .works import Work

_WARM_UP = {"tokens": 16, "d_model": 32, "d_ff": 64}
# The products' results lie in one buffer of at most 8 MiB.
_BLOCK_TOKENS = 512
_BLOCK_NEURONS = 4096


def time_methods(request: Json, send: Send) -> Json:
    """Check each method of a work, then time all in turn; the floor is the first product, or the first two."""
    prepare(request)
    work = Work(**request["work"])
    checks: dict[str, float | None] = {method: check(method, work, request["seed"]) for method in request["methods"]}
    torch.manual_seed(request["seed"])
    inputs = new_inputs(work)
    output_gradient = torch.randn(inputs[0].shape)
    methods = {name: new_method(name, work) for name in request["methods"]}
    stored = _stored_once(methods, inputs)
    steps = {
        (name, mode): step(mode, method.operation, stored[method.by_neuron], output_gradient)
        for mode in MODES
        for name, method in methods.items()
    }
    return time_in_turns(steps, first_products(work, inputs), checks, request, send)


def measure_memory(request: Json, send: Send) -> Json:
    """Peak memory of a method's first and second forward and backward pass, beyond weights and their gradients.

    Weights, x and the gradient of the output are there and written to before the first pass. The weights' gradients
    come into being in it and their size is taken off; output, gradient of x and all between count. In the second pass
    the weights' gradients are there before and new ones are added to them: autograd holds what it adds, a second
    gradient of a weight, until it has been added. A tiny pass before the first loads what the method needs.
    """
    prepare(request)
    work = Work(**request["work"])
    torch.manual_seed(request["seed"])
    tiny = replace(work, **{name: min(size, getattr(work, name)) for name, size in _WARM_UP.items()})
    for sized in (tiny, work):
        method = new_method(request["method"], sized)
        inputs = method.stored(new_inputs(sized))
        output_gradient = torch.randn(inputs[0].shape)
        with PeakMeter() as first:
            method.operation(*inputs).backward(output_gradient)
        inputs[0].grad = None
        with PeakMeter() as second:
            method.operation(*inputs).backward(output_gradient)
    memory = first.read()
    return memory_record(
        memory._replace(peak_mib=memory.peak_mib - work.gradients_mib),
        gradients_mib=work.gradients_mib,
        peak_of_second_pass_mib=second.read().peak_mib,
    )


def first_products(work: Work, inputs: tuple[Tensor, ...]) -> Callable[[], None]:
    """All pre-activations, which every exact method must look at, block by block into one buffer."""
    x, w_in, _, *w_gate = (tensor.detach() for tensor in inputs)
    buffer = x.new_empty(min(work.tokens, _BLOCK_TOKENS) * min(work.d_ff, _BLOCK_NEURONS))

    def run() -> None:
        for weight in (w_in, *w_gate):
            for neurons in weight.split(_BLOCK_NEURONS):
                for tokens in x.split(_BLOCK_TOKENS):
                    shape = (len(tokens), len(neurons))
                    torch.mm(tokens, neurons.t(), out=buffer[: shape[0] * shape[1]].view(shape))

    return run


def _stored_once(methods: dict[str, Method], inputs: tuple[Tensor, ...]) -> dict[bool, tuple[Tensor, ...]]:
    """by_neuron -> the tensors of all methods that store w_out so."""
    return {method.by_neuron: method.stored(inputs) for method in methods.values()}
