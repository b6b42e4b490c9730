"""Who computes the attention: this library's backends and their rivals, each as one function of tensors.

Their answers are checked by the reference; the floor is the score product.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from topk_attention.functional import Completion, RelativeBias, topk_attention
from topk_attention.nn import TopKAttention

from ...rivals import PerformerAttention, RandomFeatureAttention, new_attention, random_feature_weights
from ...rivals.names import kept, method_of, split_backend
from ...runs.checks import NEAR_TIE
from ...runs.turns import Method, Operation, Tensors, at_most, leaves
from .layers import captured_inputs
from .works import LayerWork, Point, Work, backend_of, new_work

# Query, key, value [1, H, L, D], with a learned bias its table [H, 2 L - 1], and a method's own weights -> [1, H, L, D]
Attend = Callable[..., Tensor]

_PERFORMER_FEATURES = 256
_PROJECTIONS = ("query", "key", "value", "output")
_WEIGHTS = tuple(f"{name}_projection.{part}" for name in _PROJECTIONS for part in ("weight", "bias"))


def why_not(method: str, work: Work) -> str | None:
    """Why a method cannot take its turn at this work here; None where it can."""
    if method != "performer":
        return None
    if isinstance(work, LayerWork) or work.dtype != "float32":
        return "Performer is measured on random float32 tensors alone"
    if work.bias != "none" or work.dropout_p:
        return "Performer has no scores to add a bias to and no weights to drop"
    if work.is_causal:
        return "performer-pytorch's causal attention needs another package's CUDA kernel to be of use"
    try:
        _fast_attention_class()
    except ImportError as error:
        return f"performer-pytorch cannot be imported ({error}); pip install --no-deps -r requirements-benchmark.txt"
    return None


def is_package(method: str, work: Work) -> bool:
    """Whether the method is performer-pytorch, an approximation with features of its own."""
    return method == "performer" and not work.is_causal


def new_method(method: str, work: Work) -> Method:
    """The method, ready for `new_inputs`.

    method  "topk-BACKEND" or a name of `rivals.names.METHODS`. "performer" is the package performer-pytorch where the
            attention is not causal, otherwise the one in `rivals`
    """
    name, _ = split_backend(method)
    if (backend := backend_of(method)) is not None:
        k, completion = kept(method, work.k), completion_of(method)
        if work.projections:
            return Method(_library_layer(work, k, backend, completion))
        return Method(functools.partial(run_topk, work, k, backend, completion=completion))
    if name == "sdpa":
        return Method(_layer(work, functools.partial(_sdpa, work)))
    if is_package(name, work):
        return Method(_fast_attention_class()(work.head_dim, nb_features=_PERFORMER_FEATURES))
    return _rival(name, work)


def completion_of(method: str) -> Completion | None:
    """What the method adds for the keys that are not kept."""
    return Completion() if method_of(method).is_completed else None


def new_inputs(work: Work) -> Tensors:
    """The tensors of an operation in the order of `input_names`: random, or those of a layer."""
    if isinstance(work, LayerWork):
        return captured_inputs(work)
    shape = (1, work.num_heads, work.length, work.head_dim)
    tensors: list[Tensor]
    if work.projections:
        width = work.num_heads * work.head_dim
        tensors = [torch.randn(1, work.length, width)]
        tensors += [parameter for _ in _PROJECTIONS for parameter in nn.Linear(width, width).parameters()]
    else:
        tensors = [torch.randn(shape) for _ in range(3)]
    if work.bias == "learned":
        tensors.append(torch.randn(work.num_heads, 2 * work.length - 1))
    return tuple(tensor.to(getattr(torch, work.dtype)) for tensor in tensors)


def input_names(work: Work) -> list[str]:
    """What errors call the tensors; a method's own weights come after them."""
    names = ["x", *_WEIGHTS] if work.projections else ["query", "key", "value"]
    return [*names, *(["bias"] if work.bias == "learned" else []), "sigma"]


def heads_of(work: Work, tensors: Tensors) -> Tensors:
    """Query, key and value [1, H, L, D] from the tensors of an operation, and those that come after the projections."""
    if not work.projections:
        return tensors
    heads = (
        F.linear(tensors[0], weight, bias).unflatten(-1, (work.num_heads, -1)).transpose(1, 2)
        for weight, bias in zip(tensors[1:7:2], tensors[2:8:2], strict=True)
    )
    return *heads, *tensors[9:]


def run_topk(work: Work, k: int | None, backend: str, *tensors: Tensor, **options: Any) -> Any:
    """`topk_attention` with the options of the work."""
    query, key, value, *table = tensors
    return topk_attention(
        query,
        key,
        value,
        k=k,
        bias=RelativeBias(table[0]) if table else None,
        is_causal=work.is_causal,
        dropout_p=work.dropout_p,
        backend=backend,
        query_chunk_size=work.chunk_size,
        enable_gqa=_shares_keys(query, key),
        **options,
    )


def reference(method: str, work: Work) -> Callable[..., Tensor]:
    """The right output, by the library's reference backend."""
    attend = functools.partial(run_topk, work, kept(method, work.k), "reference", completion=completion_of(method))
    return _layer(work, attend)


def _layer(work: Work, attend: Attend) -> Callable[..., Tensor]:
    """The attention, with projections around it where the work has them."""
    if not work.projections:
        return attend

    def run(*tensors: Tensor) -> Tensor:
        return F.linear(attend(*heads_of(work, tensors)).transpose(1, 2).flatten(2), *tensors[7:9])

    return run


def _library_layer(work: Work, k: int | None, backend: str, completion: Completion | None) -> Callable[..., Tensor]:
    """`TopKAttention`. It gets its weights with each call, so that its own take no memory."""
    width = work.num_heads * work.head_dim
    layer = TopKAttention(
        *(nn.Linear(width, width, device="meta") for _ in _PROJECTIONS),
        num_heads=work.num_heads,
        k=k,
        is_causal=work.is_causal,
        dropout_p=work.dropout_p,
        backend=backend,
        query_chunk_size=work.chunk_size,
        completion=completion,
    )

    def run(x: Tensor, *tensors: Tensor) -> Tensor:
        table = tensors[8:]
        bias = RelativeBias(table[0]) if table else None
        return functional_call(layer, dict(zip(_WEIGHTS, tensors[:8], strict=True)), (x,), {"bias": bias})

    return run


def _rival(name: str, work: Work) -> Method:
    """A method of `rivals`, whose own weights come after the tensors of the work."""
    baseline = new_attention(
        name, head_dim=work.head_dim, num_features=work.num_features, query_chunk_size=work.chunk_size
    )
    weights = dict(baseline.named_parameters())

    def attend(query: Tensor, key: Tensor, value: Tensor, *own: Tensor) -> Tensor:
        options = {"is_causal": work.is_causal, "dropout_p": work.dropout_p}
        return functional_call(baseline, dict(zip(weights, own, strict=True)), (query, key, value), options)

    truth = None
    if isinstance(baseline, PerformerAttention | RandomFeatureAttention):
        truth = _layer(work, functools.partial(_written_out, work, baseline))
    stored = (lambda tensors: leaves((*tensors, *weights.values()))) if weights else leaves
    return Method(_layer(work, attend), stored, truth)


def _written_out(work: Work, baseline: PerformerAttention | RandomFeatureAttention, *tensors: Tensor) -> Tensor:
    """Attention with random features, every weight in memory."""
    query, key, value, *own = tensors
    visible = torch.ones(work.length, work.length, dtype=torch.bool, device=query.device)
    visible = visible.tril() if work.is_causal else visible
    return random_feature_weights(baseline, query, key, visible=visible, sigma=own[0] if own else None) @ value


def _sdpa(work: Work, query: Tensor, key: Tensor, value: Tensor, table: Tensor | None = None) -> Tensor:
    # Windows of the table are the cheapest way to write it out: an index_select would hold an L x L index as well.
    mask = None if table is None else table.unfold(1, work.length, 1).flip(1)  # [H, L, L]
    if mask is not None and work.is_causal:
        # In place, before a view of it is taken: autograd would copy the gradient of a view that changes.
        mask.masked_fill_(torch.ones(mask.shape[1:], dtype=torch.bool, device=mask.device).triu_(1), -torch.inf)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=None if mask is None else mask[None],
        dropout_p=work.dropout_p,
        is_causal=work.is_causal and mask is None,
        enable_gqa=_shares_keys(query, key),
    )


def _shares_keys(query: Tensor, key: Tensor) -> bool:
    return query.shape[1] != key.shape[1]


def _fast_attention_class() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it uses what Python and torch have since deprecated
        from performer_pytorch import FastAttention
    return FastAttention


# Of the check. Odd, and k and chunks a quarter of it: kernels meet full tiles and leftovers, most keys are left out.
_LENGTH = 333
# Of the check of compiled kernels, with an eighth of it for k: fewer keys, or a larger k, are not screened.
_SCREENED_LENGTH = 1101
# Of points, whose memory is measured in the same process: at 333 the check left holes in the heap that raised the peak
# of a layer at L = 2,048 from 97 to as much as 114 MiB.
_LENGTH_OF_POINTS = 193
# The buffer must stay in cache, so that the product is timed and not the memory behind it. Of the tiles tried (1 to 8
# MiB, 256 to 2,048 keys; L = 2,048, one thread) these were fastest: median 87 GFLOP/s, the others 72 to 81.
_TILE_BYTES = 2 * 2**20
_TILE_KEYS = 256


def score_product(work: Work, inputs: Tensors) -> Callable[[], None]:
    """All scores that attention must look at, tile by tile into one buffer."""
    query, key = (tensor.detach()[0] for tensor in inputs[:2])  # [H, L, D]
    key = key.repeat_interleave(len(query) // len(key), 0)
    num_keys = min(work.length, _TILE_KEYS)
    num_queries = max(1, min(work.length, _TILE_BYTES // (query.element_size() * work.num_heads * num_keys)))
    buffer = query.new_empty(work.num_heads * num_queries * num_keys)

    def run() -> None:
        for start in range(0, work.length, num_queries):
            end = min(start + num_queries, work.length)
            visible = end if work.is_causal else work.length
            for first_key in range(0, visible, num_keys):
                queries = query[:, max(start, first_key) if work.is_causal else start : end]
                keys = key[:, first_key : min(first_key + num_keys, visible)]
                shape = (work.num_heads, queries.shape[1], keys.shape[1])
                torch.bmm(queries, keys.mT, out=buffer[: math.prod(shape)].view(shape))

    return run


def small(method: str, work: Work) -> Work | None:
    """The work at a short length, for the check; None for performer-pytorch, which is an approximation.

    This library must draw the same dropout as its reference backend; rivals draw their own and are checked without.
    """
    if is_package(method, work):
        return None
    longest, share = _LENGTH_OF_POINTS if isinstance(work, Point) else _LENGTH, 4
    if backend_of(method) == "cpu" and not isinstance(work, Point):
        longest, share = _SCREENED_LENGTH, 8
    heads = {} if isinstance(work, LayerWork) else {"num_heads": 2}
    return replace(
        at_most(work, {"length": longest, "k": longest // share, **heads}),
        chunk_size=None if work.chunk_size is None else min(work.chunk_size, longest // 4),
        dropout_p=work.dropout_p if method_of(method).is_ours else 0.0,
    )


@torch.no_grad()
def is_clear(method: str, work: Work, tensors: Tensors) -> Tensor | float:
    """0 for queries whose k-th best score is close to the next, otherwise 1: [1, H, L, 1], of a layer [1, L, 1]."""
    k = kept(method, work.k)
    if k is None or k >= work.length:
        return 1.0
    heads = heads_of(work, tuple(tensor.double() for tensor in tensors))
    _, selection = run_topk(replace(work, dropout_p=0.0), k + 1, "reference", *heads, return_selection=True)
    next_best, kth_best = selection.weights.topk(2, largest=False).values.unbind(-1)
    # Logarithms of weights are scores, up to a constant of the row. A weight of 0 is an empty slot: nothing to mistake.
    clear = ~(kth_best.log() - next_best.log() < NEAR_TIE)
    return (clear.all(1) if work.projections else clear).unsqueeze(-1)


OPERATION = Operation(
    new_work,
    Point,
    new_method,
    new_inputs,
    score_product,
    tiny={"length": 64},
    small=small,
    reference=reference,
    is_clear=is_clear,
    input_names=input_names,
    # The gradient of the key projection's bias is zero apart from rounding.
    least_scale=lambda work: 0.1 if work.projections else 0.0,
)
