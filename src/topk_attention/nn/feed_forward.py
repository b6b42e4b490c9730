"""A top-k feed-forward network as a layer."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.utils.parametrize import is_parametrized

from ..backends.activations import activate
from ..functional import StandIn, topk_feed_forward
from ..functional.stand_in import UncheckedStandIn

# Where a module keeps the hooks that act on a call.
_CALL_HOOKS = {
    "_forward_pre_hooks": "a forward pre-hook",
    "_forward_hooks": "a forward hook",
    "_backward_pre_hooks": "a backward pre-hook",
    "_backward_hooks": "a backward hook",
}


def is_plain_linear(layer: object) -> bool:
    """Whether this is nn.Linear itself, or transformers' Conv1D, a linear layer whose weight is transposed."""
    return type(layer) is nn.Linear or _is_conv1d(layer)


def _is_conv1d(layer: object) -> bool:
    return type(layer).__name__ == "Conv1D" and type(layer).__module__ == "transformers.pytorch_utils"


def weight_and_bias(layer: Any) -> tuple[Tensor, Tensor | None]:
    """Weight [out, in] and bias [out] of a plain linear layer."""
    return (layer.weight.t() if _is_conv1d(layer) else layer.weight), layer.bias


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
    if "forward" in vars(module):
        offloads = hasattr(module, "_hf_hook")
        return "weights that accelerate moves for each call" if offloads else "a forward method of its own"
    return None


def why_call(name: str, linear: Any) -> str | None:
    """Why the weight and bias of this layer do not say all that it computes; None where they do."""
    if is_parametrized(linear):
        return f"{name} has a parametrization"
    if not is_plain_linear(linear):
        return f"{name} is {full_name(type(linear))}, not nn.Linear"
    if (added := added_to_call(linear)) is not None:
        return f"{name} has {added}"
    for part in ("weight", "bias"):
        if not _is_ordinary(getattr(linear, part)):
            return f"the {part} of {name} is {full_name(type(getattr(linear, part)))}, no ordinary tensor"
    return None


def _is_ordinary(tensor: Tensor | None) -> bool:
    """Not sharded, quantized or otherwise of a type with its own arithmetic. Export and compilation trace fake ones."""
    return tensor is None or type(tensor) in (nn.Parameter, Tensor) or isinstance(tensor, FakeTensor | FunctionalTensor)


def topk_network(
    x: Tensor,
    linear_in: Any,
    linear_out: Any,
    linear_gate: Any = None,
    *,
    k: int | None,
    activation: str,
    dropout_p: float,
    backend: str,
    token_chunk_size: int | None = None,
    stand_in: StandIn | None = None,
    names: tuple[str, str, str] = ("linear_in", "linear_out", "linear_gate"),
) -> Tensor:
    """The top-k network of these layers, read from their weights.

    If one of them does more than its weights say (an adapter, a hook, a parametrization, an offloaded or sharded
    weight), all are called instead, and every neuron of every token stands in memory.
    """
    reason = None
    for name, layer in zip(names, (linear_in, linear_out, linear_gate), strict=True):
        if reason is None and layer is not None:
            reason = why_call(name, layer)
    if reason is not None:
        if not torch.compiler.is_compiling():
            warnings.warn(
                f"a top-k network calls its layers and computes every neuron, because {reason}; that costs the memory "
                "and time that it would save, so leave the network out with where= or remove what was added",
                stacklevel=3,
            )
        return _called_network(x, linear_in, linear_out, linear_gate, k, activation, dropout_p, stand_in)
    (w_in, b_in), (w_out, b_out) = weight_and_bias(linear_in), weight_and_bias(linear_out)
    w_gate, b_gate = (None, None) if linear_gate is None else weight_and_bias(linear_gate)
    if w_out.dtype != w_in.dtype:  # T5 keeps its last layer in float32
        dtype = torch.promote_types(w_in.dtype, w_out.dtype)
        x, w_in, w_out = x.to(dtype), w_in.to(dtype), w_out.to(dtype)
        w_gate, b_in, b_out, b_gate = (
            None if tensor is None else tensor.to(dtype) for tensor in (w_gate, b_in, b_out, b_gate)
        )
        stand_in = None if stand_in is None else stand_in.to(dtype)
    return topk_feed_forward(
        x,
        w_in,
        w_out,
        k=k,
        w_gate=w_gate,
        b_in=b_in,
        b_out=b_out,
        b_gate=b_gate,
        activation=activation,
        dropout_p=dropout_p,
        backend=backend,
        token_chunk_size=token_chunk_size,
        stand_in=stand_in,
    )


def _called_network(
    x: Tensor,
    linear_in: nn.Module,
    linear_out: nn.Module,
    linear_gate: nn.Module | None,
    k: int | None,
    activation: str,
    dropout_p: float,
    stand_in: StandIn | None,
) -> Tensor:
    hidden = ranked_by = linear_in(x)
    if linear_gate is None:
        hidden = activate(hidden, activation)
    else:
        hidden = activate(linear_gate(x), activation) * hidden
        ranked_by = hidden.abs()
    if k is not None and k < hidden.shape[-1]:
        # A stable sort leaves tied neurons in index order, so the lower index comes first.
        order = ranked_by.detach().argsort(dim=-1, descending=True, stable=True)
        kept = torch.zeros_like(hidden, dtype=torch.bool).scatter(-1, order[..., :k], True)
        hidden = torch.where(kept, hidden, 0)
    else:
        stand_in = None
    hidden = F.dropout(hidden, dropout_p)
    weight = getattr(linear_out, "weight", None)
    if isinstance(weight, Tensor) and weight.is_floating_point() and not torch.is_autocast_enabled(x.device.type):
        hidden = hidden.to(weight.dtype)  # T5 keeps its last layer in float32
    output: Tensor = linear_out(hidden)
    if stand_in is None:
        return output
    stand_in = stand_in.to(output.dtype)
    return stand_in.added_to(output, x.to(output.dtype)) + stand_in.bias


@torch.no_grad()
def store_by_neuron(linear_out: nn.Module | None = None, *, linear_in: nn.Module | None = None) -> None:
    """Store the weights of a network's layers neuron by neuron in memory, the order in which top-k reads them.

    Shape, values, name and the parameter itself stay. Only its strides change, and a dense layer works with both. A
    state dict loads into either form. Weights that train are left as they are: LBFGS, parameters_to_vector, FSDP2 and
    DDP's buckets want them contiguous.
    """
    for linear, neuron_axis in ((linear_in, 0), (linear_out, 1)):
        weight = getattr(linear, "weight", None)
        if type(weight) is not nn.Parameter or weight.requires_grad or weight.ndim != 2 or weight.is_meta:
            continue
        if neuron_axis != (1 if _is_conv1d(linear) else 0) and not weight.t().is_contiguous():
            weight.data = weight.t().contiguous().t()


@torch.no_grad()
def store_as_usual(*linears: nn.Module) -> None:
    """Undo `store_by_neuron`, so that a dense layer rounds as it did before."""
    for linear in linears:
        weight = getattr(linear, "weight", None)
        if type(weight) is nn.Parameter and not weight.is_contiguous():
            weight.data = weight.contiguous()


def is_frozen(*modules: nn.Module | None) -> bool:
    """Whether no parameter of these modules trains."""
    return not any(p.requires_grad for module in modules if module is not None for p in module.parameters())


class StandInTensors(nn.Module):
    """Holds the tensors of a `StandIn` as part of a layer: parameters as they are, others as buffers.

    is_saved  whether the buffers are in the layer's state dict
    """

    bias: Tensor

    def __init__(self, stand_in: StandIn, *, is_saved: bool = True) -> None:
        super().__init__()
        for name, tensor in stand_in.tensors().items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor, persistent=is_saved)

    @property
    def value(self) -> StandIn:
        """The stand-in, with the tensors as they are now."""
        return UncheckedStandIn(self.bias, getattr(self, "w_in", None), getattr(self, "w_out", None))

    def extra_repr(self) -> str:
        return str(self.value)


def stand_in_of(layer: Any) -> StandIn | None:
    """The stand-in of a layer, if it holds one."""
    holder = getattr(layer, "stand_in", None)
    return holder.value if isinstance(holder, StandInTensors) else None


class TopKFeedForward(nn.Module):
    """A feed-forward network in which each token uses its k best neurons, built from given linear layers.

    C input size, F neurons, O output size

    linear_in    nn.Linear(C, F)
    linear_out   nn.Linear(F, O)
    linear_gate  nn.Linear(C, F) for a gated network, activation(gate) * in, or None
    k            neurons kept per token, or "all" or None for all
    activation   as in `topk_feed_forward`
    dropout_p    probability of dropping a kept activation, in training mode only
    backend      as in `topk_feed_forward`
    token_chunk_size  as in `topk_feed_forward`
    stand_in     as in `topk_feed_forward`; its tensors become the layer's: parameters if they are such, which
                 then train with the others, otherwise buffers
    names        the layers' names in the state dict, in the order in, out, gate; with the names of the original
                 network, checkpoints of either load into the other

    The weights are not copied. Where none of them requires a gradient, that of linear_out changes its strides, so that
    each neuron's output weights lie together in memory. That is faster for a few tokens at a time.

    An adapter, hook or parametrization on one of the layers acts; every neuron is then computed, with a warning.

    >>> import torch
    >>> layer = TopKFeedForward(nn.Linear(64, 256), nn.Linear(256, 64), k=32, activation="gelu")
    >>> layer(torch.randn(2, 100, 64)).shape
    torch.Size([2, 100, 64])
    """

    def __init__(
        self,
        linear_in: nn.Linear,
        linear_out: nn.Linear,
        *,
        k: int | Literal["all"] | None,
        linear_gate: nn.Linear | None = None,
        activation: str = "relu",
        dropout_p: float = 0.0,
        backend: str = "auto",
        token_chunk_size: int | None = None,
        stand_in: StandIn | None = None,
        names: tuple[str, str, str] = ("linear_in", "linear_out", "linear_gate"),
    ) -> None:
        super().__init__()
        self._names = names
        for name, linear in zip(names, (linear_in, linear_out, linear_gate), strict=True):
            self.add_module(name, linear)
        if is_frozen(linear_in, linear_out, linear_gate):
            self._store_by_neuron()
        self.k = None if isinstance(k, str) and k == "all" else k
        self.activation = activation
        self.dropout_p = dropout_p
        self.backend = backend
        self.token_chunk_size = token_chunk_size
        self.stand_in = None if stand_in is None else StandInTensors(stand_in)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C]; returns [..., O]."""
        return topk_network(
            x,
            *(getattr(self, name) for name in self._names),
            k=self.k,
            activation=self.activation,
            dropout_p=self.dropout_p if self.training else 0.0,
            backend=self.backend,
            token_chunk_size=self.token_chunk_size,
            stand_in=stand_in_of(self),
            names=self._names,
        )

    def _store_by_neuron(self) -> None:
        linear_in, linear_out, linear_gate = (getattr(self, name) for name in self._names)
        store_by_neuron(linear_in=linear_in, linear_out=linear_out)
        store_by_neuron(linear_in=linear_gate)

    def extra_repr(self) -> str:
        return f"k={self.k}, activation={self.activation!r}, backend={self.backend!r}"
