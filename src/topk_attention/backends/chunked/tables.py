"""Keys and values as the flat tables that products and gathers read."""

from __future__ import annotations

import torch
from torch import Tensor

from .tiles import Step


class Tables:
    """The keys and values of a step's heads, [b * g * M, D] and [b * g * M, E], contiguous in the accumulation dtype.

    Consecutive steps of the same heads share them, so that at most one step's heads are copied at a time, and nothing
    is where the input already has this form.
    """

    def __init__(self, key: Tensor, value: Tensor, dtype: torch.dtype) -> None:
        self._key, self._value, self._dtype = key, value, dtype
        self._heads: tuple[range, range] | None = None
        self._tables = (key, value)

    def of(self, step: Step) -> tuple[Tensor, Tensor]:
        if self._heads != (step.batches, step.key_heads):
            self._heads = (step.batches, step.key_heads)
            key, value = (
                part_of_heads(x, step).to(self._dtype).contiguous().flatten(0, 2) for x in (self._key, self._value)
            )
            self._tables = nan_where_not_finite(key), value
        return self._tables


def part_of_heads(tensor: Tensor, step: Step) -> Tensor:
    """The step's part of a [B, G, M, X] tensor, [b, g, M, X], a view."""
    return tensor[step.batches.start : step.batches.stop, step.key_heads.start : step.key_heads.stop]


def nan_where_not_finite(tensor: Tensor) -> Tensor:
    """NaN for each inf, so that no score of a broken query or key is a mere -inf. Copies only when it has to.

    A finite sum proves that every element is finite; a sum that overflows costs a needless copy, nothing else.
    """
    return tensor if tensor.sum().isfinite() else torch.where(tensor.isfinite(), tensor, torch.nan)


def row_table_starts(step: Step, num_keys: int, device: torch.device) -> Tensor:
    """For each row of the step where its keys begin in the step's tables, int64 [rows, 1]."""
    batches, key_heads, queries_per_key_head, queries = step.shape
    starts = torch.arange(0, batches * key_heads * num_keys, num_keys, device=device)
    return starts.repeat_interleave(queries_per_key_head * queries).unsqueeze(1)
