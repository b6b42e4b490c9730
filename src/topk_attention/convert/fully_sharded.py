"""Models whose weights torch's `fully_shard` (FSDP2) has dealt out over processes already.

The weights of a layer are whole while it runs. A trial of a network runs none of the layers around it, so they are made
whole for the trial: every process has to convert, as it has to call the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from ..functional import StandIn
from ..nn.shards import is_fully_sharded
from .sites import FeedForwardSite


def examined_whole(model: nn.Module, site: FeedForwardSite) -> FeedForwardSite:
    """The site, whose weights are whole while it is examined and replaced."""
    linears = (*site.linears_in, site.linear_out)
    holders = _sharded_around(model, site.path)
    if not holders or not any(map(_is_sharded, linears)):
        return site

    def examine() -> str | None:
        with _whole(holders, linears):
            return site.examine()

    def put(k: int | None, backend: str, stand_in: StandIn | None) -> None:
        with _whole(holders, linears):
            site.replace(k, backend, stand_in)

    return replace(site, examine=examine, replace=put)


def left_as_sharded(site: FeedForwardSite) -> FeedForwardSite:
    """The site of a network that takes its weights out of their layers, which `fully_shard` has noted."""
    if not any(map(_is_sharded, (*site.linears_in, site.linear_out))):
        return site

    def examine() -> str:
        return "its weights are sharded (fully_shard) and would be taken out of their layers; convert before that"

    return replace(site, examine=examine)


def _sharded_around(model: nn.Module, path: str) -> list[Any]:
    """The modules around the one at this path that were given to `fully_shard`, the innermost first."""
    parts = path.split(".")
    around = [model.get_submodule(".".join(parts[:length])) for length in range(len(parts), -1, -1)]
    return [module for module in around if is_fully_sharded(module)]


def _is_sharded(linear: Any) -> bool:
    return hasattr(getattr(linear, "weight", None), "placements")


@contextmanager
def _whole(holders: Sequence[Any], linears: Sequence[nn.Module]) -> Iterator[None]:
    """Within this context the weights of these layers are whole; of the holders only those are asked that have them."""
    asked = []
    try:
        for holder in holders:
            if any(map(_is_sharded, linears)):
                holder.unshard()
                asked.append(holder)
        yield
    finally:
        for holder in asked:
            holder.reshard()
