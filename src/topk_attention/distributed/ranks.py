"""The processes of a call, and how tensors go from one to the other, with their gradients.

Every function here is a collective: all ranks of the group must call it in the same order. That holds for backward
passes too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..backends.calls import accumulation_dtype
from .spans import num_tokens, spans_of

# Its name before torch 2.13, which warns of the former one.
_ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"


@dataclass(frozen=True)
class Ranks:
    """The processes among which a sequence is shared: their group, and the place of this one."""

    group: Any
    rank: int
    size: int

    @staticmethod
    def of(mesh: Any) -> Ranks:
        """The ranks of a DeviceMesh of one dimension, or of a process group.

        Raises:
            TypeError, ValueError: it is neither, has more dimensions, or this process is not in it.
        """
        if isinstance(mesh, DeviceMesh):
            if mesh.ndim != 1:
                raise ValueError(
                    f"mesh must have one dimension, got {mesh.ndim}: {mesh.mesh_dim_names}; pass that over which the "
                    'sequence is shared, such as mesh["cp"]'
                )
            mesh = mesh.get_group()
        if not isinstance(mesh, dist.ProcessGroup):
            raise TypeError(f"mesh must be a DeviceMesh or a process group, got {type(mesh).__name__} {mesh!r}")
        rank = dist.get_rank(mesh)
        if rank < 0:
            raise ValueError("mesh must contain this process, but its group does not")
        return Ranks(mesh, rank, mesh.size())

    def spans(self, length: int, order: str) -> tuple[tuple[range, ...], ...]:
        """The tokens of every rank."""
        return tuple(spans_of(length, rank, self.size, order) for rank in range(self.size))

    def device(self) -> torch.device:
        """Where this group's small tensors must lie."""
        if dist.get_backend(self.group) == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")


def gather_numbers(numbers: Sequence[int], ranks: Ranks) -> list[list[int]]:
    """The int64 numbers of every rank, as many on each."""
    if ranks.size == 1:
        return [list(numbers)]
    mine = torch.tensor(numbers, dtype=torch.int64, device=ranks.device())
    of_all = mine.new_empty(ranks.size * len(numbers))
    _all_gather(of_all, mine, ranks)
    return of_all.view(ranks.size, -1).tolist()


def _all_gather(received: Tensor, sent: Tensor, ranks: Ranks) -> None:
    getattr(dist, _ALL_GATHER)(received, sent, group=ranks.group)


def _exchange(pieces: Sequence[Tensor], shapes: Sequence[Sequence[int]], ranks: Ranks) -> list[Tensor]:
    """Send pieces[r] to rank r; receive tensors of these shapes, one from each."""
    if ranks.size == 1:
        return list(pieces)
    dtype, size = pieces[0].dtype, pieces[0].element_size()
    sent = torch.cat([piece.reshape(-1) for piece in pieces])
    counts = [math.prod(shape) for shape in shapes]
    received = sent.new_empty(sum(counts))
    # As bytes: gloo does not know every dtype.
    dist.all_to_all_single(
        received.view(torch.uint8),
        sent.view(torch.uint8),
        [count * size for count in counts],
        [piece.numel() * size for piece in pieces],
        group=ranks.group,
    )
    return [part.view(dtype).view(*shape) for part, shape in zip(received.split(counts), shapes, strict=True)]


def _gather(tensor: Tensor, lengths: Sequence[int], ranks: Ranks) -> list[Tensor]:
    """The tensors [B, H, n, D] of all ranks, whose lengths are these."""
    if ranks.size == 1:
        return [tensor]
    longest, missing = max(lengths), max(lengths) - tensor.shape[2]
    padded = tensor if missing == 0 else torch.nn.functional.pad(tensor, (0, 0, 0, missing))
    sent = padded.contiguous().view(-1)
    received = sent.new_empty(ranks.size * sent.numel())
    _all_gather(received.view(torch.uint8), sent.view(torch.uint8), ranks)
    parts = received.view(ranks.size, *padded.shape[:2], longest, padded.shape[3])
    return [part[:, :, :length] for part, length in zip(parts, lengths, strict=True)]


@dataclass(frozen=True)
class Layout:
    """How a tensor of all heads of some tokens becomes one of some heads of all tokens, and back.

    heads  for each rank, the heads whose tokens it is to see; the same head may go to several ranks
    spans  for each rank, the tokens that it holds
    """

    ranks: Ranks
    heads: tuple[range, ...]
    spans: tuple[tuple[range, ...], ...]
    num_heads: int

    def _lengths(self) -> list[int]:
        return [num_tokens(spans) for spans in self.spans]

    def to_heads(self, tensor: Tensor) -> Tensor:
        """All heads of this rank's tokens, [B, H, n, D], to its heads of all tokens, [B, h, N, D]."""
        batch, _, _, size = tensor.shape
        lengths, mine = self._lengths(), self.heads[self.ranks.rank]
        if all(heads == range(self.num_heads) for heads in self.heads):
            parts = _gather(tensor, lengths, self.ranks)
        else:
            pieces = [tensor[:, heads.start : heads.stop] for heads in self.heads]
            shapes = [(batch, len(mine), length, size) for length in lengths]
            parts = _exchange(pieces, shapes, self.ranks)
        whole = tensor.new_empty(batch, len(mine), sum(lengths), size)
        for part, spans in zip(parts, self.spans, strict=True):
            for span, tokens in zip(spans, part.split([len(span) for span in spans], 2), strict=False):
                whole[:, :, span.start : span.stop] = tokens
        return whole

    def to_tokens(self, tensor: Tensor) -> Tensor:
        """This rank's heads of all tokens, [B, h, N, D], to all heads of its tokens, [B, H, n, D]; a head of which
        several ranks have a part is their sum, in the order of ranks."""
        batch, _, _, size = tensor.shape
        length = num_tokens(self.spans[self.ranks.rank])
        pieces = [
            torch.cat([tensor[:, :, :0], *(tensor[:, :, span.start : span.stop] for span in spans)], 2)
            for spans in self.spans
        ]
        parts = _exchange(pieces, [(batch, len(heads), length, size) for heads in self.heads], self.ranks)
        if sum(map(len, self.heads)) == self.num_heads:
            return torch.cat(parts, 1)
        total = tensor.new_zeros(batch, self.num_heads, length, size, dtype=accumulation_dtype(tensor.dtype))
        for part, heads in zip(parts, self.heads, strict=True):
            total[:, heads.start : heads.stop] += part
        return total.to(tensor.dtype)


class ToHeads(torch.autograd.Function):
    """`Layout.to_heads` of tensors; the gradients go back the same way."""

    @staticmethod
    def forward(ctx: Any, layouts: Sequence[Layout], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.layouts = layouts
        return tuple(layout.to_heads(tensor) for layout, tensor in zip(layouts, tensors, strict=True))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[1:]
        return (
            None,
            *(
                layout.to_tokens(gradient) if is_wanted else None
                for layout, gradient, is_wanted in zip(ctx.layouts, gradients, wanted, strict=True)
            ),
        )


class ToTokens(torch.autograd.Function):
    """`Layout.to_tokens` of a tensor; the gradient goes back the same way."""

    @staticmethod
    def forward(ctx: Any, layout: Layout, tensor: Tensor) -> Tensor:
        ctx.layout = layout
        return layout.to_tokens(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, ctx.layout.to_heads(gradient)
