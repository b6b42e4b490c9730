"""What linear layers compute, as matrices: those with LoRA or DoRA, and quantised ones, included."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.utils.parametrize import is_parametrized

_FALCON_LINEAR = "transformers.models.falcon.modeling_falcon.FalconLinear"
# PEFT's layers whose forward method is that of LoRA. Others, as for weights of bitsandbytes, do more.
_LORA = ("peft.tuners.lora.layer.Linear", "peft.tuners.lora.torchao.TorchaoLoraLinear")
_DORA = "peft.tuners.lora.variants.DoraLinearVariant"
# Where a module keeps the hooks that act on a call.
_CALL_HOOKS = {
    "_forward_pre_hooks": "a forward pre-hook",
    "_forward_hooks": "a forward hook",
    "_backward_pre_hooks": "a backward pre-hook",
    "_backward_hooks": "a backward hook",
}


def is_plain_linear(layer: object) -> bool:
    """Whether this is nn.Linear itself or one of transformers' own that compute the same: Conv1D, whose weight is
    transposed, and Falcon's."""
    return type(layer) is nn.Linear or is_conv1d(layer) or full_name(type(layer)) == _FALCON_LINEAR


def is_conv1d(layer: object) -> bool:
    return type(layer).__name__ == "Conv1D" and type(layer).__module__ == "transformers.pytorch_utils"


def is_lora(layer: object) -> bool:
    return full_name(type(layer)) in _LORA


def without_adapters(layer: Any) -> Any:
    """The layer that LoRA adds to; any other layer itself."""
    return layer.base_layer if is_lora(layer) else layer


def weight_and_bias(layer: Any) -> tuple[Tensor, Tensor | None]:
    """Weight [out, in] and bias [out] of a plain linear layer."""
    return (layer.weight.t() if is_conv1d(layer) else layer.weight), layer.bias


def linear_sizes(layer: Any) -> tuple[int, int] | None:
    """The sizes of a linear layer's input and output; None where this is no linear layer."""
    layer = without_adapters(layer)
    if is_plain_linear(layer):
        size_out, size_in = layer.weight.shape
        return (size_out, size_in) if is_conv1d(layer) else (size_in, size_out)
    return (layer.in_features, layer.out_features) if isinstance(layer, nn.Linear) else None


def halves(tensor: Tensor, gate_rows: str | None, dim: int = 0) -> tuple[Tensor, Tensor]:
    """The gate's half and the other one of what one layer computes for both. They are views."""
    first, last = tensor.chunk(2, dim)
    return (first, last) if gate_rows == "first" else (last, first)


def full_name(cls: type) -> str:
    """A class's name with that of its module."""
    return f"{cls.__module__}.{cls.__qualname__}"


def added_to_call(module: nn.Module, *, but: str = "") -> str | None:
    """What acts when a module is called and is lost where it is not; None where nothing does.

    but  the one kind of hooks that is not looked for, e.g. "_forward_hooks"
    """
    for hooks, words in _CALL_HOOKS.items():
        if hooks != but and (registered := getattr(module, hooks)):
            hook = next(iter(registered.values()))
            return f"{words} ({full_name(hook if hasattr(hook, '__qualname__') else type(hook))})"
    return added_forward(module)


def added_forward(module: nn.Module) -> str | None:
    """What replaced the forward method of a module's class; None where nothing did."""
    if "forward" not in vars(module):
        return None
    offloads = hasattr(module, "_hf_hook")
    return "weights that accelerate moves for each call" if offloads else "a forward method of its own"


def why_not_stored(name: str, linear: Any) -> str | None:
    """Why weight and bias of this layer do not say, as they are stored, all that it computes; None where they do."""
    if (reason := _why_not_plain(name, linear)) is not None:
        return reason
    for part in ("weight", "bias"):
        if not _is_ordinary(getattr(linear, part)):
            return f"the {part} of {name} is {full_name(type(getattr(linear, part)))}, no ordinary tensor"
    return None


def why_call(name: str, linear: Any) -> str | None:
    """Why `parts_of` this layer are not all that it computes, so that it has to be called; None where they are."""
    if not is_lora(linear):
        reason = _why_not_plain(name, linear)
        return reason if reason is not None else _why_not_readable(name, linear)
    layer: Any = linear
    if is_parametrized(layer):
        return f"{name} has a parametrization"
    if (added := added_to_call(layer)) is not None:
        return f"{name} has {added}"
    if (reason := why_call(f"the base layer of {name}", layer.base_layer)) is not None:
        return reason
    if layer.disable_adapters and layer.merged:
        return f"{name} has adapters in its weight that are switched off, which its next call takes out"
    active = _active_adapters(layer)
    for adapter in active:
        for part in (layer.lora_A[adapter], layer.lora_B[adapter]):
            if (reason := why_not_stored(f"the adapter {adapter!r} of {name}", part)) is not None:
                return reason
        variant = layer.lora_variant.get(adapter)
        if variant is not None and full_name(type(variant)) != _DORA:
            return f"{name} has an adapter {adapter!r} of the kind {full_name(type(variant))}"
        if variant is not None and len(active) > 1:
            return f"{name} has DoRA and a second adapter"
        if type(layer.lora_dropout[adapter]) not in (nn.Identity, nn.Dropout):
            return f"{name} has an adapter {adapter!r} with {full_name(type(layer.lora_dropout[adapter]))} for dropout"
    return None


def _why_not_plain(name: str, linear: Any) -> str | None:
    if is_parametrized(linear):
        return f"{name} has a parametrization"
    if not is_plain_linear(linear):
        return f"{name} is {full_name(type(linear))}, not nn.Linear"
    if (added := added_to_call(linear)) is not None:
        return f"{name} has {added}"
    return None


def _why_not_readable(name: str, linear: Any) -> str | None:
    """Why the numbers of a plain layer's weight and bias are not to be had; None where they are."""
    if not _is_ordinary(linear.bias):
        return f"the bias of {name} is {full_name(type(linear.bias))}, no ordinary tensor"
    if _is_ordinary(linear.weight):
        return None
    kind = full_name(type(linear.weight))
    if not _is_quantised(linear.weight) or is_conv1d(linear):
        return f"the weight of {name} is {kind}, no ordinary tensor"
    # What is done to the input: how it is quantised, a scale before that.
    if acts := [part for part, value in vars(linear.weight).items() if part.startswith("act") and value is not None]:
        return f"the weight of {name} is {kind}, which changes the layer's input as well ({', '.join(acts)})"
    return None


def _is_ordinary(tensor: Tensor | None) -> bool:
    """Not sharded, quantized or otherwise of a type with its own arithmetic. Export and compilation trace fake ones."""
    return tensor is None or type(tensor) in (nn.Parameter, Tensor) or isinstance(tensor, FakeTensor | FunctionalTensor)


def _is_quantised(tensor: Tensor) -> bool:
    """Whether this is a weight of torchao, whose layer computes the product with `dequantize()`."""
    return type(tensor).__module__.partition(".")[0] == "torchao" and hasattr(tensor, "dequantize")


# Methods, not properties: the compiler of torch 2.10 cannot read those of a named tuple.
class Adapter(NamedTuple):
    """What LoRA adds to a layer: up (down x), with dropout of its x in training.

    down  [R, in]
    up    [out, R], with the adapter's scale
    """

    down: Tensor
    up: Tensor
    dropout: nn.Module

    def low(self, x: Tensor) -> Tensor:
        """[..., R], in the dtype of x."""
        return F.linear(self.dropout(x).to(self.down.dtype), self.down).to(x.dtype)

    def drops(self) -> bool:
        return isinstance(self.dropout, nn.Dropout) and self.dropout.training and self.dropout.p > 0


class LinearParts(NamedTuple):
    """A linear layer: scales * (weight x + what its adapters add) + bias.

    weight     [out, in], ordinary or quantised
    bias       [out]
    magnitude  [out], of DoRA: the norm of each row of the whole
    """

    weight: Tensor
    bias: Tensor | None
    adapters: tuple[Adapter, ...] = ()
    magnitude: Tensor | None = None

    def is_stored(self) -> bool:
        """Whether the weight says everything as it is."""
        return len(self.adapters) == 0 and _is_ordinary(self.weight)

    def numbers(self) -> Tensor:
        """The weight [out, in] as an ordinary tensor."""
        weight: Any = self.weight
        return weight if _is_ordinary(weight) else weight.dequantize()

    def scales(self, weight: Tensor) -> Tensor | None:
        """What DoRA multiplies each row with; weight is that of `numbers()`. The norm counts as a constant."""
        if self.magnitude is None:
            return None
        with torch.no_grad():
            norm = torch.linalg.norm(self._sum(weight), dim=1).to(weight.dtype)
        return self.magnitude / norm

    def whole(self) -> Tensor:
        """The one weight [out, in] that computes the same, without dropout."""
        weight = self.numbers()
        scales = self.scales(weight)
        whole = self._sum(weight)
        return (whole if scales is None else scales.unsqueeze(1) * whole).to(weight.dtype)

    def _sum(self, weight: Tensor) -> Tensor:
        for adapter in self.adapters:
            weight = weight + adapter.up @ adapter.down
        return weight

    def tensors(self) -> list[Tensor]:
        """Everything that it is made of."""
        tensors = [self.weight, *(tensor for adapter in self.adapters for tensor in (adapter.down, adapter.up))]
        return tensors if self.magnitude is None else [*tensors, self.magnitude]


def parts_of(layer: Any) -> LinearParts:
    """What a layer computes, where `why_call` has nothing against it."""
    weight, bias = weight_and_bias(without_adapters(layer))
    if not is_lora(layer) or layer.disable_adapters or layer.merged:
        return LinearParts(weight, bias)
    adapters, magnitude = [], None
    for name in _active_adapters(layer):
        down, up, scale = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
        adapters.append(Adapter(down, up * scale, layer.lora_dropout[name]))
        if (added := layer.lora_B[name].bias) is not None:
            bias = added * scale if bias is None else bias + (added * scale).to(bias.dtype)
        if layer.lora_variant.get(name) is not None:
            magnitude = layer.lora_magnitude_vector[name].weight
    return LinearParts(weight, bias, tuple(adapters), magnitude)


def _active_adapters(layer: Any) -> list[str]:
    return [] if layer.disable_adapters or layer.merged else [n for n in layer.active_adapters if n in layer.lora_A]
