"""Checks that several experiments share: of configurations before they run, and of answers before they are timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from topk_attention.backends import choose_backend
from topk_attention.functional.checks import check_count

# Entries whose k-th and next rank are closer than this may be chosen either way in float32, and are left out.
NEAR_TIE = 1e-5
_TOLERANCE = 1e-4


class CheckFailedError(ValueError):
    """A method does not compute what it should."""


def largest_error(
    operation: Callable[..., Tensor],
    truth: Callable[..., Tensor],
    tensors: Sequence[Tensor],
    is_clear: Tensor | float = 1.0,
    *,
    names: Sequence[str],
    what: str,
    seed: int = 0,
    least_scale: float = 0.0,
) -> float:
    """Compare the output and all gradients of an operation with the truth in float64.

    operation, truth  of the tensors -> output in the shape of the first tensor; both start from the same seed
    tensors           inputs and weights
    is_clear          broadcasts to the output; 0 for rows that depend on a near-tie, which are left out
    names             of the tensors
    what              named in the error
    least_scale       a tensor whose largest entry is below this share of the largest of all is compared at that share:
                      a gradient that is zero apart from rounding has no scale of its own

    Returns the largest difference as a fraction of its tensor's largest entry.

    Raises:
        CheckFailedError: they differ by more than rounding.
    """
    exact = tuple(tensor.detach().double().requires_grad_() for tensor in tensors)
    output_gradient = torch.randn(exact[0].shape, dtype=torch.float64) * is_clear

    def results(function: Callable[..., Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
        torch.manual_seed(seed)
        output = function(*leaves)
        gradients = torch.autograd.grad(output, leaves, output_gradient.to(output.dtype))
        return [output.detach() * (output_gradient != 0), *gradients]

    expected, found = results(truth, exact), results(operation, tensors)
    scales = [tensor.abs().max().item() for tensor in expected]
    largest = 0.0
    for name, right, result, scale in zip(
        ("output", *(f"gradient of {name}" for name in names)), expected, found, scales, strict=False
    ):
        error = (result - right).abs().max().item() / (max(scale, least_scale * max(scales)) or 1.0)
        if not error <= _TOLERANCE:
            raise CheckFailedError(
                f"{what}: the {name} differs from the float64 reference by {error:.1e} of its largest entry"
            )
        largest = max(largest, error)
    return largest


def check_at_least(least: int, config: object, *names: str) -> None:
    """Look at the numbers of these names; None, where a field may be None, passes.

    Raises:
        ValueError: one is smaller; the message names it.

    >>> check_at_least(1, slice(1, None, 0), "start", "stop", "step")
    Traceback (most recent call last):
    ValueError: step must be at least 1, got 0
    """
    for name in names:
        number = getattr(config, name)
        if number is not None and number < least:
            raise ValueError(f"{name} must be at least {least}, got {number}")


def check_one_of(allowed: Sequence[str], config: object, name: str) -> None:
    """Look at the word of this name.

    Raises:
        ValueError: it is none of those allowed.

    >>> check_one_of(("up", "down"), slice("left", None), "start")
    Traceback (most recent call last):
    ValueError: start must be one of up, down, got 'left'
    """
    word = getattr(config, name)
    if word not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {word!r}")


def check_runs(ks: Sequence[int], backend: str) -> None:
    """One run for each k, no two the same, on a backend that runs here.

    Raises:
        ValueError: the message names the option.
        RuntimeError: the backend cannot run here.

    >>> check_runs([16, 32, 16], "auto")
    Traceback (most recent call last):
    ValueError: k must not hold a number twice, got 16, 32, 16
    """
    for k in ks:
        check_count("k", k)
    if len(set(ks)) != len(ks):
        raise ValueError(f"k must not hold a number twice, got {', '.join(map(str, ks))}")
    choose_backend(backend)
