"""Whether a method computes what it is timed for: against the reference backend in float64, at a small size."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from topk_attention.backends.activations import activate

from ...rivals.names import kept
from ...runs.checking import NEAR_TIE, largest_error, output_and_gradients
from .methods import NAMES, new_inputs, new_method, run_topk
from .works import Work

# Odd, so that kernels meet full blocks and leftovers, and k a sixth of the neurons.
_TOKENS = 133
_D_MODEL = 77
_D_FF = 501
_K = 83


def check(method: str, work: Work, seed: int = 0) -> float:
    """Compare output and gradients of a method with the truth.

    Few tokens stay few, as kernels have a way of their own for them.

    Returns the largest difference as a fraction of its tensor's largest entry.

    Raises:
        CheckFailedError: they differ by more than rounding.
    """
    small = replace(
        work,
        tokens=min(work.tokens, _TOKENS),
        d_model=min(work.d_model, _D_MODEL),
        d_ff=min(work.d_ff, _D_FF),
        k=min(work.k, _K),
    )
    torch.manual_seed(seed)
    inputs = new_inputs(small)
    exact = tuple(tensor.double().requires_grad_() for tensor in inputs)
    k = kept(method, small.k)
    output_gradient = torch.randn(inputs[0].shape, dtype=torch.float64) * _is_clear(small, exact, k)
    truth = output_and_gradients(run_topk(small, k, "reference", *exact), exact, NAMES, output_gradient)
    candidate = new_method(method, small)
    stored = candidate.stored(inputs)
    results = output_and_gradients(candidate.operation(*stored), stored, NAMES, output_gradient)
    return largest_error(results, truth, told=f"{method}, {small}")


@torch.no_grad()
def _is_clear(work: Work, inputs: tuple[Tensor, ...], k: int | None) -> Tensor:
    """[T, 1], True for tokens whose k-th best neuron is well above the next."""
    x, w_in, _, *w_gate = inputs
    if k is None or k >= work.d_ff:
        return torch.ones(work.tokens, 1, dtype=torch.bool)
    ranked_by = F.linear(x, w_in)
    if w_gate:
        ranked_by = (activate(F.linear(x, w_gate[0]), work.activation) * ranked_by).abs()
    best = ranked_by.topk(k + 1).values
    return best[:, k - 1 : k] - best[:, k:] >= NEAR_TIE
