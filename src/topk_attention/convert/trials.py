"""Trying a network with a few random tokens: whether it computes what its weights and its activation say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# Of the random inputs: large ones reveal a clamp, small ones an offset.
SCALES = (8.0, 1.0, 0.125)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within this context all modules are in evaluation mode; after it each is in its own again."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was_training in training.items():
            module.training = was_training


def is_same(output: Tensor, expected: Tensor) -> bool:
    """Whether a trial gave what was expected, but for the rounding of any dtype."""
    return torch.allclose(output, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))


def failure(name: str, error: Exception) -> str:
    """What is said of a network whose own code raised this."""
    return f"{name} could not be tried, {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
