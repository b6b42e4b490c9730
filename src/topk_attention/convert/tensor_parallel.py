"""Models whose linear layers are cut over several processes, as `from_pretrained(..., tp_plan="auto")` cuts them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

from torch import nn

from ..nn.shards import is_cut

_PerHead = TypeVar("_PerHead", int, float)


def cut_over_processes(linear: Any) -> str | None:
    """Why a layer that holds some of the neurons is no layer of a top-k network; None for a whole layer."""
    if not is_cut(linear):
        return None
    return "is cut over several processes (tensor parallel), and the k best neurons are chosen among all"


def of_own_heads(module: nn.Module, per_head: tuple[_PerHead, ...], num_heads: int) -> tuple[_PerHead, ...]:
    """Those numbers of a layer's, one per head, that are for the heads of this process; all if the layer is not cut.

    num_heads  how many heads this process has
    """
    if len(per_head) == num_heads:
        return per_head
    for mesh, axis in _cuts(module):
        if mesh.size(axis) * num_heads == len(per_head):
            first = mesh.get_local_rank(axis) * num_heads
            return per_head[first : first + num_heads]
    return per_head


def group_of_heads(module: nn.Module) -> Any:
    """The processes of which each has some heads of this attention layer; None for a layer that is not cut."""
    if not any(map(is_cut, module.modules())):
        return None
    return next((mesh.get_group(axis) for mesh, axis in _cuts(module)), None)


def _cuts(module: nn.Module) -> Iterator[tuple[Any, int]]:
    """The meshes, and the axes of them, along which weights of a layer are cut by their outputs."""
    for weight in module.parameters():
        for axis, placement in enumerate(getattr(weight, "placements", ())):
            if placement.is_shard(0):
                yield getattr(weight, "device_mesh", None), axis
