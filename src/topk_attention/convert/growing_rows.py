"""Keys or values of a cache in memory with room for more, so that a new token costs one row and not a copy of all."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.operators import is_transformed

# Room for a quarter more: each row is then copied four times on average, however many tokens follow. Pages that nothing
# has been written to take no memory.
_GROWTH = 4
_LEAST_ROOM = 64
# Keys are indexed in panels of 32 rows.
_ROUNDED_TO = 32


class GrowingRows:
    """Rows of tensors [..., M, D] that follow one another in one allocation.

    What `append` and `reordered` return are views of it. A view holds its rows for good, unless rows are taken away
    from the end and others appended in their place.
    """

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory

    @classmethod
    def beginning_with(cls, rows: Tensor | None, new: Tensor) -> tuple[GrowingRows, Tensor]:
        """Room for these rows, [..., M, D], if there are any, and the new ones; and a view of all of them."""
        start = 0 if rows is None or rows.numel() == 0 else rows.shape[-2]
        length = start + new.shape[-2]
        room = max(_LEAST_ROOM, length + length // _GROWTH)
        room += -room % _ROUNDED_TO
        growing = cls(new.new_empty(*new.shape[:-2], room, new.shape[-1]))
        if rows is not None and start > 0:
            growing.memory.narrow(-2, 0, start).copy_(rows)
        return growing, growing._written(start, new)

    def hold(self, rows: Tensor | None) -> bool:
        """Whether these rows are the first ones here."""
        return (
            rows is not None
            and rows.data_ptr() == self.memory.data_ptr()
            and rows.stride() == self.memory.stride()
            and rows.shape[:-2] == self.memory.shape[:-2]
            and rows.shape[-1] == self.memory.shape[-1]
            and rows.dtype == self.memory.dtype
        )

    def have_room(self, rows: Tensor, new: Tensor) -> bool:
        """Whether the new rows can be written behind these, which are the first ones here."""
        # Tensors of inference mode must not change outside of it.
        may_write = not self.memory.is_inference() or torch.is_inference_mode_enabled()
        return may_write and rows.shape[-2] + new.shape[-2] <= self.memory.shape[-2]

    def append(self, rows: Tensor, new: Tensor) -> Tensor:
        """Write new rows behind these; returns all of them."""
        return self._written(rows.shape[-2], new)

    def reordered(self, rows: Tensor, batch_indices: Tensor) -> tuple[GrowingRows, Tensor]:
        """Other memory with the batch entries of these rows in another order, and a view of it."""
        memory = self.memory.new_empty(batch_indices.shape[0], *self.memory.shape[1:])
        view = memory.narrow(-2, 0, rows.shape[-2])
        torch.index_select(rows, 0, batch_indices.to(rows.device), out=view)
        return GrowingRows(memory), view

    def _written(self, start: int, new: Tensor) -> Tensor:
        self.memory.narrow(-2, start, new.shape[-2]).copy_(new)
        return self.memory.narrow(-2, 0, start + new.shape[-2])


def grows_in_place(*new: Tensor) -> bool:
    """Whether rows may be written behind others in the same memory.

    Not where the backward pass may have saved what lies in this memory, and not in compiled or transformed code, for
    which a tensor is a value.
    """
    return (
        not torch.is_grad_enabled()
        and not is_transformed()
        and all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in new)
    )


def fit_together(rows: Tensor | None, new: Tensor) -> bool:
    """Whether new rows can follow these as they are: the same dtype, device and other axes, or nothing before them."""
    if rows is None or rows.ndim == 1:  # as transformers begins a layer, with a tensor without axes
        return True
    return (
        type(rows) in (Tensor, torch.nn.Parameter)
        and rows.dtype == new.dtype
        and rows.device == new.device
        and rows.shape[:-2] == new.shape[:-2]
        and rows.shape[-1] == new.shape[-1]
    )
