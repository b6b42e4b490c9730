"""Three sparse products, in which each query uses k rows of a table.

Each has a portable form, made of gathers and sums, and on the CPU a fused form without a copy of the gathered rows.
"""

from __future__ import annotations

import functools
import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# The portable forms gather at most this many elements of the table at once.
_GATHERED_ELEMENTS = 2**21


def weighted_sum_of_rows(table: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """sum_j weights[r, j] * table[indices[r, j]]

    table    [T, D], contiguous
    indices  [R, K]  int32 or int64
    weights  [R, K]  dtype of table
    Returns [R, D].
    """
    return F.embedding_bag(indices, table, per_sample_weights=weights, mode="sum")


def dot_with_rows(rows: Tensor, table: Tensor, indices: Tensor) -> Tensor:
    """rows[r] . table[indices[r, j]]

    rows     [R, D]
    table    [T, D], contiguous
    indices  [R, K]  int32 or int64
    Returns [R, K].
    """
    if rows.device.type == "cpu":
        return _sampled_product(rows, table, indices)
    return _gathered_product(rows, table, indices)


@functools.cache
def _hide_the_beta_warning() -> None:
    """Trigger and hide torch's warning, once per process, that CSR tensors are in beta.

    This file uses only their oldest part.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.tensor([0, 1]), torch.tensor([0]), torch.tensor([1.0]), size=(1, 1))


def _sampled_product(rows: Tensor, table: Tensor, indices: Tensor) -> Tensor:
    _hide_the_beta_warning()
    num_rows, k = indices.shape
    pattern = torch.sparse_csr_tensor(
        torch.arange(0, num_rows * k + 1, k, dtype=indices.dtype, device=rows.device),
        indices.flatten(),
        rows.new_zeros(num_rows * k),
        size=(num_rows, table.shape[0]),
        check_invariants=False,  # a row may name a key twice: empty slots point at its first one, with weight 0
    )
    return torch.sparse.sampled_addmm(pattern, rows, table.t(), beta=0.0).values().view(num_rows, k)


def _gathered_product(rows: Tensor, table: Tensor, indices: Tensor) -> Tensor:
    rows_at_once = max(_GATHERED_ELEMENTS // (indices.shape[1] * table.shape[1]), 1)
    return torch.cat(
        [
            torch.bmm(table[part], row.unsqueeze(-1)).squeeze(-1)
            for part, row in zip(indices.split(rows_at_once), rows.split(rows_at_once), strict=True)
        ]
    )


class Transposed(NamedTuple):
    """The entries of a selection sorted by the table row they point at."""

    order: Tensor  # [R * K] positions in the flat selection
    sources: Tensor  # [R * K] selection row of each sorted entry
    starts: Tensor  # [T] where each table row's entries begin


def transpose_selection(indices: Tensor, num_targets: int) -> Transposed:
    """Sort the entries of a selection: indices [R, K], int32 or int64, in 0..num_targets-1."""
    flat = indices.flatten()
    order = flat.argsort(stable=True)
    ends = torch.bincount(flat, minlength=num_targets).cumsum(0)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    return Transposed(order, order.div(indices.shape[1], rounding_mode="floor"), starts)


def weighted_sum_by_target(transposed: Transposed, rows: Tensor, weights: Tensor) -> Tensor:
    """Sum of weights[r, j] * rows[r] over all entries (r, j) that point at a target

    Each target sums its own entries in row order. This needs no atomics and no [R, K, D] tensor, and the result is the
    same for any number of threads.

    rows     [R, D]
    weights  [R, K]
    Returns [T, D].
    """
    sorted_weights = weights.flatten()[transposed.order]
    return F.embedding_bag(transposed.sources, rows, transposed.starts, per_sample_weights=sorted_weights, mode="sum")
