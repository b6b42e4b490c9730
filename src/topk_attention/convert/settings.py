"""Which k a layer uses, and how that travels with a model's configuration."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from torch import nn

# What a model loaded with attn_implementation="topk" uses when nothing else was said: the k of the paper's
# attention-layer and Long Range Arena settings.
DEFAULT_ATTENTION_K = 128

CONFIG_ATTRIBUTE = "topk_attention"
_LAYER_ATTRIBUTE = "_topk_attention_layer"

K = int | tuple[int, ...]


@dataclass(frozen=True)
class LayerSettings:
    """How one attention layer runs; k = None leaves it to PyTorch's attention."""

    k: K | None
    backend: str = "auto"


@dataclass(frozen=True)
class ModelSettings:
    """What `convert` did to a model, by layer path without the model's base prefix."""

    attention_k: dict[str, K]
    feed_forward_k: dict[str, K]
    attention_backend: str = "auto"
    feed_forward_backend: str = "auto"

    def to_json(self) -> dict[str, Any]:
        return {
            "attention_k": {path: list(k) if isinstance(k, tuple) else k for path, k in self.attention_k.items()},
            "feed_forward_k": dict(self.feed_forward_k),
            "attention_backend": self.attention_backend,
            "feed_forward_backend": self.feed_forward_backend,
        }

    @staticmethod
    def from_config(config: object) -> ModelSettings | None:
        stored = getattr(config, CONFIG_ATTRIBUTE, None)
        if stored is None:
            return None

        def k_of(value: int | list[int]) -> K:
            return tuple(value) if isinstance(value, list) else value

        return ModelSettings(
            {path: k_of(k) for path, k in stored["attention_k"].items()},
            dict(stored["feed_forward_k"]),
            stored.get("attention_backend", "auto"),
            stored.get("feed_forward_backend", "auto"),
        )


def set_layer_settings(module: nn.Module, settings: LayerSettings | None) -> None:
    if settings is not None:
        setattr(module, _LAYER_ATTRIBUTE, settings)
    elif hasattr(module, _LAYER_ATTRIBUTE):
        delattr(module, _LAYER_ATTRIBUTE)


def layer_settings(module: nn.Module) -> LayerSettings:
    """What `convert` told this layer; the default where attn_implementation="topk" is all that was said."""
    settings = getattr(module, _LAYER_ATTRIBUTE, None)
    if settings is not None:
        return settings
    stored = ModelSettings.from_config(getattr(module, "config", None))
    if stored is not None and stored.attention_k:
        raise RuntimeError(
            "this checkpoint was saved with its own k for each layer; call topk_attention.convert(model) after "
            "from_pretrained to restore them"
        )
    warnings.warn(
        f'attn_implementation="topk" without a k: using {DEFAULT_ATTENTION_K}; choose one with '
        "topk_attention.convert(model, attention_k=...)",
        stacklevel=2,
    )
    settings = LayerSettings(DEFAULT_ATTENTION_K)
    set_layer_settings(module, settings)
    return settings
