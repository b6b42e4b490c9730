"""The Llama kind (Llama, Mistral, Qwen2, SmolLM2, Gemma, ...): q, k, v and o projections, and a gated network."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

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
    activation = getattr(getattr(original, "config", None), "hidden_act", None)
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
        setattr(owner, name, original.train(module.training))

    yield FeedForwardSite(
        path,
        module,
        getattr(linears["up_proj"], "out_features", 0),
        obstacle_of(linears, activation),
        replace,
        None if original is module else restore,
    )


def _has(module: nn.Module, *names: str) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Module) for name in names)
