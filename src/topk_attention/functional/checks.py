"""Argument checks that both operations share. Each error names the argument, what was needed and what came."""

from __future__ import annotations

from typing import SupportsIndex, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..backends.autocast import autocast_is_on

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def shape_of(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def check_floating(name: str, tensor: Tensor | None) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in _DTYPES:
        raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")


def check_same_dtype_and_device(name: str, first: Tensor, **others: Tensor | None) -> None:
    for other_name, other in others.items():
        if other is None:
            continue
        if other.dtype != first.dtype:
            raise ValueError(
                f"{other_name} must have dtype {first.dtype} like {name}, got {other.dtype}; convert one of them"
            )
        if other.device != first.device:
            raise ValueError(
                f"{other_name} must be on {first.device} like {name}, got {other.device}; move one of them"
            )


def check_k(name: str, k: object) -> None:
    # The usual case first: SupportsIndex is looked for attribute by attribute, which takes 6 us.
    is_int = type(k) is int or (
        isinstance(k, SupportsIndex | torch.SymInt) and not isinstance(k, bool) and not isinstance(k, Tensor)
    )
    if not is_int:
        raise TypeError(f"{name} must be an int, got {type(k).__name__} {k!r}")
    if not 1 <= int(cast(SupportsIndex, k)) < 2**31:
        raise ValueError(f"{name} must be at least 1 and below 2^31, got {k}")


def check_dropout(dropout_p: float) -> None:
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be at least 0 and below 1, got {dropout_p}")


def check_no_tangent(operation: str, backend: str, *tensors: Tensor | None) -> None:
    """Forward-mode differentiation, as in `torch.func.jvp`, would pass by an operator of our own without a word."""
    if any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError(
            f'{operation} has no forward-mode derivative (torch.func.jvp, torch.autograd.forward_ad) on "{backend}"; '
            'use backend="reference", or the backward pass'
        )


def autocast(tensor: Tensor) -> Tensor:
    """The tensor in the autocast dtype where autocast is on, as for matrix products: all but float64."""
    if not isinstance(tensor, Tensor) or not autocast_is_on(tensor.device.type):
        return tensor
    if not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


def autocast_optional(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else autocast(tensor)
