"""Ready predicates for `convert(where=...)`."""

from __future__ import annotations

from torch import nn


def is_cross_attention(path: str, module: nn.Module) -> bool:
    """An attention layer whose keys come from another sequence."""
    names = (*path.lower().split("."), type(module).__name__.lower())
    return any("cross" in name or name in ("encoder_attn", "encdecattention", "multihead_attn") for name in names)


def is_self_attention(path: str, module: nn.Module) -> bool:
    """An attention layer whose queries and keys come from the same sequence."""
    names = (*path.lower().split("."), type(module).__name__.lower())
    return any("attention" in name or "attn" in name for name in names) and not is_cross_attention(path, module)
