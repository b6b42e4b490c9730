"""Finds the places in a model that a conversion can change: attention layers and feed-forward networks."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from . import adapters, experts, inline_network, network_module, split_network, torch_layers
from .fully_sharded import examined_whole, left_as_sharded
from .sites import AttentionSite, FeedForwardSite, asks_interface, full_name_of, own_forward


def attention_sites(model: nn.Module) -> Iterator[AttentionSite]:
    """Every attention layer of the model, in the order of its modules."""
    why_not_adapted = _why_not_adapted(model)
    for path, module in model.named_modules():
        if reads_attention_interface(module):
            obstacle = attention_obstacle(module)
            yield AttentionSite(path, module, _num_heads(module), obstacle, True, soft_cap(module))
        elif asks_interface(type(module).forward):
            obstacle = f"its forward method was replaced by {full_name_of(own_forward(module))}, which does not ask "
            yield AttentionSite(path, module, None, obstacle + "transformers' attention interface", False)
        elif adapters.has_adapter(module):
            yield AttentionSite(path, module, _num_heads(module), why_not_adapted, False, has_adapter=True)
        elif torch_layers.is_attention(module):
            yield AttentionSite(path, module, _num_heads(module), torch_layers.attention_obstacle(module), False)


def _why_not_adapted(model: nn.Module) -> str | None:
    """Why the layers that have an adapter cannot be adapted: all or none, as layers around them work for all."""
    for path, module in model.named_modules():
        if adapters.has_adapter(module) and (obstacle := adapters.adapter_obstacle(module)) is not None:
            return f"{path}: {obstacle}"
    return None


def reads_attention_interface(module: nn.Module) -> bool:
    """Whether the module looks up its attention function in transformers' table. Its code shows it.

    Model families give different names to their projections. Only the code of the layer tells the two kinds apart.
    """
    return asks_interface(own_forward(module))


def feed_forward_sites(model: nn.Module) -> Iterator[FeedForwardSite]:
    """Every feed-forward network of the model, one file per form that a network can have."""
    seen = set()
    # A network that several layers share is replaced in each of them; its weights stay shared. Experts stay the same
    # module, so one place is enough.
    for path, module in model.named_modules(remove_duplicate=False):
        for site in network_module.feed_forward_sites(model, path, module):
            yield examined_whole(model, site)
        if module not in seen:
            yield from experts.feed_forward_sites(path, module)
        seen.add(module)
    for path, module in model.named_modules():
        for site in split_network.feed_forward_sites(model, path, module):
            yield examined_whole(model, site)
        for site in inline_network.feed_forward_sites(model, path, module):
            yield left_as_sharded(site)
        yield from torch_layers.feed_forward_sites(path, module)


def attention_obstacle(module: nn.Module) -> str | None:
    arguments = _named_arguments(own_forward(module))
    if getattr(module, "sinks", None) is not None and "s_aux" not in arguments:
        return "it has attention sinks that it does not hand to attention as s_aux="
    if getattr(module, "compressor", None) is not None:  # DeepSeek-V4
        return "it adds compressed keys to the others, and hands on a mask that knows of the others alone"
    return None


def soft_cap(module: nn.Module) -> float | None:
    """The soft cap that an attention layer hands on with its scores; None where there is none."""
    return (
        getattr(module, "attn_logit_softcapping", None) if "softcap" in _named_arguments(own_forward(module)) else None
    )


def _named_arguments(function: object) -> set[str]:
    """The names by which a function's code passes arguments."""
    code = getattr(function, "__code__", None)
    tuples = (constant for constant in code.co_consts if isinstance(constant, tuple)) if code is not None else ()
    return {name for names in tuples for name in names if isinstance(name, str)}


def _num_heads(module: nn.Module) -> int | None:
    for holder in (module, getattr(module, "config", None)):
        for name in ("num_attention_heads", "num_heads", "n_heads"):
            if isinstance(num_heads := getattr(holder, name, None), int):
                return num_heads
    return None
