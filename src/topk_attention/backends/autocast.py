"""Autocast applies once: the public functions cast their inputs, then the backends choose their own precision."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, overload

import torch
from torch import Tensor


def autocast_is_on(device_type: str) -> bool:
    """Whether autocast is enabled for this kind of device."""
    if torch.compiler.is_compiling():
        # The compiler of torch 2.10 cannot look into the question. It compiles for no other device without autocast.
        is_available = device_type != "meta"
    else:
        is_available = torch.amp.is_autocast_available(device_type)
    return is_available and torch.is_autocast_enabled(device_type)


@overload
def in_autocast_dtype(tensor: Tensor) -> Tensor: ...


@overload
def in_autocast_dtype(tensor: Tensor | None) -> Tensor | None: ...


def in_autocast_dtype(tensor: Tensor | None) -> Tensor | None:
    """The tensor in the dtype that autocast gives to matrix products, if autocast is on. float64 stays as it is."""
    if not isinstance(tensor, Tensor) or not autocast_is_on(tensor.device.type):
        return tensor
    if not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


def autocast_off(device_type: str) -> AbstractContextManager[object]:
    """A context without autocast, in which float32 products stay float32."""
    return torch.autocast(device_type, enabled=False) if autocast_is_on(device_type) else nullcontext()


def without_autocast(operator: Callable[..., Any]) -> Callable[..., Any]:
    """An operator, whose first argument is a tensor, that runs with autocast off, also in the backward pass."""

    @functools.wraps(operator)
    def run(first: Tensor, *rest: Any) -> Any:
        with autocast_off(first.device.type):
            return operator(first, *rest)

    # torch reads the operator's schema from its annotations, and would look up their names in this file.
    run.__signature__ = inspect.signature(operator, eval_str=True)  # type: ignore[attr-defined]
    return run
