"""Networks that are a module of their own (Llama, Mistral, T5, GPT-2, DistilBERT, ViT, ...).

Such a module has two linear layers, or three where the network is gated.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..backends.activations import activate
from ..functional import StandIn
from ..nn import TopKFeedForward
from ..nn.feed_forward import added_to_call, stand_in_of, store_as_usual
from .sites import FeedForwardSite, activation_of, attribute_owner, hold_stand_in, num_neurons, obstacle_of, share_hooks


class _Kind(NamedTuple):
    """The names of a network's layers, and what its dropout acts on."""

    linear_in: str
    linear_out: str
    linear_gate: str | None = None
    dropout: Literal["neurons", "output", None] = None


_KINDS = (
    _Kind("up_proj", "down_proj", "gate_proj"),  # Llama, Mistral, Qwen2, Gemma, ...
    _Kind("wi_1", "wo", "wi_0", dropout="neurons"),  # flan-T5
    _Kind("wi", "wo", dropout="neurons"),  # T5
    _Kind("c_fc", "c_proj", dropout="output"),  # GPT-2
    _Kind("lin1", "lin2", dropout="output"),  # DistilBERT
    _Kind("fc1", "fc2"),  # ViT, CLIP, ...
    _Kind("up_proj", "down_proj"),  # Nemotron
    _Kind("dense_h_to_4h", "dense_4h_to_h"),  # GPT-NeoX
)
# Scales of the random inputs that show whether a network computes what its configuration says.
_PROBE_SCALES = (8.0, 1.0, 0.125)
_ACTIVATIONS = ("act_fn", "act", "activation_fn", "activation")
# A replaced network keeps the original in this attribute: in a tuple, so that it is no submodule and its weights count
# once.
_ORIGINAL = "_topk_attention_original"


class TopKNetwork(TopKFeedForward):
    """TopKFeedForward followed by dropout, for networks that end with one."""

    output_dropout_p = 0.0

    def _store_by_neuron(self) -> None:
        """Left to `convert`, which looks whether anything in the whole model trains."""

    def forward(self, x: Tensor) -> Tensor:
        output = super().forward(x)
        if self.output_dropout_p == 0:
            return output
        return nn.functional.dropout(output, self.output_dropout_p, self.training)


def feed_forward_sites(model: nn.Module, path: str, module: nn.Module) -> Iterator[FeedForwardSite]:
    original = getattr(module, _ORIGINAL, (module,))[0]
    kind, act = _kind_of(original), _activation_name(original)
    if kind is None or act is None:
        return
    names = [name for name in kind[:3] if name is not None]
    # Those of a converted network may be others by now: an adapter may have taken the place of one.
    linears = {name: getattr(module, name) for name in names}
    dropout = getattr(original, "dropout", None) if kind.dropout is not None else None
    known = {*names, act, "dropout"} if isinstance(dropout, nn.Dropout) else {*names, act}
    others = set(dict(original.named_children())) - known
    if others and act == "activation_fn":
        return  # a whole layer that computes its network inside its own forward method
    activation = activation_of(model, path, original, getattr(original, act))
    owner, name = attribute_owner(model, path)

    def examine() -> str | None:
        bypassed = {act: getattr(original, act), "dropout": dropout}
        obstacle = obstacle_of(linears, activation, getattr(original, act), bypassed)
        if obstacle is None and original is module:  # a converted one passed the trial
            obstacle = _obstacle(original, kind, str(activation), others)
        return obstacle

    def replace(k: int | None, backend: str, stand_in: StandIn | None) -> None:
        dropout_p = dropout.p if isinstance(dropout, nn.Dropout) else 0.0
        layer = TopKNetwork(
            linears[kind.linear_in],
            linears[kind.linear_out],
            linear_gate=None if kind.linear_gate is None else linears[kind.linear_gate],
            k=k,
            activation=str(activation),
            dropout_p=dropout_p if kind.dropout == "neurons" else 0.0,
            backend=backend,
            names=(kind.linear_in, kind.linear_out, kind.linear_gate or "linear_gate"),
        ).train(original.training)
        layer.stand_in = hold_stand_in(stand_in, linears[kind.linear_out])
        layer.output_dropout_p = dropout_p if kind.dropout == "output" else 0.0
        # Optimizers know parameters by their order alone: a state that was saved before goes on to the right ones.
        for linear in [linear for linear in original._modules if linear in layer._modules]:
            layer._modules[linear] = layer._modules.pop(linear)
        setattr(layer, _ORIGINAL, (original,))
        share_hooks(module, layer)
        setattr(owner, name, layer)

    def restore() -> None:
        for linear in names:
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
    if (dropout := _own_dropout(network)) is not None:
        return f"{name} applies dropout in its own code ({dropout}), at an unknown place"
    try:
        is_plain = _is_plain(network, kind, activation)
    except MemoryError:
        raise
    except Exception as error:  # whatever its code raises: no reason to give up on the other layers
        return f"{name} could not be tried, {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    if not is_plain:
        gated = kind.linear_gate is not None
        formula = "down(act(gate) * up)" if gated else f"{kind.linear_out}(act({kind.linear_in}))"
        return f"{name} computes something else than {formula}"
    return None


def _kind_of(module: nn.Module) -> _Kind | None:
    for kind in _KINDS:
        if all(isinstance(getattr(module, name, None), nn.Module) for name in kind[:3] if name is not None):
            return kind
    return None


def _activation_name(module: nn.Module) -> str | None:
    return next((name for name in _ACTIVATIONS if callable(getattr(module, name, None))), None)


def _own_dropout(network: nn.Module) -> str | None:
    """The name of a dropout that is a number and no module. A trial in evaluation mode does not show it."""
    return next(
        (name for name, p in vars(network).items() if "dropout" in name and isinstance(p, float) and p > 0), None
    )


def _is_plain(network: Any, kind: _Kind, activation: str) -> bool:
    """Whether the network computes out(act(in)) or out(act(gate) * in). A few random tokens decide.

    Large inputs reveal a clamp, small ones an offset. Drawing them does not change the global random state.
    """
    linear_in, linear_out = getattr(network, kind.linear_in), getattr(network, kind.linear_out)
    weight = linear_in.weight
    if weight.is_meta:
        return True
    size = weight.numel() // num_neurons(linear_in)
    unscaled = torch.randn(1, 4, size, generator=torch.Generator().manual_seed(0))
    training = {module: module.training for module in network.modules()}
    try:
        network.eval()
        with torch.no_grad():
            for scale in _PROBE_SCALES:
                x = (scale * unscaled).to(weight.device, weight.dtype)
                if kind.linear_gate is None:
                    hidden = activate(linear_in(x), activation)
                else:
                    hidden = activate(getattr(network, kind.linear_gate)(x), activation) * linear_in(x)
                expected = linear_out(hidden.to(linear_out.weight.dtype))
                # Not network(x): the trial is nothing that its hooks should see.
                if not torch.allclose(network.forward(x), expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max())):
                    return False
            return True
    finally:
        for module, was_training in training.items():
            module.training = was_training
