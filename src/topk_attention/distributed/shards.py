"""The shards of a sequence: this rank's tokens of a tensor that every rank has, and the tensor again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .agreement import agree
from .ranks import Layout, Ranks, ToHeads
from .spans import check_order, num_tokens


def shard_sequence(tensor: Tensor, mesh: Any, *, dim: int, order: str = "zigzag") -> Tensor:
    """This rank's tokens of a tensor that every rank has whole.

    tensor  N tokens along axis dim
    mesh    a `DeviceMesh` of one dimension, or a process group, of P ranks
    order   "zigzag": of 2P parts rank r holds part r and part 2P - 1 - r, so that under causality all ranks have about
            as much to compute; "contiguous": of P parts part r
    Returns N / P tokens along axis dim; where P (or 2P) does not divide N some ranks have one or two more than others.

    Nothing is sent. The gradient of a shard is that of its tokens.

    Raises:
        ValueError, TypeError: the order, the axis or the mesh does not fit.
    """
    check_order(order)
    ranks = Ranks.of(mesh)
    if not -tensor.ndim <= dim < tensor.ndim:
        raise ValueError(f"dim must be an axis of the tensor {list(tensor.shape)}, got {dim}")
    spans = ranks.spans(tensor.shape[dim], order)[ranks.rank]
    nothing = tensor.narrow(dim, 0, 0)
    return torch.cat([nothing, *(tensor.narrow(dim, span.start, len(span)) for span in spans)], dim)


def unshard_sequence(tensor: Tensor, mesh: Any, *, dim: int, order: str = "zigzag") -> Tensor:
    """The tensor that `shard_sequence` cut, whole and on every rank: all ranks send their shards to all others.

    tensor  this rank's tokens along axis dim
    mesh, order  as in `shard_sequence`

    The gradient of a shard is the sum over ranks of the gradients of its tokens.

    Raises:
        ValueError, TypeError: the order, the axis or the mesh does not fit, or the shards are not as this order cuts
            them; on every rank.
    """
    check_order(order)
    ranks = Ranks.of(mesh)
    if not -tensor.ndim <= dim < tensor.ndim:
        raise ValueError(f"dim must be an axis of the tensor {list(tensor.shape)}, got {dim}")
    axis = dim % tensor.ndim
    before, after = tensor.shape[:axis], tensor.shape[axis + 1 :]
    found = agree(ranks, None, {"tensor": f"{tensor.dtype} [{before}, tokens, {after}]"}, [tensor.shape[axis]])
    spans = spans_of_all("tensor", [lengths[0] for lengths in found], ranks, order)
    flat = tensor.reshape(1, before.numel(), tensor.shape[axis], after.numel())
    heads = (range(flat.shape[1]),) * ranks.size
    (whole,) = ToHeads.apply((Layout(ranks, heads, spans, flat.shape[1]),), flat)
    return whole.reshape(*before, whole.shape[2], *after)


def sequence_positions(length: int, mesh: Any, *, order: str = "zigzag", device: Any = None) -> Tensor:
    """The positions of this rank's tokens in a sequence of this length, [n] int64: what a model takes as position_ids.

    Raises:
        ValueError, TypeError: the order or the mesh does not fit.
    """
    return shard_sequence(torch.arange(length, device=device), mesh, dim=0, order=order)


def spans_of_all(name: str, lengths: list[int], ranks: Ranks, order: str) -> tuple[tuple[range, ...], ...]:
    """The tokens of every rank, whose shards of this argument have these lengths.

    Raises:
        ValueError: `shard_sequence` would cut a sequence of this length otherwise.
    """
    spans = ranks.spans(sum(lengths), order)
    expected = [num_tokens(of_rank) for of_rank in spans]
    if lengths != expected:
        raise ValueError(
            f'{name} must have {expected} tokens on the ranks, as shard_sequence(order="{order}") cuts {sum(lengths)} '
            f"tokens, got {lengths}"
        )
    return spans
