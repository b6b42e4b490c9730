"""Argument checks that both operations share. Each error names the argument, what it must be, and what it is."""

from __future__ import annotations

from typing import Any, SupportsIndex, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_PYTORCHS_ATTENTION = F.scaled_dot_product_attention


def shape_of(tensor: Tensor) -> str:
    """A tensor's shape for a message, such as [2, 8, 128, 64]."""
    return str(list(tensor.shape))


def version_of(tensor: Tensor) -> int | None:
    """How often a tensor was changed in place; None in inference mode, where PyTorch does not count."""
    return None if tensor.is_inference() else tensor._version


def check_floating(name: str, tensor: Tensor | None) -> None:
    """Raise unless this is a tensor of a dtype that the operations take."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if type(tensor) not in (Tensor, nn.Parameter) and type(tensor).__module__.startswith("torch.distributed.tensor"):
        raise TypeError(
            f"{name} must be a tensor of this process alone, got {type(tensor).__name__}; pass full_tensor(), or "
            "to_local() where this process holds every key, or every neuron, of what it computes"
        )
    if tensor.dtype not in _DTYPES:
        raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")


def check_same_dtype_and_device(name: str, first: Tensor, **others: Tensor | None) -> None:
    """Raise unless every other tensor has the dtype and the device of the first."""
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


def check_count(name: str, count: object) -> None:
    """Raise unless this is an int, at least 1, that fits int32: a k, or the size of a chunk."""
    # The usual case first: SupportsIndex is looked for attribute by attribute, which takes 6 us.
    is_int = type(count) is int or (
        isinstance(count, SupportsIndex | torch.SymInt)
        and not isinstance(count, bool)
        and not isinstance(count, Tensor)
    )
    if not is_int:
        raise TypeError(f"{name} must be an int, got {type(count).__name__} {count!r}")
    if not 1 <= int(cast(SupportsIndex, count)) < 2**31:
        raise ValueError(f"{name} must be at least 1 and below 2^31, got {count}")


def as_k(name: str, k: Any) -> int | tuple[int, ...] | None:
    """A k in the form that calls hold: None for all keys, an int for every head, or one int per head.

    k  None or "all", an int, or one int per head: a list, tuple or range, or a 1-D tensor or array of ints
    """
    if k is None or type(k) is int:
        if k is not None:
            check_count(name, k)
        return k
    if isinstance(k, str) and k == "all":
        return None
    if isinstance(k, Tensor | np.ndarray):
        is_integer = k.dtype.kind in "iu" if isinstance(k, np.ndarray) else k.dtype in _INTEGER_DTYPES
        if not is_integer or k.ndim > 1:
            raise TypeError(f"{name} must hold ints along one axis, got {k.dtype} {list(k.shape)}")
        return as_k(name, k.tolist())
    if isinstance(k, list | tuple | range):
        for k_of_head in k:
            check_count(f"each entry of {name}", k_of_head)
        return tuple(int(k_of_head) for k_of_head in k)
    if isinstance(k, bool) or not isinstance(k, SupportsIndex | torch.SymInt):
        raise TypeError(f'{name} must be an int, one int per head, "all" or None, got {type(k).__name__} {k!r}')
    check_count(name, k)
    return cast(int, k) if isinstance(k, torch.SymInt) else int(k)


def check_context_parallel() -> None:
    """Raise within torch's `context_parallel`, in which each process holds a part of every sequence.

    That context puts a function of its own in the place of PyTorch's attention. It knows no other attention.
    """
    attention = F.scaled_dot_product_attention
    if attention is not _PYTORCHS_ATTENTION and getattr(attention, "__module__", "").startswith("torch.distributed"):
        raise RuntimeError(
            "topk_attention cannot run within torch's context_parallel: each process would attend to its own part of "
            "the sequence alone; run it outside, within topk_attention.distributed.sequence_parallel(model, mesh), or "
            "give the model its own attention back with topk_attention.unconvert(model)"
        )


def check_dropout(dropout_p: float) -> None:
    """Raise unless this is a probability below 1."""
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be at least 0 and below 1, got {dropout_p}")


def check_seed(dropout_seed: object) -> None:
    """Raise unless this is an int that int64 holds, at least 0, or a tensor of one such number."""
    if isinstance(dropout_seed, Tensor):
        if dropout_seed.dtype != torch.int64 or dropout_seed.numel() != 1:
            raise TypeError(
                f"dropout_seed must be an int64 tensor of one number, got {dropout_seed.dtype} {shape_of(dropout_seed)}"
            )
    elif isinstance(dropout_seed, bool) or not isinstance(dropout_seed, int):
        raise TypeError(f"dropout_seed must be an int, a tensor or None, got {type(dropout_seed).__name__}")
    elif not 0 <= dropout_seed < 2**63:
        raise ValueError(f"dropout_seed must be at least 0 and below 2^63, got {dropout_seed}")


def check_no_tangent(operation: str, backend: str, *tensors: Tensor | None) -> None:
    """Raise if a tensor carries a tangent: the library's operators would silently lose it.

    Tangents belong to forward-mode differentiation, as in `torch.func.jvp`.
    """
    if any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError(
            f'{operation} has no forward-mode derivative (torch.func.jvp, torch.autograd.forward_ad) on "{backend}"; '
            'use backend="reference", or the backward pass'
        )
