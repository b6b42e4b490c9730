"""Adapters for model families that compute attention in their own code: one file for each.

A class is known by its full name, so that a class that is built on one of these, with code of its own, is none of them.
A version of transformers whose class asks the attention interface needs no adapter and gets none.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..sites import asks_interface
from . import bloom, deberta, falcon, gpt_neo, gptj, layoutlmv3, mpnet
from .adapter import AdaptedLayer, adapt, give_back, is_adapted, name_of, obstacle_of

_MODELS = "transformers.models."
_ATTENTION: dict[str, type[AdaptedLayer]] = {
    f"{_MODELS}bloom.modeling_bloom.BloomAttention": bloom.BloomAttention,
    f"{_MODELS}deberta_v2.modeling_deberta_v2.DisentangledSelfAttention": deberta.DebertaV2Attention,
    f"{_MODELS}falcon.modeling_falcon.FalconAttention": falcon.FalconAttention,
    f"{_MODELS}gpt_neo.modeling_gpt_neo.GPTNeoSelfAttention": gpt_neo.GPTNeoAttention,
    f"{_MODELS}gptj.modeling_gptj.GPTJAttention": gptj.GPTJAttention,
    f"{_MODELS}layoutlmv3.modeling_layoutlmv3.LayoutLMv3SelfAttention": layoutlmv3.LayoutLMv3Attention,
    f"{_MODELS}mpnet.modeling_mpnet.MPNetSelfAttention": mpnet.MPNetAttention,
}
# Layers around them that compute something for all of them.
_AROUND: dict[str, type[AdaptedLayer]] = {
    f"{_MODELS}deberta_v2.modeling_deberta_v2.DebertaV2Encoder": deberta.DebertaV2Encoder,
    f"{_MODELS}layoutlmv3.modeling_layoutlmv3.LayoutLMv3Encoder": layoutlmv3.LayoutLMv3Encoder,
    f"{_MODELS}mpnet.modeling_mpnet.MPNetEncoder": mpnet.MPNetEncoder,
}
_FALCON_MODEL = f"{_MODELS}falcon.modeling_falcon.FalconModel"


def has_adapter(module: nn.Module) -> bool:
    """Whether this is an attention layer that has an adapter, in use or not."""
    return name_of(module) in _ATTENTION and (is_adapted(module) or not asks_interface(type(module).forward))


def adapter_obstacle(module: nn.Module) -> str | None:
    """Why an attention layer that has an adapter cannot be adapted; None where it can."""
    return obstacle_of(module, _ATTENTION[name_of(module)])


def adapt_attention(model: nn.Module, configs: Iterable[tuple[str, Any]]) -> None:
    """Let every attention layer that has an adapter ask for top-k attention.

    configs  the configuration that is in force at each path of the model
    """
    around = dict(configs)
    for path, module in model.named_modules():
        name = name_of(module)
        if has_adapter(module):
            adapt(module, _ATTENTION[name], around[path])
        elif name in _AROUND:
            adapt(module, _AROUND[name], around[path])
        elif name == _FALCON_MODEL:
            falcon.leave_bias_to_layers(module)


def give_attention_back(model: nn.Module) -> None:
    """Undo `adapt_attention`."""
    for module in model.modules():
        give_back(module)
        falcon.give_bias_back(module)


__all__ = ["adapt_attention", "adapter_obstacle", "give_attention_back", "has_adapter", "is_adapted"]
