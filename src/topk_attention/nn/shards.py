"""Feed-forward networks whose layers are cut over several processes by transformers' tensor parallelism.

The first layers hold some of the neurons, and the last one what it reads of these. A forward method that transformers
puts into each layer hands its input and output to the others; a top-k network reads the weights and does that itself.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..functional.feed_forward_shard import NEVER_SILENT, topk_feed_forward_of_shard
from .linears import full_name, halves, is_conv1d, is_plain_linear

_CUT_FORWARD = ("transformers.distributed.tensor_parallel", "TensorParallelLayer.install_forward.<locals>.tp_forward")


class Cut(NamedTuple):
    """How the neurons of a network are dealt out.

    group         the processes that hold the network
    num_neurons   those of all processes
    most_neurons  the most that one of them holds
    """

    group: Any
    num_neurons: int
    most_neurons: int


def is_cut(linear: Any) -> bool:
    """Whether other processes hold parts of this layer while it runs.

    The weights of fully sharded data parallelism are whole whenever the layer runs. Those of tensor parallelism are
    not, and the layer calls the other processes in a forward or hooks of its own.
    """
    if _axis_of_cut(linear) is None or is_fully_sharded(linear):
        return False
    return "forward" in vars(linear) or bool(linear._forward_pre_hooks) or bool(linear._forward_hooks)


def is_fully_sharded(module: object) -> bool:
    """Whether this module by itself has been given to torch's `fully_shard`."""
    return any(
        kind.__name__ == "FSDPModule" and kind.__module__.startswith("torch.distributed")
        for kind in type(module).__mro__
    )


def cut_of(linear_in: Any, linear_out: Any, linear_gate: Any = None) -> Cut | str | None:
    """How a network is cut over processes; None where it is whole, and a reason where its parts are no neurons each."""
    layers = {"first": linear_in, "last": linear_out, "gate's": linear_gate}
    layers = {name: linear for name, linear in layers.items() if linear is not None}
    if not any(map(is_cut, layers.values())):
        return None
    for name, linear in layers.items():
        if _axis_of_cut(linear) != (1 if name == "last" else 0):
            return f"its {name} layer is not cut by neurons"
        if not is_plain_linear(linear) or is_conv1d(linear):
            return f"its {name} layer is {full_name(type(linear))}, not nn.Linear"
        forward = vars(linear).get("forward")
        if (getattr(forward, "__module__", ""), getattr(forward, "__qualname__", "")) != _CUT_FORWARD:
            return f"its {name} layer is not cut by transformers' own tensor parallelism"
        if any(hooks for kind, hooks in vars(linear).items() if kind.endswith(("ward_hooks", "ward_pre_hooks"))):
            return f"its {name} layer has a hook"
    mesh, axis = linear_out.weight.device_mesh, _axis_of_mesh(linear_out.weight)
    if any((of.weight.device_mesh, _axis_of_mesh(of.weight)) != (mesh, axis) for of in layers.values()):
        return "its layers are cut over different processes"
    num_neurons, num_processes = linear_out.weight.shape[1], mesh.size(axis)
    is_strided = hasattr(linear_in.weight.placements[axis], "split_factor")
    if is_strided != (linear_in.weight.shape[0] == 2 * num_neurons):
        return "its first layer, gate and up in one matrix, is not cut by neurons: some hold gates, others the rest"
    most_neurons = -(-num_neurons // num_processes)
    if num_neurons <= most_neurons * (num_processes - 1):
        return f"one of {num_processes} processes holds none of its {num_neurons} neurons"
    return Cut(mesh.get_group(axis), num_neurons, most_neurons)


def why_not_in_parts(activation: str | None, dropout_p: float) -> str | None:
    """Why a network that is cut over processes has no top-k form, whatever its layers; None where it has."""
    if activation in NEVER_SILENT:
        return f"with the activation {activation!r} a neuron is never silent"
    return None if dropout_p == 0 else "each process would drop its neurons by a draw of its own"


def _axis_of_cut(linear: Any) -> int | None:
    """The axis of the weight of which each process has a part."""
    weight = getattr(linear, "weight", None)
    axis = _axis_of_mesh(weight)
    return None if weight is None or axis is None else int(weight.placements[axis].dim) % weight.ndim


def _axis_of_mesh(weight: Any) -> int | None:
    """The axis of the mesh of processes along which a weight is cut: the last one of several."""
    placements = getattr(weight, "placements", None) or ()
    axes = [axis for axis, placement in enumerate(placements) if hasattr(placement, "dim")]
    return axes[-1] if axes else None


def network_of_shards(
    x: Tensor,
    cut: Cut,
    linear_in: Any,
    linear_out: Any,
    linear_gate: Any = None,
    *,
    k: int | None,
    activation: str,
    backend: str,
    gate_rows: Literal["first", "last"] | None = None,
) -> Tensor:
    """The output of a network of which each process holds some neurons: the same on all of them."""
    w_in, b_in = _own(linear_in.weight), _own(linear_in.bias)
    w_gate, b_gate = (None, None) if linear_gate is None else (_own(linear_gate.weight), _own(linear_gate.bias))
    if gate_rows is not None:
        w_gate, w_in = halves(w_in, gate_rows)
        b_gate, b_in = (None, None) if b_in is None else halves(b_in, gate_rows)
    part = topk_feed_forward_of_shard(
        _GradientsAddedUp.apply(x, cut.group),
        w_in,
        _own(linear_out.weight),
        k=k,
        group=cut.group,
        num_neurons=cut.num_neurons,
        most_neurons=cut.most_neurons,
        w_gate=w_gate,
        b_in=b_in,
        b_gate=b_gate,
        activation=activation,
        backend=backend,
    )
    output: Tensor = _AddedUp.apply(part, cut.group)
    b_out = _own(linear_out.bias)
    return output if b_out is None else output + b_out.to(output.dtype)


def _own(tensor: Any) -> Any:
    """This process's part of a weight or bias."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class _AddedUp(torch.autograd.Function):
    """What all processes give, added up; each goes on with the same, so the gradient is there on all of them."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Any) -> Tensor:
        whole = part.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(whole, group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Any:
        return grad[0], None


class _GradientsAddedUp(torch.autograd.Function):
    """A tensor that all processes have and use in part: its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Any:
        added = grad[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(added, group=ctx.group)
        return added, None
