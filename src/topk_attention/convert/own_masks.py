"""Masks for layers that compute attention in their own code, in a model of which other layers are converted.

The model makes one mask for all of them: a `CompactMask`. Own code may add a part of it to scores, or compare its shape
with theirs, and means a mask of numbers, or none, as its family's eager attention gets it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .masks import CompactMask

_HOOK = "_topk_attention_own_mask_hook"


def give_own_masks(module: nn.Module) -> None:
    """Let a layer that computes attention in its own code get the masks that it would get unconverted."""
    if not hasattr(module, _HOOK):
        setattr(module, _HOOK, module.register_forward_pre_hook(_write_out, with_kwargs=True))


def give_no_own_masks(module: nn.Module) -> None:
    """Undo `give_own_masks`."""
    if hasattr(module, _HOOK):
        getattr(module, _HOOK).remove()
        delattr(module, _HOOK)


def _write_out(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    given = (*args, *kwargs.values())
    states = next((x for x in given if isinstance(x, Tensor) and x.is_floating_point()), None)
    dtype = torch.get_default_dtype() if states is None else states.dtype

    def written_out(argument: Any) -> Any:
        return argument.as_eager(dtype) if isinstance(argument, CompactMask) else argument

    return tuple(map(written_out, args)), {name: written_out(x) for name, x in kwargs.items()}
