"""Which k a layer uses, and how that travels with a model's configuration."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from torch import nn

from ..functional import Completion
from ..functional.checks import check_count

# transformers knows this library's attention by this name: attn_implementation="topk".
NAME = "topk"
# The k of a model that is loaded with attn_implementation="topk" and without a k: that of the paper's attention-layer
# and Long Range Arena settings.
DEFAULT_ATTENTION_K = 128
# The environment variable for another k. It serves programs in which a user can choose the implementation alone.
K_VARIABLE = "TOPK_ATTENTION_K"

CONFIG_ATTRIBUTE = "topk_attention"
_LAYER_ATTRIBUTE = "_topk_attention_layer"

# Keeps every key, or every neuron. The library still computes the layer in chunks.
ALL: Literal["all"] = "all"

K = int | tuple[int, ...] | Literal["all"]


@dataclass(frozen=True)
class LayerSettings:
    """How one attention layer runs. With k = None it runs PyTorch's own attention.

    left_alone  the attention implementation of a layer that could not be converted; it runs that as before
    completion  what the layer adds for the keys that are not kept; None with k = None or "all"
    """

    k: K | None
    backend: str = "auto"
    left_alone: str | None = None
    completion: Completion | None = None

    @property
    def kept_keys(self) -> int | tuple[int, ...] | None:
        """The k in the form that `topk_attention` takes."""
        return None if self.k == ALL else self.k


@dataclass(frozen=True)
class ModelSettings:
    """What `convert` did to a model, by layer path without the model's base prefix.

    attention_k           k by layer path
    feed_forward_k        k by layer path
    attention_backend     the backend of all attention layers
    feed_forward_backend  the backend of all feed-forward layers
    every_attention_k     the k of all attention layers where they share one; a layer then finds its k without its path
    completion            completion by layer path, of the layers that have one
    every_completion      the completion of all attention layers where they share one
    stand_in_rank         rank of the stand-in by layer path, of the feed-forward layers that have one; its tensors are
                          in a file of their own
    """

    attention_k: dict[str, K]
    feed_forward_k: dict[str, K]
    attention_backend: str = "auto"
    feed_forward_backend: str = "auto"
    every_attention_k: K | None = None
    completion: dict[str, Completion] = field(default_factory=dict)
    every_completion: Completion | None = None
    stand_in_rank: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The form in which a configuration holds these settings."""

        def plain(k: K | None) -> Any:
            return list(k) if isinstance(k, tuple) else k

        stored = {
            "attention_k": {path: plain(k) for path, k in self.attention_k.items()},
            "feed_forward_k": dict(self.feed_forward_k),
            "attention_backend": self.attention_backend,
            "feed_forward_backend": self.feed_forward_backend,
            "every_attention_k": plain(self.every_attention_k),
        }
        if self.completion:
            stored["completion"] = {path: completion_to_json(one) for path, one in self.completion.items()}
            stored["every_completion"] = self.every_completion and completion_to_json(self.every_completion)
        if self.stand_in_rank:
            stored["stand_in_rank"] = dict(self.stand_in_rank)
        return stored

    @staticmethod
    def from_config(config: object) -> ModelSettings | None:
        """The settings that a model's configuration holds, or None.

        Raises:
            ValueError: they are not as `convert` writes them.
        """
        stored = getattr(config, CONFIG_ATTRIBUTE, None)
        if stored is None:
            return None
        try:
            every_completion = stored.get("every_completion")
            return ModelSettings(
                {path: _stored_k(k) for path, k in stored["attention_k"].items()},
                {path: _stored_k(k) for path, k in stored["feed_forward_k"].items()},
                stored.get("attention_backend", "auto"),
                stored.get("feed_forward_backend", "auto"),
                None if stored.get("every_attention_k") is None else _stored_k(stored["every_attention_k"]),
                {path: Completion(**one) for path, one in stored.get("completion", {}).items()},
                None if every_completion is None else Completion(**every_completion),
                dict(stored.get("stand_in_rank", {})),
            )
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(
                f'"{CONFIG_ATTRIBUTE}" in the configuration of this model is not as convert writes it ({error}); '
                "delete this entry of its config.json, load the model and convert it again"
            ) from error


def _stored_k(k: Any) -> Any:
    """A k as a configuration holds it."""
    if k == ALL:
        return ALL
    for number in k if isinstance(k, list) else [k]:
        check_count("k", number)
    return tuple(k) if isinstance(k, list) else k


def completion_to_json(completion: Completion) -> dict[str, Any]:
    """A completion whose scales are numbers, in the form in which a configuration holds it."""
    values = {part.name: getattr(completion, part.name) for part in fields(completion)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def set_layer_settings(module: nn.Module, settings: LayerSettings | None) -> None:
    """Store the settings of a layer on its module; None removes them."""
    if settings is not None:
        setattr(module, _LAYER_ATTRIBUTE, settings)
    elif hasattr(module, _LAYER_ATTRIBUTE):
        delattr(module, _LAYER_ATTRIBUTE)


def remembered_settings(module: nn.Module) -> LayerSettings | None:
    """The settings that a layer has found already; None for others."""
    settings: LayerSettings | None = getattr(module, _LAYER_ATTRIBUTE, None)
    return settings


def left_alone(module: nn.Module) -> str | None:
    """The attention implementation of a layer that `convert` could not convert and left as it was; None for others."""
    settings = remembered_settings(module)
    return None if settings is None else settings.left_alone


def layer_settings(module: nn.Module) -> LayerSettings:
    """The settings that `convert` gave to this layer.

    A model that was only loaded with attn_implementation="topk" takes, in this order, the k that it was saved with, the
    k of the environment variable TOPK_ATTENTION_K, or the default.

    Raises:
        RuntimeError: the model was saved with settings that a layer cannot restore by itself, or with another k than
            the environment variable holds.
        ValueError: the environment variable holds no k.
    """
    settings = remembered_settings(module)
    if settings is None:
        settings = _settings_of_the_name_alone(getattr(module, "config", None))
        set_layer_settings(module, settings)
    return settings


def _settings_of_the_name_alone(config: object) -> LayerSettings:
    wanted = _k_of_the_environment()
    stored = ModelSettings.from_config(config)
    if stored is not None and (stored.attention_k or stored.feed_forward_k):
        k = stored.every_attention_k
        if k is None or stored.feed_forward_k or (stored.completion and stored.every_completion is None):
            raise RuntimeError(
                "this checkpoint was saved with its own k for each layer; call topk_attention.convert(model) after "
                "from_pretrained to restore them"
            )
        if wanted not in (None, k):
            raise RuntimeError(
                f"{K_VARIABLE} is {wanted}, but this checkpoint was saved with k = {k}; unset the variable, or call "
                f"topk_attention.convert(model, attention_k={wanted}) after from_pretrained"
            )
        return LayerSettings(k, stored.attention_backend, completion=stored.every_completion)
    if wanted is None:
        warnings.warn(
            f'attn_implementation="topk" without a k: using {DEFAULT_ATTENTION_K}; choose one with '
            f"topk_attention.convert(model, attention_k=...) or the environment variable {K_VARIABLE}",
            stacklevel=4,
        )
    return LayerSettings(wanted or DEFAULT_ATTENTION_K)


def _k_of_the_environment() -> int | None:
    value = os.environ.get(K_VARIABLE, "").strip()
    if not value:
        return None
    if not value.isdecimal():
        raise ValueError(f"the environment variable {K_VARIABLE} must be a whole number, got {value!r}")
    check_count(K_VARIABLE, int(value))
    return int(value)
