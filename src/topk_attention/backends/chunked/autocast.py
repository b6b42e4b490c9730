"""Operators choose their own precision: autocast has had its say before they are called."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch


def without_autocast(operator: Callable[..., Any]) -> Callable[..., Any]:
    """Run an operator's body, whose first argument is a tensor, with autocast off.

    Otherwise autocast would turn its float32 products back into bfloat16, inside and during the backward pass.
    """

    @functools.wraps(operator)
    def run(first: torch.Tensor, *rest: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return operator(first, *rest)

    # torch reads the operator's schema off its annotations, and would look for their names in this file.
    run.__signature__ = inspect.signature(operator, eval_str=True)  # type: ignore[attr-defined]
    return run
