"""The part of a top-k feed-forward network that one of several processes holds: some of its neurons.

The k best neurons of a token are chosen among those of all processes. Each chooses the k best of its own and sends what
they are ranked by; then all know the same k-th best, and each computes with those of its own that reach it. What each
gives has to be added up over the processes, and so have the gradients of x.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..backends import choose_backend
from ..backends.activations import NO_CUT, Cut, activate, gated
from ..backends.autocast import autocast_off, in_autocast_dtype
from ..backends.calls import FeedForwardCall
from ..backends.chunked.selection import select_topk
from ..backends.operators import FeedForwardInputs, differentiate_feed_forward
from .feed_forward import topk_feed_forward

# What is gathered of all processes at a time, in entries.
_GATHERED_ENTRIES = 2**22
# A pre-activation at which every activation but "identity" is zero, and so is its slope.
_SILENT = -1e4
# In a sharded network the dropped neurons have to be silent, which no pre-activation does to these.
NEVER_SILENT = ("identity", "linear")


def topk_feed_forward_of_shard(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    *,
    k: int | None,
    group: dist.ProcessGroup,
    num_neurons: int,
    most_neurons: int,
    w_gate: Tensor | None = None,
    b_in: Tensor | None = None,
    b_gate: Tensor | None = None,
    activation: str = "relu",
    backend: str = "auto",
) -> Tensor:
    """What this process's neurons add to the output of a top-k network, without output bias.

    F neurons of this process, those of the processes before it first

    x             [..., D]  the same on all processes
    w_in, w_gate  [F, D]
    w_out         [O, F]
    k             neurons kept per token, of those of all processes; None for all
    group         the processes that hold the network
    num_neurons   those of all processes
    most_neurons  the most that one of them holds

    Returns [..., O]. Every process of the group has to call this, with as many tokens.
    """
    x, w_in, w_out = in_autocast_dtype(x), in_autocast_dtype(w_in), in_autocast_dtype(w_out)
    w_gate, b_in, b_gate = in_autocast_dtype(w_gate), in_autocast_dtype(b_in), in_autocast_dtype(b_gate)
    if k is None or k >= num_neurons:
        return topk_feed_forward(
            x, w_in, w_out, k=None, w_gate=w_gate, b_in=b_in, b_gate=b_gate, activation=activation, backend=backend
        )
    inputs = FeedForwardInputs(
        *(x.reshape(-1, x.shape[-1]), w_in, w_out, w_gate, b_in, b_gate, None, None),
        *(k, activation, *NO_CUT, 0.0),
    )
    with autocast_off(x.device.type):
        output: Tensor = _OfShard.apply(*inputs, backend, group, most_neurons)
    return output.view(*x.shape[:-1], w_out.shape[0])


class _OfShard(torch.autograd.Function):
    """Takes `FeedForwardInputs` and three inputs more."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        of_call, (backend, group, most_neurons) = FeedForwardInputs(*inputs[:-3]), inputs[-3:]
        call = FeedForwardCall(
            *of_call[:7], of_call.k, of_call.activation, 0.0, None, None, Cut(of_call.limit, of_call.offset)
        )
        name, functions = _functions(backend, call)
        neurons, values, gates = functions.choose_neurons(call)
        hidden = _hidden(call, values, gates)
        kept = _kept_of_all(values if call.w_gate is None else hidden.abs(), of_call.k, group, most_neurons)
        # As if the others were silent: the backward pass of the operators then gives them nothing.
        values = values.where(kept, _SILENT if call.w_gate is None else 0)
        gates = gates if call.w_gate is None else gates.where(kept, 0)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*of_call[:6], None, neurons, values, gates)
        own_options = (None,) if name == "chunked" else ()  # its chunk size
        ctx.options = (call.activation, *call.cut, 0.0, *own_options)
        ctx.has_selection, ctx.num_inputs = True, len(inputs)
        ctx.backend = name, functions.feed_forward_backward_op
        output: Tensor = functions.sum_neurons(call, neurons, hidden.where(kept, 0))
        return output

    @staticmethod
    def backward(ctx: Any, *grad_output: Tensor | None) -> Any:
        return differentiate_feed_forward(*ctx.backend)(ctx, *grad_output)


def _functions(backend: str, call: FeedForwardCall) -> tuple[str, Any]:
    """The backend that runs the call, and its functions."""
    name = choose_backend(backend, call).name
    match name:
        case "cpu":
            from ..backends import cpu

            return name, cpu
        case "chunked":
            from ..backends import chunked

            return name, chunked
    raise ValueError(
        f'backend must be "auto", "cpu" or "chunked" for a network that several processes hold, got {backend!r}'
    )


def _hidden(call: FeedForwardCall, values: Tensor, gates: Tensor) -> Tensor:
    return activate(values, call.activation) if call.w_gate is None else gated(values, gates, call.activation, call.cut)


def _kept_of_all(ranked_by: Tensor, k: int, group: dist.ProcessGroup, most_neurons: int) -> Tensor:
    """Which of this process's candidates are among the k best of all, [T, C]; of equal ones those of the process
    with the lower rank, and there those with the lower index.

    ranked_by  [T, C], the C best neurons of this process in the order of their indices
    """
    num_tokens, num_candidates = ranked_by.shape
    width = min(k, most_neurons)  # that of the process with the most candidates
    rank, num_processes = dist.get_rank(group), dist.get_world_size(group)
    kept = torch.empty_like(ranked_by, dtype=torch.bool)
    tokens_at_a_time = max(1, _GATHERED_ENTRIES // (width * num_processes))
    for first in range(0, num_tokens, tokens_at_a_time):
        part = slice(first, first + tokens_at_a_time)
        own = ranked_by[part].contiguous()
        if num_candidates < width:
            own = F.pad(own, (0, width - num_candidates), value=-torch.inf)
        gathered = [torch.empty_like(own) for _ in range(num_processes)]
        dist.all_gather(gathered, own, group=group)
        of_all = torch.cat(gathered, 1)  # [T, P * C]: what lies further left has the lower index
        best = torch.zeros_like(of_all, dtype=torch.bool).scatter_(1, select_topk(of_all, k)[1], True)
        kept[part] = best[:, rank * width : rank * width + num_candidates]
    return kept
