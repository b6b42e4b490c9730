"""The places in a model that a conversion can change. One file per way in which families differ finds them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..backends.activations import ACTIVATIONS


@dataclass(frozen=True)
class AttentionSite:
    """An attention layer that reads its function from transformers' attention interface."""

    path: str
    module: nn.Module
    num_heads: int | None
    obstacle: str | None  # why it cannot be replaced


@dataclass(frozen=True)
class FeedForwardSite:
    """A feed-forward network and how to replace it."""

    path: str
    module: nn.Module
    num_neurons: int
    obstacle: str | None  # why it cannot be replaced
    replace: Callable[[int, str], None]  # with k and a backend; again with another k to change it
    restore: Callable[[], None] | None  # None where it is still the original


def obstacle_of(linears: dict[str, nn.Module | None], activation: Any) -> str | None:
    """Why these layers cannot become a top-k network, or None."""
    for name, linear in linears.items():
        if type(linear) is not nn.Linear:
            return f"{name} is {type(linear).__name__}, not nn.Linear"
    if activation not in ACTIVATIONS:
        return f"activation {activation!r} has no top-k form"
    return None


def attribute_owner(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that holds the one at this path, and its name there."""
    parent, _, name = path.rpartition(".")
    return model.get_submodule(parent), name


def attention_sites(model: nn.Module) -> Iterator[AttentionSite]:
    from . import bert, llama

    for path, module in model.named_modules():
        if llama.is_attention(module) or bert.is_attention(module):
            yield AttentionSite(path, module, _num_heads(module), _attention_obstacle(module))


def feed_forward_sites(model: nn.Module) -> Iterator[FeedForwardSite]:
    from . import bert, llama

    # A network that several layers share is replaced in each of them; its weights stay shared.
    for path, module in model.named_modules(remove_duplicate=False):
        yield from llama.feed_forward_sites(model, path, module)
    for path, module in model.named_modules():
        yield from bert.feed_forward_sites(model, path, module)


def _attention_obstacle(module: nn.Module) -> str | None:
    if getattr(module, "attn_logit_softcapping", None) is not None:
        return "its scores have a soft cap"
    if getattr(module, "sinks", None) is not None:
        return "it has attention sinks"
    return None


def _num_heads(module: nn.Module) -> int | None:
    for holder in (module, getattr(module, "config", None)):
        if (num_heads := getattr(holder, "num_attention_heads", None)) is not None:
            return int(num_heads)
    return None
