"""Networks of a mixture of experts: each token is computed by the few that it is routed to.

E experts, T tokens, S pairs of a token and an expert, D model size, F neurons of an expert, O output size
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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
    each = ExpertWeights(**{name: _each(name, stack) for name, stack in experts._asdict().items()})
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

    w_gate, w_in = (of(each.w_gate), of(each.w_in)) if each.gate_in is None else each.gate_in[expert]
    b_gate, b_in = (of(each.b_gate), of(each.b_in)) if each.b_gate_in is None else each.b_gate_in[expert]
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


def _each(name: str, stack: Tensor | None) -> Any:
    """What an expert's number picks its weights from: itself, or the gate's and the others."""
    if stack is None or not (torch.is_grad_enabled() and stack.requires_grad):
        return stack
    return _Picked(stack, 2 if name.endswith("gate_in") else 1)


class _Picked:
    """Picks experts from a stack whose gradient comes into being once.

    Picked from the stack itself, the gradient of each expert would be one of all of them. The backward pass comes to
    the last expert first. Each writes its gradient into that of the stack as soon as it has it, and its memory serves
    the next one: gradients that wait to be joined take twice the memory of all weights, in new pages, which cost as
    much time as the copy.

    stack  [E, ...], or with two axes that are picked from [E, 2, ...]
    """

    def __init__(self, stack: Tensor, axes: int = 1) -> None:
        self._joint = _Joint(torch.empty_like(stack, device="meta"), axes)
        self._parts: tuple[Tensor, ...] = _Unbound.apply(stack, self._joint)
        self._each = stack.shape[1] if axes == 2 else 1

    def __getitem__(self, expert: int) -> Tensor | tuple[Tensor, ...]:
        first = expert * self._each
        parts = [_Written.apply(self._parts[at], self._joint, at) for at in range(first, first + self._each)]
        return parts[0] if self._joint.axes == 1 else tuple(parts)


class _Joint:
    """The gradient of a stack while its parts are written into it: one for each thread.

    Backward passes in several threads may come to the same stack; on a CPU each stays in the thread of its caller.
    """

    def __init__(self, like: Tensor, axes: int) -> None:
        self.axes = axes
        self._like = like
        self._of_thread: dict[int, tuple[Tensor, ...]] = {}  # the whole, and its parts

    def parts(self) -> tuple[Tensor, ...]:
        """Those of this thread's, which is made where there is none."""
        thread = threading.get_ident()
        if thread not in self._of_thread:
            whole = torch.empty_like(self._like, device="cpu")
            self._of_thread[thread] = whole, *_unbound(whole, self.axes)
        return self._of_thread[thread][1:]

    def take(self) -> tuple[Tensor, ...] | None:
        """This thread's whole and its parts, no longer written to; None where nothing was written."""
        return self._of_thread.pop(threading.get_ident(), None)


def _unbound(stack: Tensor, axes: int) -> tuple[Tensor, ...]:
    parts = stack.unbind()
    return parts if axes == 1 else tuple(half for part in parts for half in part.unbind())


class _Unbound(torch.autograd.Function):
    @staticmethod
    def forward(stack: Tensor, joint: _Joint) -> tuple[Tensor, ...]:
        return _unbound(stack, joint.axes)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        stack, ctx.joint = inputs
        ctx.shape = stack.shape
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None]:
        taken = ctx.joint.take()
        known = next((gradient for gradient in gradients if gradient is not None), None)
        if known is None:
            return None, None
        if taken is None or torch.is_grad_enabled():
            zero = torch.zeros_like(known)
            return torch.stack([zero if one is None else one for one in gradients]).view(ctx.shape), None
        whole, *parts = taken
        for part, gradient in zip(parts, gradients, strict=True):
            if gradient is None:  # of an expert without tokens
                part.zero_()
            elif gradient.data_ptr() != part.data_ptr():
                part.copy_(gradient)
        return whole, None


class _Written(torch.autograd.Function):
    """The same tensor; its gradient is moved into that of the stack."""

    @staticmethod
    def forward(part: Tensor, joint: _Joint, at: int) -> Tensor:
        return part.view_as(part)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, ctx.joint, ctx.at = inputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        if gradient.device.type != "cpu" or torch.is_grad_enabled():
            return gradient, None, None
        part = ctx.joint.parts()[ctx.at]
        return part.copy_(gradient), None, None
