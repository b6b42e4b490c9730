"""Dropout as a function of position, so that every backend and every chunking draws the same mask.

With a stateful generator the draw would depend on the order of the chunks. In this file the decision for one entry is
a hash of (seed, row, column), which the backward pass computes again without storing anything.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOW_32_BITS = 0xFFFFFFFF
# 2^32 divided by the golden ratio: spreads consecutive columns over all 32 bits before they are mixed.
_GOLDEN = 0x9E3779B1


def draw_seed(device: torch.device) -> Tensor:
    """A fresh int64 scalar from torch's own generator, so that `torch.manual_seed` repeats a run."""
    return torch.randint(0, 2**62, (), dtype=torch.int64, device=device)


def keep_mask(seed: Tensor, rows: Tensor, columns: Tensor, dropout_p: float) -> Tensor:
    """Which entries survive dropout.

    seed     int64 scalar
    rows     int64, one number per query of the whole call; broadcasts against columns
    columns  int64, key or neuron indices
    Returns bool, True = kept, with probability 1 - dropout_p, in the broadcast shape.
    """
    row_hash = _mix(_mix((rows ^ seed) & _LOW_32_BITS) ^ ((rows ^ seed) >> 32) & _LOW_32_BITS)
    entry_hash = _mix(row_hash ^ (columns * _GOLDEN & _LOW_32_BITS))
    return entry_hash >= round(dropout_p * 2**32)


def _mix(word: Tensor) -> Tensor:
    """The 32-bit finaliser of MurmurHash3 (Appleby), in int64 lanes because torch has no unsigned arithmetic."""
    word = word ^ (word >> 16)
    word = word * 0x85EBCA6B & _LOW_32_BITS
    word = word ^ (word >> 13)
    word = word * 0xC2B2AE35 & _LOW_32_BITS
    return word ^ (word >> 16)
