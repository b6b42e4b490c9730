"""A top-k feed-forward network as a layer."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backends.activations import activate
from ..functional import StandIn, topk_feed_forward
from ..functional.observation import is_observed
from ..functional.stand_in import UncheckedStandIn
from .linears import LinearParts, halves, is_conv1d, linear_sizes, parts_of, why_call, without_adapters
from .made_weights import MadeWeights
from .shards import Cut, cut_of, network_of_shards

# Below this many tokens layers whose weights would have to be made are called: every neuron of so few takes little
# memory, and to make a weight costs as much as to multiply several tokens with it.
_FEW_TOKENS = 64


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
    gate_rows: Literal["first", "last"] | None = None,
) -> Tensor:
    """The top-k network of these layers, read from their weights.

    gate_rows  where linear_in computes the gate too: which half of its rows the gate has

    Weights with adapters (LoRA, DoRA) and quantised ones are made for the call, and again for its backward pass. If a
    layer does more than its parts say (a hook, a parametrization, an offloaded or sharded weight, another adapter), all
    are called instead, and every neuron of every token stands in memory.
    """
    layers = dict(zip(names, (linear_in, linear_out, linear_gate), strict=True))
    cut = cut_of(linear_in, linear_out, linear_gate)
    if isinstance(cut, Cut) and dropout_p == 0:
        output = network_of_shards(
            x,
            cut,
            linear_in,
            linear_out,
            linear_gate,
            k=k,
            activation=activation,
            backend=backend,
            gate_rows=gate_rows,
        )
        keeps_all = k is None or k >= cut.num_neurons
        return output if stand_in is None or keeps_all else _with_stand_in(output, x, stand_in)
    if cut is not None:
        raise RuntimeError(
            "a top-k network was cut over several processes so that it cannot be computed: "
            f"{cut if isinstance(cut, str) else 'each process would drop its neurons by a draw of its own'}; leave its "
            "layers whole, or the network out with where="
        )
    reason = next(
        (
            reason
            for name, layer in layers.items()
            if layer is not None and (reason := why_call(name, layer)) is not None
        ),
        None,
    )
    called = (x, linear_in, linear_out, linear_gate, gate_rows, k, activation, dropout_p, stand_in)
    if reason is not None:
        return _called_network(*called, because=reason)
    part_in, part_out = parts_of(linear_in), parts_of(linear_out)
    part_gate = None if linear_gate is None else parts_of(linear_gate)
    options: dict[str, Any] = {"k": k, "activation": activation, "dropout_p": dropout_p, "backend": backend}
    options["token_chunk_size"] = token_chunk_size
    if all(part is None or part.is_stored() for part in (part_in, part_out, part_gate)):
        w_in, w_out, w_gate = part_in.weight, part_out.weight, None if part_gate is None else part_gate.weight
    elif (reason := _why_call_now(names, part_in, part_out, part_gate)) is not None:
        return _called_network(*called, because=reason)
    elif is_observed():  # by what reads the weights of the call, without gradients
        w_in, w_out, w_gate = part_in.whole(), part_out.whole(), None if part_gate is None else part_gate.whole()
    elif x.numel() < _FEW_TOKENS * x.shape[-1]:
        return _called_network(*called)
    else:
        return _made_network(x, part_in, part_out, part_gate, gate_rows, stand_in, options)
    b_in, b_out, b_gate = part_in.bias, part_out.bias, None if part_gate is None else part_gate.bias
    return _network_of(x, w_in, w_out, w_gate, b_in, b_out, b_gate, gate_rows, stand_in, options)


def _network_of(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    w_gate: Tensor | None,
    b_in: Tensor | None,
    b_out: Tensor | None,
    b_gate: Tensor | None,
    gate_rows: Literal["first", "last"] | None,
    stand_in: StandIn | None,
    options: dict[str, Any],
) -> Tensor:
    """The top-k network of these matrices, of which the first may hold the gate's rows too."""
    if w_out.dtype != w_in.dtype:  # T5 keeps its last layer in float32
        dtype = torch.promote_types(w_in.dtype, w_out.dtype)
        x, w_in, w_out = x.to(dtype), w_in.to(dtype), w_out.to(dtype)
        w_gate, b_in, b_out, b_gate = (
            None if tensor is None else tensor.to(dtype) for tensor in (w_gate, b_in, b_out, b_gate)
        )
        stand_in = None if stand_in is None else stand_in.to(dtype)
    if gate_rows is not None:
        w_gate, w_in = halves(w_in, gate_rows)
        b_gate, b_in = (None, None) if b_in is None else halves(b_in, gate_rows)
    return topk_feed_forward(
        x, w_in, w_out, w_gate=w_gate, b_in=b_in, b_out=b_out, b_gate=b_gate, stand_in=stand_in, **options
    )


def _why_call_now(names: tuple[str, ...], *parts: LinearParts | None) -> str | None:
    """Why layers with adapters have to be called in this mode: dropout on the way to an adapter is one more input.

    The first layers take it beside x. The last one reads neurons, of which only the kept ones are there.
    """
    for place, (name, part) in enumerate(zip(names, parts, strict=True)):
        if part is None or not any(adapter.drops() for adapter in part.adapters):
            continue
        if place == 1 or part.magnitude is not None or is_observed():
            return f"{name} has an adapter with dropout, in training"
    return None


def _made_network(
    x: Tensor,
    part_in: LinearParts,
    part_out: LinearParts,
    part_gate: LinearParts | None,
    gate_rows: Literal["first", "last"] | None,
    stand_in: StandIn | None,
    options: dict[str, Any],
) -> Tensor:
    """The top-k network of layers with adapters, or of quantised ones.

    What an adapter puts between its two matrices is more of the input, with more columns of the first weights, and more
    of the output, with more rows of the last weight. So the chosen neurons are computed with the adapters, which are
    never rounded to the steps of the weight that they change.
    """
    made = MadeWeights()
    lows_in = [adapter.low(x) for adapter in part_in.adapters]
    lows_gate = [] if part_gate is None else [adapter.low(x) for adapter in part_gate.adapters]
    ranks_in, ranks_gate = (sum(low.shape[-1] for low in lows) for lows in (lows_in, lows_gate))
    wide = torch.cat([x, *lows_in, *lows_gate], dim=-1) if lows_in or lows_gate else x
    with made.again_in_backward():
        w_in = _wide_rows(made, part_in, 0, ranks_gate)
        w_gate = None if part_gate is None else _wide_rows(made, part_gate, ranks_in, 0)
        w_out = _long_columns(made, part_out)
        b_in, b_gate = part_in.bias, None if part_gate is None else part_gate.bias
        long = _network_of(wide, w_in, w_out, w_gate, b_in, None, b_gate, gate_rows, None, options)
    ranks = [adapter.down.shape[0] for adapter in part_out.adapters]
    output, *lows = long.split([long.shape[-1] - sum(ranks), *ranks], dim=-1)
    for low, adapter in zip(lows, part_out.adapters, strict=True):
        output = output + F.linear(low.to(adapter.up.dtype), adapter.up).to(output.dtype)
    scales = part_out.scales(part_out.numbers()) if part_out.magnitude is not None else None
    if scales is not None:
        output = output * scales.to(output.dtype)
    if part_out.bias is not None:
        output = output + part_out.bias.to(output.dtype)
    k, num_neurons = options["k"], w_out.shape[1]
    keeps_all = k is None or k >= num_neurons
    return output if stand_in is None or keeps_all else _with_stand_in(output, x, stand_in)


def _wide_rows(made: MadeWeights, part: LinearParts, zeros_before: int, zeros_after: int) -> Tensor:
    """The rows of a first layer [F, D + ranks]: those of its weight, then those of its adapters among zeros."""

    def make() -> Tensor:
        weight = part.numbers()
        before, after = (weight.new_zeros(weight.shape[0], count) for count in (zeros_before, zeros_after))
        ups = [adapter.up.to(weight.dtype) for adapter in part.adapters]
        if (scales := part.scales(weight)) is not None:
            scales = scales.to(weight.dtype).unsqueeze(1)
            weight, ups = weight * scales, [up * scales for up in ups]
        return torch.cat([weight, before, *ups, after], dim=1)

    is_made = not part.is_stored() or zeros_before or zeros_after
    return made.add(make, part.tensors()) if is_made else part.weight


def _long_columns(made: MadeWeights, part: LinearParts) -> Tensor:
    """The columns of a last layer [O + ranks, F], one after another in memory, in which order they are read."""

    def make() -> Tensor:
        weight = part.numbers()
        return torch.cat([weight.t(), *(adapter.down.to(weight.dtype).t() for adapter in part.adapters)], dim=1).t()

    return part.weight if part.is_stored() else made.add(make, part.tensors())


def _called_network(
    x: Tensor,
    linear_in: nn.Module,
    linear_out: nn.Module,
    linear_gate: nn.Module | None,
    gate_rows: Literal["first", "last"] | None,
    k: int | None,
    activation: str,
    dropout_p: float,
    stand_in: StandIn | None,
    *,
    because: str | None = None,
) -> Tensor:
    """The same by calls of the layers, with every neuron in memory; with the reason where that is a loss."""
    if because is not None and not torch.compiler.is_compiling():
        warnings.warn(
            f"a top-k network calls its layers and computes every neuron, because {because}; that costs the memory and "
            "time that it would save, so leave the network out with where= or remove what was added",
            stacklevel=4,
        )
    hidden = ranked_by = linear_in(x)
    sizes = linear_sizes(linear_out)
    if sizes is not None and hidden.shape[-1] != (1 if gate_rows is None else 2) * sizes[0]:
        raise RuntimeError(
            f"a top-k network must see all {sizes[0]} neurons of a token, but its first layer gave {hidden.shape[-1]} "
            "numbers: its layers are cut over several processes, and it can only call them"
            + (f", because {because}" if because is not None else "")
            + "; leave its layers whole, or the network out with where="
        )
    gate = None if linear_gate is None else linear_gate(x)
    if gate_rows is not None:
        gate, hidden = halves(hidden, gate_rows, dim=-1)
    if gate is None:
        hidden = activate(hidden, activation)
    else:
        hidden = activate(gate, activation) * hidden
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
    return output if stand_in is None else _with_stand_in(output, x, stand_in)


def _with_stand_in(output: Tensor, x: Tensor, stand_in: StandIn) -> Tensor:
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
        linear = without_adapters(linear)
        weight = getattr(linear, "weight", None)
        if type(weight) is not nn.Parameter or weight.requires_grad or weight.ndim != 2 or weight.is_meta:
            continue
        if neuron_axis != (1 if is_conv1d(linear) else 0) and not weight.t().is_contiguous():
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
    gate_rows    "first" or "last" where linear_in is nn.Linear(C, 2 F) and computes the gate too, as in Phi-3: which
                 half of its rows the gate has
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

    LoRA or DoRA of PEFT on the layers, and weights that torchao quantised, are part of what is computed. Another
    adapter, a hook or a parametrization on one of the layers acts; every neuron is then computed, with a warning.

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
        gate_rows: Literal["first", "last"] | None = None,
        activation: str = "relu",
        dropout_p: float = 0.0,
        backend: str = "auto",
        token_chunk_size: int | None = None,
        stand_in: StandIn | None = None,
        names: tuple[str, str, str] = ("linear_in", "linear_out", "linear_gate"),
    ) -> None:
        super().__init__()
        _check_gate_rows(gate_rows, linear_in, linear_out, linear_gate)
        self.gate_rows = gate_rows
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
            gate_rows=self.gate_rows,
        )

    def _store_by_neuron(self) -> None:
        linear_in, linear_out, linear_gate = (getattr(self, name) for name in self._names)
        store_by_neuron(linear_in=linear_in, linear_out=linear_out)
        store_by_neuron(linear_in=linear_gate)

    def extra_repr(self) -> str:
        return f"k={self.k}, activation={self.activation!r}, backend={self.backend!r}"


def _check_gate_rows(gate_rows: object, linear_in: Any, linear_out: Any, linear_gate: Any) -> None:
    if gate_rows is None:
        return
    if gate_rows not in ("first", "last"):
        raise ValueError(f'gate_rows must be "first", "last" or None, got {gate_rows!r}')
    if linear_gate is not None:
        raise ValueError("gate_rows says that linear_in computes the gate, but there is a linear_gate too; pass one")
    sizes_in, sizes_out = linear_sizes(linear_in), linear_sizes(linear_out)
    if sizes_in is not None and sizes_out is not None and sizes_in[1] != 2 * sizes_out[0]:
        raise ValueError(
            f"gate_rows needs a linear_in with {2 * sizes_out[0]} outputs, two for each of the {sizes_out[0]} neurons "
            f"that linear_out reads, got {sizes_in[1]}"
        )
