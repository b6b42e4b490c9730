"""Networks that are a module of their own (Llama, Mistral, T5, GPT-2, DistilBERT, ViT, Phi-3, ...).

Such a module has two linear layers, or three where the network is gated and gate and up are not one matrix.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..backends.activations import activate
from ..functional import StandIn
from ..nn import TopKFeedForward
from ..nn.feed_forward import stand_in_of, store_as_usual
from ..nn.linears import added_to_call, halves, linear_sizes
from ..nn.shards import Cut, cut_of, network_of_shards, why_not_in_parts
from .sites import (
    FeedForwardSite,
    activation_of,
    attribute_owner,
    hold_stand_in,
    obstacle_of,
    own_forward,
    sharded_by_itself,
    share_hooks,
)
from .trials import SCALES, evaluating, failure, is_same


class _Kind(NamedTuple):
    """The names of a network's layers, of its dropouts, and what its code alone says.

    gate_rows       where linear_in computes the gate too: which half of its rows the gate has; "either" where families
                    differ under the same names, so that a trial shows it
    neuron_dropout  of the neurons, a module or a number; likewise output_dropout
    activation      where the code names it and the module holds none
    act             the one name of the module's activation: others with layers of these names are no networks
    """

    linear_in: str
    linear_out: str
    linear_gate: str | None = None
    gate_rows: Literal["first", "last", "either"] | None = None
    neuron_dropout: str | None = None
    output_dropout: str | None = None
    activation: str | None = None
    act: str | None = None

    @property
    def linears(self) -> list[str]:
        return [name for name in self[:3] if name is not None]

    @property
    def dropouts(self) -> set[str]:
        return {name for name in (self.neuron_dropout, self.output_dropout) if name is not None}

    @property
    def is_gated(self) -> bool:
        return self.linear_gate is not None or self.gate_rows is not None


# Of those that fit a module by their names the first counts.
_KINDS = (
    _Kind("up_proj", "down_proj", "gate_proj", neuron_dropout="dropout"),  # GTE
    _Kind("up_proj", "down_proj", "gate_proj", output_dropout="residual_dropout"),  # Seed-OSS
    _Kind("up_proj", "down_proj", "gate_proj"),  # Llama, Mistral, Qwen2, Gemma, ...
    _Kind("gate_up_proj", "down_proj", gate_rows="first"),  # Phi-3, GLM-4, ...
    _Kind("Wi", "Wo", gate_rows="first", neuron_dropout="drop"),  # ModernBERT
    _Kind("input_linear", "output_linear", gate_rows="first"),  # shared experts of GraniteMoE
    _Kind("fc1", "fc2", gate_rows="either"),  # Moonshine's decoder (last), Moshi (first)
    _Kind("w3", "w2", "w1", activation="silu"),  # LFM2
    _Kind("wi_1", "wo", "wi_0", neuron_dropout="dropout"),  # flan-T5
    _Kind("wi", "wo", neuron_dropout="dropout"),  # T5
    _Kind("c_fc", "c_proj", output_dropout="dropout"),  # GPT-2, GPT-1
    _Kind("fc_in", "fc_out", output_dropout="dropout"),  # GPT-J, CodeGen
    _Kind("in_proj", "out_proj", output_dropout="dropout", act="gelu"),  # Bark
    _Kind("lin1", "lin2", output_dropout="dropout"),  # DistilBERT, XLM
    _Kind("intermediate_dense", "output_dense", None, None, "intermediate_dropout", "output_dropout"),  # wav2vec 2.0
    _Kind("linear1", "linear2", neuron_dropout="activation_dropout"),  # Parakeet
    _Kind("fc1", "fc2", neuron_dropout="hidden_dropout", output_dropout="hidden_dropout"),  # Fun-ASR
    _Kind("fc1", "fc2", neuron_dropout="drop", output_dropout="drop"),  # MGP-STR
    _Kind("fc1", "fc2", neuron_dropout="dropout"),  # NLLB-MoE
    _Kind("fc1", "fc2"),  # ViT, CLIP, ...
    _Kind("linear_fc1", "linear_fc2"),  # the vision part of Qwen3-VL
    _Kind("dense1", "dense2", neuron_dropout="dropout", output_dropout="dropout"),  # PVT
    _Kind("dense1", "dense2"),  # Perceiver
    _Kind("up_proj", "down_proj", output_dropout="hidden_dropout"),  # MPT
    _Kind("up_proj", "down_proj"),  # Nemotron
    _Kind("dense_h_to_4h", "dense_4h_to_h", output_dropout="hidden_dropout"),  # BLOOM
    _Kind("dense_h_to_4h", "dense_4h_to_h"),  # GPT-NeoX, Persimmon
)
_ACTIVATIONS = ("act_fn", "act", "activation_fn", "activation", "intermediate_act_fn", "gelu_impl", "gelu")
# A replaced network keeps the original in this attribute: in a tuple, so that it is no submodule and its weights count
# once.
_ORIGINAL = "_topk_attention_original"


class TopKNetwork(TopKFeedForward):
    """TopKFeedForward followed by dropout and a residual, for networks that end with them."""

    output_dropout_p = 0.0

    def _store_by_neuron(self) -> None:
        """Left to `convert`, which looks whether anything in the whole model trains."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        output = super().forward(x)
        if self.output_dropout_p != 0:
            output = nn.functional.dropout(output, self.output_dropout_p, self.training)
        return output if residual is None else output + residual


def feed_forward_sites(model: nn.Module, path: str, module: nn.Module) -> Iterator[FeedForwardSite]:
    original: Any = getattr(module, _ORIGINAL, (module,))[0]
    kind = _kind_of(original)
    if kind is None:
        return
    act_name = None if kind.activation is not None else _activation_name(original)
    if (kind.activation is None and act_name is None) or kind.act not in (None, act_name):
        return
    # Those of a converted network may be others by now: an adapter may have taken the place of one.
    linears = {name: getattr(module, name) for name in kind.linears}
    dropouts = _dropouts(original, kind)
    further = set(dict(original.named_children())) - {*linears, act_name}
    others = further - set(dropouts)
    if (further and act_name == "activation_fn") or (others and kind.linear_in == "linear1"):
        return  # a whole layer that computes its network inside its own forward method
    if act_name is None:
        activation, act = kind.activation, functools.partial(activate, name=str(kind.activation))
    else:
        act = getattr(original, act_name)
        activation = activation_of(model, path, original, act)
    owner, name = attribute_owner(model, path)

    def examine() -> str | None:
        if (sharded := sharded_by_itself({"the network": module})) is not None:
            return sharded
        cut = _cut_of(linears, kind)
        if isinstance(cut, str):
            return f"it is cut over several processes (tensor parallel), and {cut}"
        obstacle = obstacle_of(linears, activation, act, {str(act_name): act, **dropouts}, cut=cut)
        if obstacle is None and cut is not None:
            obstacle = why_not_in_parts(activation, _probability(dropouts.get(str(kind.neuron_dropout))))
        if obstacle is None and original is module:  # a converted one passed the trial
            obstacle = _obstacle(original, _with_known_rows(original, kind, str(activation)), str(activation), others)
        return obstacle

    def replace(k: int | None, backend: str, stand_in: StandIn | None) -> None:
        known: Any = module if isinstance(module, TopKNetwork) else _with_known_rows(original, kind, str(activation))
        layer = TopKNetwork(
            linears[kind.linear_in],
            linears[kind.linear_out],
            linear_gate=None if kind.linear_gate is None else linears[kind.linear_gate],
            gate_rows=known.gate_rows,
            k=k,
            activation=str(activation),
            dropout_p=_probability(dropouts.get(str(kind.neuron_dropout))),
            backend=backend,
            names=(kind.linear_in, kind.linear_out, kind.linear_gate or "linear_gate"),
        ).train(original.training)
        layer.stand_in = hold_stand_in(stand_in, linears[kind.linear_out])
        layer.output_dropout_p = _probability(dropouts.get(str(kind.output_dropout)))
        # Optimizers know parameters by their order alone: a state that was saved before goes on to the right ones.
        for linear in [linear for linear in original._modules if linear in layer._modules]:
            layer._modules[linear] = layer._modules.pop(linear)
        setattr(layer, _ORIGINAL, (original,))
        share_hooks(module, layer)
        setattr(owner, name, layer)

    def restore() -> None:
        if (sharded := sharded_by_itself({"the network": module})) is not None:
            raise RuntimeError(f"{path} cannot be restored: {sharded}")
        for linear in linears:
            setattr(original, linear, getattr(module, linear))
            store_as_usual(getattr(module, linear))
        share_hooks(module, original)
        setattr(owner, name, original.train(module.training))

    yield FeedForwardSite(
        path,
        module,
        tuple(linears[name] for name in (kind.linear_in, kind.linear_gate) if name is not None),
        linears[kind.linear_out],
        examine,
        replace,
        None if original is module else restore,
        stand_in_of(module),
    )


def _obstacle(network: nn.Module, kind: _Kind, activation: str, others: set[str]) -> str | None:
    """Why a network with known layers cannot be replaced; None where it can.

    others  names of its further modules
    """
    name = type(network).__name__
    if "forward" in vars(network):
        return f"{name} has {added_to_call(network)}"
    if others:
        return f"{name} does more than its projections: {', '.join(sorted(others))}"
    if (dropout := _own_dropout(network, kind)) is not None:
        return f"{name} applies dropout in its own code ({dropout}), at an unknown place"
    if kind.gate_rows == "either":
        return f"{name} holds gate and up in one matrix, and which half is which shows only with weights; load it first"
    drops_out = [dropout for dropout, module in _dropouts(network, kind).items() if _probability(module) > 0]
    try:
        is_plain = _is_plain(network, kind, activation)
        drops_as_known = not drops_out or not is_plain or _is_plain(network, kind, activation, training=True)
    except MemoryError:
        raise
    except Exception as error:  # whatever its code raises: no reason to give up on the other layers
        return failure(name, error)
    if not is_plain:
        formula = "down(act(gate) * up)" if kind.is_gated else f"{kind.linear_out}(act({kind.linear_in}))"
        return f"{name} computes something else than {formula}"
    if not drops_as_known:
        return f"{name} applies dropout in its own code ({', '.join(drops_out)}), at an unknown place"
    return None


def _kind_of(module: Any) -> _Kind | None:
    kinds = [kind for kind in _KINDS if _fits(module, kind)]
    kinds = [kind for kind in kinds if len(_dropouts(module, kind)) == len(kind.dropouts)] or kinds
    return kinds[0] if kinds else None


def _cut_of(linears: Mapping[str, Any], kind: _Kind) -> Cut | str | None:
    """How processes share the layers of a network; None where each has all, in words where it has no top-k form."""
    return cut_of(*(None if name is None else linears[name] for name in kind[:3]))


def _fits(module: Any, kind: _Kind) -> bool:
    """Whether a module has the layers of this kind, and gate and up in one matrix or in two."""
    linears = [getattr(module, name, None) for name in kind.linears]
    if not all(isinstance(linear, nn.Module) for linear in linears):
        return False
    sizes_in, sizes_out = linear_sizes(linears[0]), linear_sizes(linears[1])
    is_fused = sizes_in is not None and sizes_out is not None and sizes_in[1] == 2 * sizes_out[0]
    return is_fused == (kind.gate_rows is not None)


def _with_known_rows(network: nn.Module, kind: _Kind, activation: str) -> _Kind:
    """The kind with the half that is the gate's, as a trial of both shows it."""
    weight: Any = getattr(network, kind.linear_in).weight
    if kind.gate_rows != "either" or weight.is_meta:
        return kind
    first, last = kind._replace(gate_rows="first"), kind._replace(gate_rows="last")
    try:
        return first if _is_plain(network, first, activation) else last
    except MemoryError:
        raise
    except Exception:  # `_obstacle` tries again and says what it was
        return last


def _activation_name(module: nn.Module) -> str | None:
    return next((name for name in _ACTIVATIONS if callable(getattr(module, name, None))), None)


def _dropouts(network: nn.Module, kind: _Kind) -> dict[str, nn.Dropout | float]:
    """The dropouts of a network whose place is known, by their names."""
    named = {name: getattr(network, name, None) for name in kind.dropouts}
    return {name: dropout for name, dropout in named.items() if isinstance(dropout, nn.Dropout | float)}


def _probability(dropout: nn.Dropout | float | None) -> float:
    return dropout.p if isinstance(dropout, nn.Dropout) else dropout or 0.0


def _own_dropout(network: nn.Module, kind: _Kind) -> str | None:
    """The name of a dropout that is a number and has no known place. A trial in evaluation mode does not show it."""
    known = _dropouts(network, kind)
    return next(
        (
            name
            for name, p in vars(network).items()
            if "dropout" in name and name not in known and isinstance(p, float) and p > 0
        ),
        None,
    )


def _is_plain(network: Any, kind: _Kind, activation: str, *, training: bool = False) -> bool:
    """Whether the network computes out(act(in)) or out(act(gate) * in), in training with its dropouts in their places.

    A few random tokens decide. Drawing them does not change the global random state. Networks on other devices than the
    CPU are not tried in training: their random numbers are others' too.
    """
    linear_in, linear_out = getattr(network, kind.linear_in), getattr(network, kind.linear_out)
    weight = linear_in.weight
    sizes = linear_sizes(linear_in)
    if weight.is_meta or sizes is None or (training and weight.device.type != "cpu"):
        return True
    unscaled = torch.randn(2, 1, 4, sizes[0], generator=torch.Generator().manual_seed(0))
    dropouts = _dropouts(network, kind)
    p_neurons, p_output = (_probability(dropouts.get(str(name))) for name in (kind.neuron_dropout, kind.output_dropout))
    cut = _cut_of({name: getattr(network, name) for name in kind.linears}, kind)
    takes_residual = "residual" in inspect.signature(own_forward(network)).parameters

    def expected(x: Tensor) -> Tensor:
        if isinstance(cut, Cut):  # its parts, as they will be computed
            gate = None if kind.linear_gate is None else getattr(network, kind.linear_gate)
            known: Any = kind.gate_rows
            parts = {"k": None, "activation": activation, "backend": "auto", "gate_rows": known}
            return nn.functional.dropout(
                network_of_shards(x, cut, linear_in, linear_out, gate, **parts), p_output, training
            )
        hidden = linear_in(x)
        if kind.is_gated:
            if kind.linear_gate is not None:
                gate = getattr(network, kind.linear_gate)(x)
            else:
                gate, hidden = halves(hidden, kind.gate_rows, dim=-1)
            hidden = activate(gate, activation) * hidden
        else:
            hidden = activate(hidden, activation)
        hidden = nn.functional.dropout(hidden, p_neurons, training).to(linear_out.weight.dtype)
        return nn.functional.dropout(linear_out(hidden), p_output, training)

    with evaluating(network), torch.no_grad(), torch.random.fork_rng([]):
        for part in (network, *dropouts.values()):
            if isinstance(part, nn.Module):
                part.training = training
        for scale in SCALES:
            x, residual = (scale * unscaled).to(weight.device, weight.dtype)
            torch.default_generator.manual_seed(0)
            wanted = expected(x)
            torch.default_generator.manual_seed(0)
            # Not network(x): the trial is nothing that its hooks should see.
            if takes_residual:
                residual = residual[..., :1].expand_as(wanted)
                wanted, output = wanted + residual, network.forward(x, residual)
            else:
                output = network.forward(x)
            if not is_same(output, wanted):
                return False
    return True
