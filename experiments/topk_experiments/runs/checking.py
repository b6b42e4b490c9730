"""Whether results are the truth, but for rounding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

# Entries whose k-th and next rank are closer than this may be chosen either way in float32, and are left out.
NEAR_TIE = 1e-5
_TOLERANCE = 1e-4


class CheckFailedError(ValueError):
    """A method does not compute what it should."""


def output_and_gradients(
    output: Tensor, inputs: Sequence[Tensor], names: Sequence[str], output_gradient: Tensor
) -> dict[str, Tensor]:
    """The output is zeroed where its gradient is: in rows left out."""
    gradients = torch.autograd.grad(output, inputs, output_gradient.to(output.dtype))
    named = {f"gradient of {name}": gradient for name, gradient in zip(names, gradients, strict=False)}
    return {"output": output.detach() * (output_gradient != 0), **named}


def largest_error(results: Mapping[str, Tensor], truth: Mapping[str, Tensor], told: str) -> float:
    """The largest difference as a fraction of its tensor's largest entry.

    Raises:
        CheckFailedError: they differ by more than rounding; the message starts with `told`.
    """
    largest = 0.0
    for name, expected in truth.items():
        error = ((results[name] - expected).abs().max() / expected.abs().max()).item()
        if not error <= _TOLERANCE:
            raise CheckFailedError(
                f"{told}: the {name} differs from the float64 reference by {error:.1e} of its largest entry"
            )
        largest = max(largest, error)
    return largest
