"""The places in a model that a conversion can change, and what every finder of feed-forward networks checks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.activations import ACTIVATIONS, activate
from ..functional import StandIn
from ..nn.feed_forward import StandInTensors, store_as_usual, store_by_neuron
from ..nn.linears import added_to_call, full_name, linear_sizes, why_call, why_not_stored, without_adapters
from ..nn.shards import Cut, is_fully_sharded
from .tensor_parallel import cut_over_processes

# The names that model families use for the activation in their configurations.
_ACTIVATION_NAMES = (
    "hidden_act",
    "hidden_activation",
    "activation_function",
    "dense_act_fn",
    "activation",
    "mlp_hidden_act",
    "encoder_hidden_act",
    "decoder_hidden_act",
    "encoder_activation_function",
    "decoder_activation_function",
    "speech_encoder_hidden_act",
    "projection_hidden_act",
)


@dataclass(frozen=True)
class AttentionSite:
    """An attention layer: PyTorch's own, one that reads its function from transformers' attention interface, or one
    that computes attention in its own code and has an adapter."""

    path: str
    module: nn.Module
    num_heads: int | None
    obstacle: str | None  # why it cannot be replaced
    reads_interface: bool
    soft_cap: float | None = None  # on the scores that it hands to attention
    has_adapter: bool = False

    @property
    def takes_function(self) -> bool:
        """Whether it can call the attention function of this library."""
        return self.reads_interface or self.has_adapter


@dataclass(frozen=True)
class FeedForwardSite:
    """A feed-forward network and how to replace it."""

    path: str
    module: nn.Module
    linears_in: tuple[nn.Module, ...]  # one, or two where the network is gated
    linear_out: nn.Module
    examine: Callable[[], str | None]  # returns the obstacle; it may run the network
    # Takes k (None: all), a backend and a stand-in for the neurons that are not kept. A second call changes them.
    replace: Callable[[int | None, str, StandIn | None], None]
    restore: Callable[[], None] | None  # None where the network is still the original
    stand_in: StandIn | None  # the one of an earlier conversion

    @cached_property
    def obstacle(self) -> str | None:
        """Why it cannot be replaced; None where it can. Found out only when it is asked for."""
        return self.examine()

    @property
    def num_neurons(self) -> int:
        """How many neurons the last layer reads; 0 where it is no linear layer."""
        sizes = linear_sizes(self.linear_out)
        return 0 if sizes is None else sizes[0]

    @property
    def neurons_in_words(self) -> str:
        return f"{self.num_neurons} neurons"

    @property
    def why_no_stand_in(self) -> str | None:
        """Why nothing can be added for the neurons that are not kept; None where it can."""
        return None

    @property
    def weight_out(self) -> Any:
        """The weight of the last layer."""
        return self.linear_out.weight

    def store_by_neuron(self) -> None:
        for linear_in in self.linears_in:
            store_by_neuron(linear_in=linear_in)
        store_by_neuron(linear_out=self.linear_out)

    def store_as_usual(self) -> None:
        store_as_usual(*self.linears_in, self.linear_out)

    @property
    def sizes(self) -> tuple[int, int]:
        """The sizes of the input and the output of a network that can be replaced."""
        sizes_in, sizes_out = linear_sizes(self.linears_in[0]), linear_sizes(self.linear_out)
        assert sizes_in is not None
        assert sizes_out is not None
        return sizes_in[0], sizes_out[1]


def obstacle_of(
    linears: Mapping[str, nn.Module],
    activation: Any,
    act: Any,
    bypassed: Mapping[str, Any] | None = None,
    *,
    moves_weights: bool = False,
    cut: Cut | None = None,
) -> str | None:
    """Why these layers cannot become a top-k network; None where they can.

    linears     the network's linear layers by name
    activation  the activation's name, by the configuration or by its values
    act         the function or module that the model calls
    bypassed    further parts by name that the top-k network computes itself and does not call
    moves_weights  whether the top-k network takes weight and bias out of the layers, so that they must be all there is
    cut         how processes share the layers, of a network that can be computed in parts
    """
    for name, linear in linears.items() if cut is None else ():
        if (reason := cut_over_processes(without_adapters(linear))) is not None:
            return f"{name} {reason}"
        if (reason := (why_not_stored if moves_weights else why_call)(name, linear)) is not None:
            return f"{reason}; a top-k network reads only weights"
    if (reason := added_to(bypassed or {})) is not None:
        return reason
    if activation is None:
        return f"its activation, {full_name_of(act)}, has no top-k form"
    if activation not in ACTIVATIONS:
        return f"activation {activation!r} has no top-k form"
    if not is_activation(act, activation):
        return f"its activation, {name_of(act)}, is not {activation!r}, which the configuration names"
    return None


def added_to(parts: Mapping[str, Any]) -> str | None:
    """Why these parts cannot be left uncalled; None where they can."""
    for name, part in parts.items():
        if isinstance(part, nn.Module) and (added := added_to_call(part)) is not None:
            return f"{name} has {added}; a top-k network does not call it"
    return None


def sharded_by_itself(parts: Mapping[str, Any]) -> str | None:
    """Why these parts cannot give their place to others; None where they can. `fully_shard` knows no places."""
    sharded = next((name for name, part in parts.items() if is_fully_sharded(part)), None)
    return sharded and (
        f"{sharded} is sharded by itself (fully_shard); convert or restore before that, or shard the layer around it"
    )


def share_hooks(former: nn.Module, module: nn.Module) -> None:
    """Let a module keep the hooks of the one whose place it takes, those that are added later included.

    The handles that remove hooks know these very dictionaries.
    """
    for name, value in vars(former).items():
        if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")) or name == "_is_full_backward_hook":
            module.__dict__[name] = value


def hold_stand_in(stand_in: StandIn | None, linear: Any) -> StandInTensors | None:
    """The stand-in for a converted network whose last layer is this one, with its dtype, on its device.

    Its tensors are not in the state dict, which stays that of the original: they have a file of their own.
    """
    if stand_in is None:
        return None
    return StandInTensors(stand_in.detach().to(linear.weight.dtype, linear.weight.device), is_saved=False)


def is_activation(act: Any, name: str) -> bool:
    """Whether a callable is the activation of this name. Its values between -8 and 8 decide, and some far outside."""
    if isinstance(act, nn.Module) and next(act.parameters(), None) is not None:
        return False
    near = torch.linspace(-8, 8, 129, dtype=torch.float32, device="cpu")
    far = torch.tensor([12, 64, 1000], dtype=torch.float32, device="cpu")
    x = torch.cat([near, far, -far])
    with torch.no_grad():
        try:
            values = act(x.clone())  # some work in place
        except (TypeError, RuntimeError):  # it does not map one tensor to another, element by element
            return False
        return isinstance(values, Tensor) and torch.allclose(values, activate(x, name), rtol=1e-6, atol=1e-5)


def name_of(function: Any) -> str:
    """The name of a function, or of the class of a module."""
    return str(getattr(function, "__name__", type(function).__name__))


def full_name_of(function: Any) -> str:
    """The name of a function, or of the class of a module, with that of the Python module that it is from."""
    return full_name(function if hasattr(function, "__qualname__") else type(function))


def activation_of(model: nn.Module, path: str, module: nn.Module, act: Any) -> str | None:
    """The activation's name in the configuration of a module, of a module around it or of one of its parts.

    Where they name several (an encoder's and a decoder's), the values of `act` decide. Where its values are of none of
    those (the mergers of Qwen3-VL's images have a GELU of their own), that of any known one; else the first that is
    named, or None.
    """
    parts = path.split(".")
    holders = [
        module,
        *(model.get_submodule(".".join(parts[:n])) for n in range(len(parts), -1, -1)),
        *module.modules(),
    ]
    configs = [getattr(holder, "config", None) for holder in holders]
    values = [getattr(config, name, None) for config in configs for name in _ACTIVATION_NAMES]
    named = list(dict.fromkeys(value for value in values if isinstance(value, str)))
    of_values = next((name for name in named if name in ACTIVATIONS and is_activation(act, name)), None)
    return of_values or known_activation(act) or next(iter(named), None)


def known_activation(act: Any) -> str | None:
    """The name of the activation whose values these are; None where they are of none that has a top-k form."""
    return next((name for name in ACTIVATIONS if is_activation(act, name)), None)


def own_forward(module: nn.Module) -> Any:
    """The function that runs when the module is called, without what is wrapped around it.

    It may be an attribute of this one module. accelerate, for example, wraps the method of the class in that way.
    """
    function = inspect.unwrap(module.forward)
    return inspect.unwrap(getattr(function, "__func__", function))


def asks_interface(function: Callable[..., Any]) -> bool:
    """Whether this code, or what it is wrapped around, looks up an attention function in transformers' table."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def attribute_owner(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that holds the one at this path, and its name there."""
    parent, _, name = path.rpartition(".")
    return model.get_submodule(parent), name
