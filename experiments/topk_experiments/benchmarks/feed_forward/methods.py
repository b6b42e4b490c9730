"""Who computes the layer: this library's backends, PyTorch's dense layer, and the paper's own forms.

The floor is the first product, or for a gated layer the first two.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from topk_attention.backends.activations import activate
from topk_attention.functional import topk_feed_forward
from topk_attention.nn.linears import halves

from ...rivals.feed_forward import in_chunks, sparse_topk_feed_forward
from ...rivals.names import TOPK, kept
from ...runs.checks import NEAR_TIE
from ...runs.turns import Method, Operation, Tensors, at_most, leaves
from .works import PAPERS, Point, Work


def why_not(method: str, work: Work) -> str | None:
    """Why a method cannot do a work, None where it can."""
    return "it is written for layers without a gate" if method in PAPERS and work.is_gated else None


def new_method(method: str, work: Work) -> Method:
    """The method, ready for `new_inputs`: x [T, C], w_in [F, C], w_out [C, F] and, if gated, w_gate [F, C].

    Where gate and up are one weight, w_in is [2 F, C], the gate's rows first, and there is no w_gate.
    """
    # In the records of rounds, the dense layer is "dense"; in those of layers it is "vanilla".
    dense = functools.partial(_dense, work)
    match method:
        case "dense" | "vanilla":
            return Method(dense)
        case "token-chunks":
            return Method(functools.partial(_topk, work, None, "chunked"))
        case "dense-chunks" | "vanilla-chunks":
            return Method(in_chunks(dense, paper_chunk(work.tokens)))
        case "topk-torch-sparse":
            sparse = functools.partial(sparse_topk_feed_forward, k=work.k, activation=work.activation)
            return Method(in_chunks(sparse, paper_chunk(work.tokens)), by_neuron)
    return Method(functools.partial(_topk, work, work.k, method.removeprefix(TOPK)), by_neuron)


def reference(method: str, work: Work) -> Callable[..., Tensor]:
    """The right output, by the library's reference backend."""
    return functools.partial(_topk, work, kept(method, work.k), "reference")


def by_neuron(tensors: Tensors) -> Tensors:
    """The same tensors, w_out stored neuron by neuron as `TopKFeedForward` keeps it; all require a gradient."""
    x, w_in, w_out, *w_gate = tensors
    return leaves((x, w_in, w_out.t().contiguous().t(), *w_gate))


def paper_chunk(tokens: int) -> int:
    """Tokens of a chunk: the same part of all as the paper's 16,384 of 262,144.

    >>> paper_chunk(4096)
    256
    """
    return max(1, tokens // 16)


def new_inputs(work: Work) -> Tensors:
    """x, w_in, w_out and w_gate: random weights as nn.Linear holds them; rows of pre-activations have variance 1."""
    weights = [(work.d_ff, work.d_model), (work.d_model, work.d_ff), (work.d_ff, work.d_model)]
    if work.is_fused:
        weights[0] = (2 * work.d_ff, work.d_model)
    shapes = weights if work.is_gated and not work.is_fused else weights[:2]
    return torch.randn(work.tokens, work.d_model), *(torch.randn(shape).div_(shape[1] ** 0.5) for shape in shapes)


def _topk(
    work: Work, k: int | None, backend: str, x: Tensor, w_in: Tensor, w_out: Tensor, w_gate: Tensor | None = None
) -> Tensor:
    """`topk_feed_forward` with the options of the work."""
    if work.is_fused:
        w_gate, w_in = halves(w_in, "first")
    return topk_feed_forward(x, w_in, w_out, k=k, w_gate=w_gate, activation=work.activation, backend=backend)


def _dense(work: Work, x: Tensor, w_in: Tensor, w_out: Tensor, w_gate: Tensor | None = None) -> Tensor:
    if work.is_fused:  # as the models compute it
        gate, up = halves(F.linear(x, w_in), "first", dim=-1)
        return F.linear(activate(gate, work.activation) * up, w_out)
    if w_gate is None:
        return F.linear(activate(F.linear(x, w_in), work.activation), w_out)
    return F.linear(activate(F.linear(x, w_gate), work.activation) * F.linear(x, w_in), w_out)


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
    if work.is_fused:
        gate_rows, w_in = halves(w_in, "first")
        w_gate = [gate_rows]
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
