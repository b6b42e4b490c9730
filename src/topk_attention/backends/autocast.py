"""Backends choose their own precision: autocast has its say when the public functions cast their inputs."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def autocast_is_on(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def autocast_off(device_type: str) -> AbstractContextManager[object]:
    """A context without autocast, in which float32 products stay float32."""
    return torch.autocast(device_type, enabled=False) if autocast_is_on(device_type) else nullcontext()


def without_autocast(operator: Callable[..., Any]) -> Callable[..., Any]:
    """Run the body of an operator, whose first argument is a tensor, with autocast off, also in the backward pass."""

    @functools.wraps(operator)
    def run(first: torch.Tensor, *rest: Any) -> Any:
        with autocast_off(first.device.type):
            return operator(first, *rest)

    # torch reads the operator's schema off its annotations, and would look for their names in this file.
    run.__signature__ = inspect.signature(operator, eval_str=True)  # type: ignore[attr-defined]
    return run
