"""Who computes the layer: this library's backends, PyTorch's dense layer and token chunks."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from topk_attention.backends.activations import activate
from topk_attention.functional import topk_feed_forward

from ...rivals.feed_forward import in_chunks, sparse_topk_feed_forward
from ...rivals.names import TOPK
from ...runs.turns import Operation
from .works import Work

RIVALS = ("dense", "topk-chunked", "token-chunks")
# The paper's own two forms, written out; for layers without a gate.
PAPERS = ("dense-chunks", "topk-torch-sparse")
NAMES = ("x", "w_in", "w_out", "w_gate")


class Method(NamedTuple):
    """An operation on x [T, C], w_in [F, C], w_out [C, F] and, if gated, w_gate [F, C], and how it wants w_out."""

    operation: Operation
    by_neuron: bool

    def stored(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The same tensors, w_out neuron by neuron where `TopKFeedForward` keeps it so; all want a gradient."""
        x, w_in, w_out, *w_gate = inputs
        if self.by_neuron:
            w_out = w_out.detach().t().contiguous().t()
        return tuple(tensor.detach().requires_grad_() for tensor in (x, w_in, w_out, *w_gate))


def why_not(method: str, work: Work) -> str | None:
    """Why a method cannot do a work, None where it can."""
    return "it is written for layers without a gate" if method in PAPERS and work.is_gated else None


def new_method(method: str, work: Work) -> Method:
    """The method, ready for its stored tensors."""
    match method:
        case "dense":
            return Method(functools.partial(_dense, work), by_neuron=False)
        case "token-chunks":
            return Method(functools.partial(run_topk, work, None, "chunked"), by_neuron=False)
        case "dense-chunks":
            return Method(in_chunks(functools.partial(_dense, work), paper_chunk(work.tokens)), by_neuron=False)
        case "topk-torch-sparse":
            sparse = functools.partial(sparse_topk_feed_forward, k=work.k, activation=work.activation)
            return Method(in_chunks(sparse, paper_chunk(work.tokens)), by_neuron=True)
    backend = method.removeprefix(TOPK)
    return Method(functools.partial(run_topk, work, work.k, backend), by_neuron=True)


def paper_chunk(tokens: int) -> int:
    """Tokens of a chunk: the same part of all as the paper's 16,384 of 262,144.

    >>> paper_chunk(4096)
    256
    """
    return max(1, tokens // 16)


def new_inputs(work: Work) -> tuple[Tensor, ...]:
    """x and random weights as nn.Linear holds them, in the order of NAMES; rows of pre-activations have variance 1."""
    weights = [(work.d_ff, work.d_model), (work.d_model, work.d_ff), (work.d_ff, work.d_model)]
    shapes = weights if work.is_gated else weights[:2]
    return torch.randn(work.tokens, work.d_model), *(torch.randn(shape).div_(shape[1] ** 0.5) for shape in shapes)


def run_topk(
    work: Work, k: int | None, backend: str, x: Tensor, w_in: Tensor, w_out: Tensor, w_gate: Tensor | None = None
) -> Tensor:
    """`topk_feed_forward` with the options of the work."""
    return topk_feed_forward(x, w_in, w_out, k=k, w_gate=w_gate, activation=work.activation, backend=backend)


def _dense(work: Work, x: Tensor, w_in: Tensor, w_out: Tensor, w_gate: Tensor | None = None) -> Tensor:
    if w_gate is None:
        return F.linear(activate(F.linear(x, w_in), work.activation), w_out)
    return F.linear(activate(F.linear(x, w_gate), work.activation) * F.linear(x, w_in), w_out)
