"""The Llama kind (Llama, Mistral, Qwen2, SmolLM2, Gemma, ...): q, k, v and o projections, and a gated network."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..backends.activations import activate
from ..nn import TopKFeedForward
from .sites import FeedForwardSite, attribute_owner, obstacle_of

_NAMES = ("up_proj", "down_proj", "gate_proj")
# Where a replaced network keeps the original: in a tuple, so that it is no submodule and its weights count once.
_ORIGINAL = "_topk_attention_original"


def is_attention(module: nn.Module) -> bool:
    return _has(module, "q_proj", "k_proj", "v_proj", "o_proj") and hasattr(module, "scaling")


def feed_forward_sites(model: nn.Module, path: str, module: nn.Module) -> Iterator[FeedForwardSite]:
    original = getattr(module, _ORIGINAL, (module,))[0]
    if not _has(original, *_NAMES) or not hasattr(original, "act_fn"):
        return
    linears = {name: getattr(original, name) for name in _NAMES}
    activation = _activation(original) or _activation(model)
    obstacle = obstacle_of(linears, activation)
    if obstacle is None and (others := set(dict(original.named_children())) - {*_NAMES, "act_fn"}):
        obstacle = f"{type(original).__name__} does more than its projections: {', '.join(sorted(others))}"
    if obstacle is None and not _is_plain(original, str(activation)):
        obstacle = f"{type(original).__name__} computes something else than down(act(gate) * up)"
    owner, name = attribute_owner(model, path)

    def replace(k: int, backend: str) -> None:
        layer = TopKFeedForward(
            linears["up_proj"],
            linears["down_proj"],
            linear_gate=linears["gate_proj"],
            k=k,
            activation=str(activation),
            backend=backend,
            names=_NAMES,
        ).train(original.training)
        setattr(layer, _ORIGINAL, (original,))
        setattr(owner, name, layer)

    def restore() -> None:
        for linear in _NAMES:
            setattr(original, linear, getattr(module, linear))
        setattr(owner, name, original.train(module.training))

    yield FeedForwardSite(
        path,
        module,
        getattr(linears["up_proj"], "out_features", 0),
        obstacle,
        replace,
        None if original is module else restore,
    )


def _activation(module: nn.Module) -> object:
    config = getattr(module, "config", None)
    return getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)


def _is_plain(network: Any, activation: str) -> bool:
    """Whether the network computes down(act(gate) * up), tried on a few random tokens: scales and clamps show.

    Inputs are large enough to reach a clamp, and drawn without touching the global random state.
    """
    weight = network.up_proj.weight
    if weight.is_meta:
        return True
    x = 8 * torch.randn(4, weight.shape[1], generator=torch.Generator().manual_seed(0))
    x = x.to(weight.device, weight.dtype)
    with torch.no_grad():
        expected = network.down_proj(activate(network.gate_proj(x), activation) * network.up_proj(x))
        return torch.allclose(network(x), expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))


def _has(module: nn.Module, *names: str) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Module) for name in names)
