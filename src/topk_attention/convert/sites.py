"""The places in a model that a conversion can change, and what every finder of feed-forward networks checks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.activations import ACTIVATIONS, activate
from ..nn.feed_forward import is_plain_linear, weight_and_bias
from .tensor_parallel import cut_over_processes

# The names that model families use for the activation in their configurations.
_ACTIVATION_NAMES = ("hidden_act", "hidden_activation", "activation_function", "dense_act_fn", "activation")


@dataclass(frozen=True)
class AttentionSite:
    """An attention layer: PyTorch's own, or one that reads its function from transformers' attention interface."""

    path: str
    module: nn.Module
    num_heads: int | None
    obstacle: str | None  # why it cannot be replaced
    reads_interface: bool


@dataclass(frozen=True)
class FeedForwardSite:
    """A feed-forward network and how to replace it."""

    path: str
    module: nn.Module
    num_neurons: int
    obstacle: str | None  # why it cannot be replaced
    replace: Callable[[int | None, str], None]  # takes k (None: all) and a backend; a second call changes them
    restore: Callable[[], None] | None  # None where the network is still the original


def obstacle_of(linears: dict[str, nn.Module], activation: Any, act: Any) -> str | None:
    """Why these layers cannot become a top-k network; None where they can.

    linears     the network's linear layers by name
    activation  the activation's name in the configuration
    act         the function or module that the model calls
    """
    for name, linear in linears.items():
        if not is_plain_linear(linear):
            return f"{name} is {type(linear).__name__}, not nn.Linear"
        if problem := cut_over_processes(linear):
            return f"{name} {problem}"
    if activation not in ACTIVATIONS:
        return f"activation {activation!r} has no top-k form"
    if not is_activation(act, activation):
        return f"its activation, {name_of(act)}, is not {activation!r}, which the configuration names"
    return None


def is_activation(act: Any, name: str) -> bool:
    """Whether a callable is the activation of this name. Its values between -8 and 8 decide."""
    if isinstance(act, nn.Module) and next(act.parameters(), None) is not None:
        return False
    x = torch.linspace(-8, 8, 129, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        try:
            values = act(x.clone())  # some work in place
        except (TypeError, RuntimeError):  # it does not map one tensor to another, element by element
            return False
        return isinstance(values, Tensor) and torch.allclose(values, activate(x, name), rtol=0, atol=1e-5)


def name_of(function: Any) -> str:
    """The name of a function, or of the class of a module."""
    return str(getattr(function, "__name__", type(function).__name__))


def activation_of(model: nn.Module, path: str, module: nn.Module) -> Any:
    """The activation's name in the configuration of a module, of a module around it or of one of its parts."""
    parts = path.split(".")
    holders = [
        module,
        *(model.get_submodule(".".join(parts[:n])) for n in range(len(parts), -1, -1)),
        *module.modules(),
    ]
    for config in (getattr(holder, "config", None) for holder in holders):
        for name in _ACTIVATION_NAMES:
            if isinstance(activation := getattr(config, name, None), str):
                return activation
    return None


def num_neurons(linear_in: nn.Module) -> int:
    """How many neurons the first layer of a network computes; 0 where it is no linear layer."""
    return weight_and_bias(linear_in)[0].shape[0] if is_plain_linear(linear_in) else 0


def attribute_owner(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that holds the one at this path, and its name there."""
    parent, _, name = path.rpartition(".")
    return model.get_submodule(parent), name
