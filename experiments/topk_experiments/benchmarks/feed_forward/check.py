"""Whether a method computes what it is timed for: against the reference backend in float64, at a small size."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from topk_attention.backends.activations import activate

from ...rivals.names import kept
from ...runs.checks import NEAR_TIE, largest_error
from ...runs.turns import Tensors
from .methods import NAMES, new_inputs, new_method, run_topk
from .works import Work

# Odd, so that kernels meet full blocks and leftovers, and k a sixth of the neurons.
_TOKENS = 133
_D_MODEL = 77
_D_FF = 501
_K = 83


def check(method: str, work: Work, seed: int = 0) -> float:
    """Compare output and gradients of a method with the truth.

    Few tokens stay few, as kernels treat them separately.

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
    computed = new_method(method, small)
    tensors = computed.stored(new_inputs(small))
    k = kept(method, small.k)
    return largest_error(
        computed.run,
        functools.partial(run_topk, small, k, "reference"),
        tensors,
        _is_clear(small, tensors, k),
        names=NAMES,
        what=f"{method}, {small}",
        seed=seed,
    )


@torch.no_grad()
def _is_clear(work: Work, tensors: Tensors, k: int | None) -> Tensor | float:
    """0 for tokens whose k-th best neuron is close to the next, otherwise 1: [T, 1]."""
    x, w_in, _, *w_gate = (tensor.double() for tensor in tensors)
    if k is None or k >= work.d_ff:
        return 1.0
    ranked_by = F.linear(x, w_in)
    if w_gate:
        ranked_by = (activate(F.linear(x, w_gate[0]), work.activation) * ranked_by).abs()
    best = ranked_by.topk(k + 1).values
    return best[:, k - 1 : k] - best[:, k:] >= NEAR_TIE
