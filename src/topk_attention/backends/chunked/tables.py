"""Keys and values as the flat tables that products and gathers read, and the gradients that sums are added to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..operators import AttentionGradients
from .tiles import Step


class Tables:
    """The keys and values of a step's heads, [b * g * M, D] and [b * g * M, E], contiguous in the accumulation dtype.

    Consecutive steps of the same heads share them, so at most one step's heads are copied at a time. An input that
    already has this form is not copied.
    """

    def __init__(self, key: Tensor, value: Tensor, dtype: torch.dtype) -> None:
        self._key, self._value, self._dtype = key, value, dtype
        self._heads: tuple[range, range] | None = None
        self._tables = (key, value)

    def of(self, step: Step) -> tuple[Tensor, Tensor]:
        """The two tables of a step."""
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
    """The tensor with NaN in place of inf. Otherwise a score of a broken query or key could be -inf and so hide it.

    A finite sum proves that every element is finite, and then nothing is copied. If the sum overflows, only an
    unnecessary copy is made.
    """
    return tensor if tensor.sum().isfinite() else torch.where(tensor.isfinite(), tensor, torch.nan)


def row_table_starts(step: Step, num_keys: int, device: torch.device) -> Tensor:
    """For each row of the step where its keys begin in the step's tables, int64 [rows, 1]."""
    batches, key_heads, queries_per_key_head, queries = step.shape
    starts = torch.arange(0, batches * key_heads * num_keys, num_keys, device=device)
    return starts.repeat_interleave(queries_per_key_head * queries).unsqueeze(1)


def zero_gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    wanted: Sequence[bool],
    bias_shape: Sequence[int],
    relative_bias_shape: Sequence[int],
    dtype: torch.dtype,
) -> AttentionGradients:
    """Gradients to which the steps of a backward pass add; empty tensors for those that are not wanted.

    wanted  for query, key, value and the rows' means; the biases are wanted where their shape is not empty
    dtype   that of all gradients but query's, to which nothing is added twice
    """
    query_wanted, key_wanted, value_wanted, means_wanted = wanted
    return AttentionGradients(
        torch.zeros_like(query) if query_wanted else query.new_empty(0),
        torch.zeros_like(key, dtype=dtype) if key_wanted else key.new_empty(0, dtype=dtype),
        torch.zeros_like(value, dtype=dtype) if value_wanted else value.new_empty(0, dtype=dtype),
        query.new_zeros(bias_shape or (0,), dtype=dtype),
        query.new_zeros(relative_bias_shape or (0,), dtype=dtype),
        query.new_zeros(query.shape[:3] if means_wanted else (0,), dtype=dtype),
    )
