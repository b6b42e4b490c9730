"""How a layer that computes attention in its own code becomes one that asks for top-k attention.

The layer remains the same module. Only its class changes, to a subclass whose code hands queries, keys and values to
the attention function of this library instead of computing scores. While the configuration names another attention, the
original code runs.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ...nn.linears import full_name
from ..attention_function import topk_attention_forward
from ..masks import CompactMask
from ..position_bias import TableBias
from ..settings import NAME
from ..sites import full_name_of, own_forward
from ..subclasses import Subclassed, subclass_of

_LENT = "_topk_attention_lent_config"


class AdaptedLayer(Subclassed):
    """What the classes of adapted layers have in common; the other base is the original class."""

    def runs_topk(self) -> bool:
        """Whether the configuration names top-k attention now."""
        config: Any = self.config
        return bool(config._attn_implementation == NAME)

    @staticmethod
    def why_not(layer: Any) -> str | None:
        """What this layer has that its adapter does not compute; None where there is nothing."""
        del layer
        return None


def is_adapted(module: nn.Module) -> bool:
    return isinstance(module, AdaptedLayer)


def obstacle_of(module: nn.Module, adapter: type[AdaptedLayer]) -> str | None:
    """Why this layer cannot be adapted; None where it can, or is already."""
    if is_adapted(module):
        return None
    replaced = next((name for name in vars(adapter) if name in vars(module)), None)
    if replaced is not None:
        by = own_forward(module) if replaced == "forward" else vars(module)[replaced]
        return f"its {replaced} method was replaced by {full_name_of(by)}"
    return adapter.why_not(module)


def adapt(module: Any, adapter: Any, config: Any) -> None:
    """Let a layer ask for top-k attention.

    config  the one around it, which layers without one of their own hold from now on
    """
    if is_adapted(module):
        return
    former_class: Any = type(module)
    module.__class__ = subclass_of(adapter, former_class)
    if getattr(module, "config", None) is None:
        module.config = config
        setattr(module, _LENT, True)


def give_back(module: Any) -> None:
    """Undo `adapt`."""
    if not is_adapted(module):
        return
    module.__class__ = module.topk_former_class
    if hasattr(module, _LENT):
        del module.config
        delattr(module, _LENT)


def heads_of(x: Tensor, num_heads: int) -> Tensor:
    """[..., tokens, H * D] as [..., H, tokens, D]."""
    return x.unflatten(-1, (num_heads, -1)).transpose(-2, -3)


def attend(
    layer: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: CompactMask | Tensor | None,
    *,
    scaling: float,
    dropout: Any = None,
    position_bias: Tensor | TableBias | None = None,
    output_attentions: bool = False,
    is_causal: bool | None = None,
) -> Tensor:
    """Attention as the settings of the layer say, [B, N, H, E].

    B batch, H heads, G key heads, N queries, M keys

    query      [B, H, N, D]
    key        [B, G, M, D]
    value      [B, G, M, E]
    is_causal  what no mask means; by default as the layer says
    dropout    the layer's nn.Dropout for weights, which is not called
    """
    output, _ = topk_attention_forward(
        layer,
        query,
        key,
        value,
        mask,
        scaling=scaling,
        dropout=dropout.p if dropout is not None and layer.training else 0.0,
        position_bias=position_bias,
        output_attentions=output_attentions,
        is_causal=is_causal,
    )
    return output


def name_of(module: nn.Module) -> str:
    """The name of the class that a layer has, or had before it was adapted."""
    former: type = module.topk_former_class if isinstance(module, AdaptedLayer) else type(module)
    return full_name(former)
