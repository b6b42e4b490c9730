"""Random directions, and the numbers in which random features are computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..backends.autocast import autocast_off
from ..backends.calls import accumulation_dtype


def random_directions(number: int, size: int, *, orthogonal: bool) -> Tensor:
    """Vectors of independent standard normal entries, float32 [number, size].

    orthogonal  each block of `size` vectors is orthogonal; a single vector is distributed as before
    """
    gaussian = torch.randn(number, size)
    if not orthogonal:
        return gaussian
    rotations = [_random_rotation(size) for _ in range(0, number, size)]
    # A uniform direction times the length of a Gaussian vector is a Gaussian vector.
    return torch.cat(rotations)[:number] * gaussian.norm(dim=1, keepdim=True)


def _random_rotation(size: int) -> Tensor:
    """A uniformly distributed orthogonal matrix [size, size]."""
    q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))
    # Without the signs the distribution depends on how the factorisation chooses them (Mezzadri 2007).
    return (q * r.diagonal().sign()).float()


@contextmanager
def accumulation_tensors(query: Tensor, key: Tensor, value: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The tensors in float32, or float64 where the first is, and no autocast meanwhile."""
    dtype = accumulation_dtype(query.dtype)
    with autocast_off(query.device.type):
        yield query.to(dtype), key.to(dtype), value.to(dtype)
