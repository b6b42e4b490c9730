"""Exact top-k attention in Triton, for tensors on a GPU, with memory linear in length.

The scores of a tile of rows are computed twice and never stored. The first pass keeps the maximum of each group of
keys, of which the k-th largest is a threshold that k keys are proven to reach. The second pass keeps one bit for each
score that reaches it. The keys behind these few bits are scored once more, cut to the k best, weighed, and their values
summed. The backward pass reads k rows a query, then sums by key in a fixed order, without atomic operations.

Triton is imported when the first call runs here, and nowhere else in the library.
"""

from __future__ import annotations

import importlib.util
import os

import torch

from ..calls import AttentionCall
from .plan import MAX_DIM, MAX_K

# As Triton reads it, once, when it is first imported.
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET", "") in ("1", "true", "on", "yes")
_IS_INSTALLED = importlib.util.find_spec("triton") is not None
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# The first NVIDIA GPUs for which Triton compiles bfloat16 products.
_CAPABILITY = (8, 0)


def problem() -> str | None:
    """Why the kernels cannot run on this machine, None where they can."""
    if not _IS_INSTALLED:
        return "the package triton is not installed; torch for CUDA and ROCm brings it along"
    if IS_INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return "there is no GPU, and Triton's interpreter is off (TRITON_INTERPRET=1)"
    return None


def obstacle(call: AttentionCall) -> str | None:
    """Why the kernels do not compute a call on a device that they run on; None where they do."""
    if call.is_completed():
        return "the Triton kernels complete nothing"
    if call.head_k is None and not call.return_selection:
        return "k=None is chunking alone: it selects nothing, so there is nothing to save"
    if call.softcap is not None and call.adds_to_scores():
        return "a soft cap with something added to what it gives: every score is capped, and the kernels cap kept ones"
    if call.query.dtype not in _DTYPES and not IS_INTERPRETED:
        return f"the Triton kernels take float16, bfloat16 and float32, got {call.query.dtype}"
    largest_dim = max(call.query.shape[3], call.value.shape[3])
    if largest_dim > MAX_DIM:
        return f"the Triton kernels are tested for head sizes up to {MAX_DIM}, got {largest_dim}"
    largest_k = max(call.head_k or (call.key.shape[2],), default=0)
    if largest_k > MAX_K:
        return f"the Triton kernels are tested for k up to {MAX_K}, got {largest_k}"
    if call.query.shape[0] * call.query.shape[1] * call.query.shape[2] >= 2**31 - 2**20:
        return "the Triton kernels number the rows of a call in int32, and it has too many"
    return None


def too_old(device: torch.device) -> str | None:
    """Why "auto" leaves a GPU to others, None where it does not."""
    if IS_INTERPRETED or torch.version.hip is not None:
        return None
    capability = _capability_of(device)
    if capability < _CAPABILITY:
        return f"the Triton kernels need compute capability 8.0, got {capability[0]}.{capability[1]}"
    return None


@torch.compiler.assume_constant_result
def _capability_of(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
