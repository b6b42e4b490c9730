"""Who computes the attention: this library's backends and their rivals, each as one function of the inputs."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from topk_attention.functional import RelativeBias, topk_attention

from ...rivals.names import TOPK
from .works import Work

# query, key, value [1, H, L, D] and, with a learned bias, its table [H, 2 L - 1] -> output [1, H, L, D]
Operation = Callable[..., Tensor]

RIVALS = ("sdpa", "topk-chunked", "query-chunks", "performer")
_PERFORMER_FEATURES = 256


def why_not(method: str, work: Work) -> str | None:
    """Why a method cannot do this work here; None where it can."""
    if method != "performer":
        return None
    if work.bias != "none" or work.dropout_p:
        return "Performer has no scores to add a bias to and no weights to drop"
    if work.is_causal:
        return "performer-pytorch's causal attention needs another package's CUDA kernel to be of use"
    try:
        _fast_attention_class()
    except ImportError as error:
        return f"performer-pytorch cannot be imported ({error}); pip install --no-deps -r requirements-benchmark.txt"
    return None


def new_operation(method: str, work: Work) -> Operation:
    """The method, ready to be called with `new_inputs`."""
    match method:
        case "sdpa":
            return functools.partial(_sdpa, work)
        case "performer":
            return _fast_attention_class()(work.head_dim, nb_features=_PERFORMER_FEATURES)
        case "query-chunks":
            return functools.partial(run_topk, work, None, "chunked")
    return functools.partial(run_topk, work, work.k, method.removeprefix(TOPK))


def new_inputs(work: Work) -> tuple[Tensor, ...]:
    """Random inputs of an operation; all want a gradient."""
    shape = (1, work.num_heads, work.length, work.head_dim)
    tensors = [torch.randn(shape) for _ in range(3)]
    if work.bias == "learned":
        tensors.append(torch.randn(work.num_heads, 2 * work.length - 1))
    return tuple(tensor.requires_grad_() for tensor in tensors)


def run_topk(
    work: Work,
    k: int | None,
    backend: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor | None = None,
    **options: Any,
) -> Any:
    """`topk_attention` with the options of the work."""
    return topk_attention(
        query,
        key,
        value,
        k=k,
        bias=None if table is None else RelativeBias(table),
        is_causal=work.is_causal,
        dropout_p=work.dropout_p,
        backend=backend,
        **options,
    )


def _sdpa(work: Work, query: Tensor, key: Tensor, value: Tensor, table: Tensor | None = None) -> Tensor:
    # Windows of the table are the cheapest way to write it out: an index_select would hold an L x L index as well.
    mask = None if table is None else table.unfold(1, work.length, 1).flip(1)[None]  # [1, H, L, L]
    if mask is not None and work.is_causal:
        mask = mask.masked_fill(torch.ones(mask.shape[2:], dtype=torch.bool).triu_(1), -torch.inf)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=work.dropout_p, is_causal=work.is_causal and mask is None
    )


def _fast_attention_class() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it uses what Python and torch have since deprecated
        from performer_pytorch import FastAttention
    return FastAttention
