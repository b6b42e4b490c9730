"""Activations of feed-forward layers and their derivatives, by the names in transformers' configurations.

Gated layers multiply activation(gate) by their pre-activations; some cut both first, and add a number to the latter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class _Activation(NamedTuple):
    value: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor, Tensor], Tensor]  # (gradient of the value, input) -> gradient of the input


def _gelu(approximate: str) -> _Activation:
    return _Activation(
        lambda z: F.gelu(z, approximate=approximate),
        lambda grad, z: torch.ops.aten.gelu_backward(grad, z, approximate=approximate),
    )


def _quick_gelu_slope(z: Tensor) -> Tensor:
    share = torch.sigmoid(_QUICK * z)
    return share * (1 + _QUICK * z * (1 - share))


_RELU = _Activation(F.relu, lambda grad, z: torch.where(z <= 0, 0, grad))
_SILU = _Activation(F.silu, lambda grad, z: torch.ops.aten.silu_backward(grad, z))
_QUICK = 1.702  # the slope at which a sigmoid comes close to the normal distribution
_QUICK_GELU = _Activation(lambda z: z * torch.sigmoid(_QUICK * z), lambda grad, z: grad * _quick_gelu_slope(z))
_RELU_SQUARED = _Activation(lambda z: F.relu(z).square(), lambda grad, z: grad * 2 * F.relu(z))
_IDENTITY = _Activation(lambda z: z, lambda grad, z: grad)

ACTIVATIONS: dict[str, _Activation] = {
    "relu": _RELU,
    "gelu": _gelu("none"),
    "gelu_tanh": _gelu("tanh"),
    "gelu_new": _gelu("tanh"),
    "gelu_pytorch_tanh": _gelu("tanh"),
    "gelu_fast": _gelu("tanh"),
    "gelu_accurate": _gelu("tanh"),
    "gelu_python_tanh": _gelu("tanh"),
    "gelu_python": _gelu("none"),
    "quick_gelu": _QUICK_GELU,
    "relu2": _RELU_SQUARED,
    "silu": _SILU,
    "swish": _SILU,
    "identity": _IDENTITY,
    "linear": _IDENTITY,
}


def activate(pre_activation: Tensor, name: str) -> Tensor:
    """The activation of this name, element by element."""
    return ACTIVATIONS[name].value(pre_activation)


def activate_backward(grad: Tensor, pre_activation: Tensor, name: str) -> Tensor:
    """The gradient with respect to the pre-activation, given the gradient with respect to the activation."""
    return ACTIVATIONS[name].derivative(grad, pre_activation)


class Cut(NamedTuple):
    """What some gated layers do before they multiply: activation(min(gate, limit)) * (clamp(in, +-limit) + offset).

    limit   None cuts nothing
    offset  added to `in` once it is cut
    """

    limit: float | None = None
    offset: float = 0.0


NO_CUT = Cut()


def gated(values: Tensor, gates: Tensor, activation: str, cut: Cut) -> Tensor:
    """The hidden layer of a gated network, from its pre-activations; the argument itself is never returned."""
    values, gates = _cut(values, gates, cut)
    return activate(gates, activation) * values


def gated_backward(grad: Tensor, values: Tensor, gates: Tensor, activation: str, cut: Cut) -> tuple[Tensor, Tensor]:
    """The gradients with respect to `values` and `gates`, given the gradient with respect to `gated`."""
    uncut_values, uncut_gates = values, gates
    values, gates = _cut(values, gates, cut)
    grad_values = grad * activate(gates, activation)
    grad_gates = activate_backward(grad * values, gates, activation)
    if cut.limit is not None:
        # At the limit itself the gradient passes, as in torch.clamp.
        grad_values = torch.where(uncut_values.abs() > cut.limit, 0, grad_values)
        grad_gates = torch.where(uncut_gates > cut.limit, 0, grad_gates)
    return grad_values, grad_gates


def _cut(values: Tensor, gates: Tensor, cut: Cut) -> tuple[Tensor, Tensor]:
    if cut.limit is not None:
        values, gates = values.clamp(-cut.limit, cut.limit), gates.clamp(max=cut.limit)
    if cut.offset:
        values = values + cut.offset
    return values, gates
