"""Networks of a mixture of experts: each token is computed by the few that it is routed to.

E experts, T tokens, S pairs of a token and an expert, D model size, F neurons of an expert, O output size
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.activations import Cut
from ..backends.calls import accumulation_dtype
from ..functional import topk_feed_forward


class ExpertWeights(NamedTuple):
    """The weights of all experts, as views of the parameters that hold them.

    w_out    [E, O, F]
    gate_in  [E, 2, F, D]  the gate's weights and the others, where one parameter holds both; otherwise these two:
    w_in     [E, F, D]
    w_gate   [E, F, D]  None where the experts have no gate
    b_gate_in, b_in, b_gate, b_out  likewise, without the last axis
    """

    w_out: Tensor
    gate_in: Tensor | None = None
    w_in: Tensor | None = None
    w_gate: Tensor | None = None
    b_gate_in: Tensor | None = None
    b_in: Tensor | None = None
    b_gate: Tensor | None = None
    b_out: Tensor | None = None

    @property
    def size_in(self) -> int:
        first = self.w_in if self.gate_in is None else self.gate_in
        assert first is not None
        return first.shape[-1]


class Routing(NamedTuple):
    """Which experts compute which tokens.

    tokens   [S] int64, those of the first expert first
    weights  [S]  factors on what the experts give, or None
    counts   how many of the S belong to each expert
    """

    tokens: Tensor
    weights: Tensor | None
    counts: Sequence[int]


def routing_of(experts: Tensor, weights: Tensor, num_experts: int) -> Routing:
    """The routing of tokens to experts [T, K], with weights [T, K]; tokens of higher numbers come last."""
    experts = experts.flatten()
    order = experts.argsort(stable=True)
    counts = torch.bincount(experts, minlength=num_experts).tolist()
    return Routing(order // weights.shape[-1], weights.flatten().index_select(0, order), counts)


@torch.compiler.disable  # how many tokens an expert gets is a different number in every call
def sum_of_experts(
    x: Tensor,
    routing: Routing,
    experts: ExpertWeights,
    *,
    k: int | None,
    activation: str,
    cut: Cut,
    backend: str,
    finish: Callable[[Tensor], Tensor] | None = None,
    beyond: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """What the experts give for tokens x [T, D], each token with the k best neurons of each of its experts: [T, O].

    finish  what is done to an expert's output before its weights
    beyond  what computes the tokens of experts whose numbers are beyond the weights; None leaves these out
    """
    num_experts, size_out, _ = experts.w_out.shape
    each = ExpertWeights(*map(_each, experts))  # type: ignore[arg-type]
    output = x.new_zeros(x.shape[0], size_out, dtype=accumulation_dtype(x.dtype))
    first = 0
    for expert, count in enumerate(routing.counts):
        part = slice(first, first + count)
        first += count
        if count == 0 or (expert >= num_experts and beyond is None):
            continue
        tokens = routing.tokens[part]
        rows = x.index_select(0, tokens)
        if expert < num_experts:
            result = _network(rows, each, expert, k, activation, cut, backend)
            result = result if finish is None else finish(result)
        else:
            assert beyond is not None
            result = beyond(rows)
        result = result.to(output.dtype)
        if routing.weights is not None:
            result = result * routing.weights[part].unsqueeze(1)
        output.index_add_(0, tokens, result.to(output.dtype))
    return output.to(x.dtype)


def _network(
    rows: Tensor, each: ExpertWeights, expert: int, k: int | None, activation: str, cut: Cut, backend: str
) -> Tensor:
    def of(stack: Tensor | None) -> Tensor | None:
        return None if stack is None else stack[expert]

    w_gate, w_in = (of(each.w_gate), of(each.w_in)) if each.gate_in is None else each.gate_in[expert].unbind()
    b_gate, b_in = (of(each.b_gate), of(each.b_in)) if each.b_gate_in is None else each.b_gate_in[expert].unbind()
    assert w_in is not None
    return topk_feed_forward(
        rows,
        w_in,
        each.w_out[expert],
        k=k,
        w_gate=w_gate,
        b_in=b_in,
        b_gate=b_gate,
        b_out=of(each.b_out),
        activation=activation,
        gate_limit=cut.limit,
        in_offset=cut.offset,
        backend=backend,
    )


def _each(stack: Tensor | None) -> Tensor | Sequence[Tensor] | None:
    """What an expert's number picks its weights from. Picked from the stack itself, the gradient of each expert would
    be one of all of them."""
    if stack is None or not (torch.is_grad_enabled() and stack.requires_grad):
        return stack
    return stack.unbind()
