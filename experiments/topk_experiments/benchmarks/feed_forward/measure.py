"""What the processes that measure need to know of feed-forward layers.

The floor is the first product, or for a gated layer the first two.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from topk_attention.backends.activations import activate

from ...rivals.names import kept
from ...runs.checks import NEAR_TIE
from ...runs.turns import Operation, Tensors, at_most
from .methods import new_inputs, new_method, reference
from .works import Point, Work

# At most. Odd, so that kernels meet full blocks and leftovers, and k a sixth of the neurons; few tokens stay few, as
# kernels treat them separately.
_CHECKED = {"tokens": 133, "d_model": 77, "d_ff": 501, "k": 83}
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


@torch.no_grad()
def is_clear(method: str, work: Work, tensors: Tensors) -> Tensor | float:
    """0 for tokens whose k-th best neuron is close to the next, otherwise 1: [T, 1]."""
    x, w_in, _, *w_gate = (tensor.double() for tensor in tensors)
    k = kept(method, work.k)
    if k is None or k >= work.d_ff:
        return 1.0
    ranked_by = F.linear(x, w_in)
    if w_gate:
        ranked_by = (activate(F.linear(x, w_gate[0]), work.activation) * ranked_by).abs()
    best = ranked_by.topk(k + 1).values
    return best[:, k - 1 : k] - best[:, k:] >= NEAR_TIE


OPERATION = Operation(
    Work,
    Point,
    new_method,
    new_inputs,
    first_products,
    tiny={"tokens": 16, "d_model": 32, "d_ff": 64},
    small=lambda _, work: at_most(work, _CHECKED),
    reference=reference,
    is_clear=is_clear,
    input_names=lambda _: ("x", "w_in", "w_out", "w_gate"),
)
