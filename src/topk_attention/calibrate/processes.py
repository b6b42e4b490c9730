"""Batches that several processes measure, each its own, and results that all of them then have."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

_Item = TypeVar("_Item")
_Found = TypeVar("_Found")


@dataclass(frozen=True)
class Processes:
    """The processes that share a measurement; with group = None this one alone."""

    group: Any
    rank: int
    count: int

    @staticmethod
    def of(group: Any) -> Processes:
        """Those of a process group.

        Raises:
            TypeError: it is no process group.
            ValueError: this process is not in the group, or the group takes no CPU tensors.
        """
        if group is None:
            return ALONE
        if not dist.is_available() or not dist.is_initialized():
            raise ValueError("group needs processes that talk to each other; call torch.distributed.init_process_group")
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                f"group must be a process group, got {type(group).__name__}; torch.distributed.group.WORLD is that of "
                "all processes, None this one alone"
            )
        rank = dist.get_rank(group)
        if rank < 0:
            raise ValueError("group must hold the process that calls, got one without it")
        if (backend := dist.get_backend(group)) == "nccl":
            raise ValueError(
                f"group must take CPU tensors, in which statistics are kept, got {backend}; pass "
                'torch.distributed.new_group(backend="gloo")'
            )
        return Processes(group, rank, dist.get_world_size(group))

    def own(self, items: Sequence[_Item]) -> Iterator[tuple[int, _Item]]:
        """Every count-th item, with its number among all of them."""
        for number in range(self.rank, len(items), self.count):
            yield number, items[number]

    def gather(self, found: _Found) -> list[_Found]:
        """What each process has found, in the order of their ranks. Every process has to call this."""
        if self.group is None:
            return [found]
        of_all: list[Any] = [None] * self.count
        dist.all_gather_object(of_all, found, group=self.group)
        return of_all

    def in_order(self, found: dict[int, _Found]) -> list[_Found]:
        """What was found of each item, by its number, of all processes: in the order of the items."""
        joined: dict[int, _Found] = {}
        for part in self.gather(found):
            joined |= part
        return [joined[number] for number in sorted(joined)]

    def add_up(self, sums: Tensor) -> None:
        """Add the tensors of all processes, in place. Every process has to call this."""
        if self.group is not None:
            dist.all_reduce(sums, group=self.group)


ALONE = Processes(None, 0, 1)
