"""What the processes that measure memory and time need to know of feed-forward layers.

The floor is the first product, or for a gated layer the first two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from ...runs.turns import Operation, Tensors
from .check import check
from .methods import new_inputs, new_method
from .works import Point, Work

_WARM_UP = {"tokens": 16, "d_model": 32, "d_ff": 64}
# The products' results lie in one buffer of at most 8 MiB.
_BLOCK_TOKENS = 512
_BLOCK_NEURONS = 4096


def first_products(work: Work, inputs: Tensors) -> Callable[[], None]:
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


def _tiny(work: Work) -> Work:
    return replace(work, **{name: min(size, getattr(work, name)) for name, size in _WARM_UP.items()})


OPERATION = Operation(Work, Point, new_method, new_inputs, check, first_products, _tiny)
