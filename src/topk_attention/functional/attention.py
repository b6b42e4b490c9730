"""The public operation `topk_attention`: its meaning, its argument checks and its dispatch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from ..backends import choose_backend
from ..backends.autocast import autocast_off, in_autocast_dtype
from ..backends.calls import AttentionCall, KeyPanels, KeySums, accumulation_dtype
from ..backends.dropout import draw_seed
from ..backends.operators import is_transformed, needs_gradient
from .bias import Bias
from .checks import (
    as_k,
    check_context_parallel,
    check_count,
    check_dropout,
    check_floating,
    check_no_tangent,
    check_same_dtype_and_device,
    check_seed,
    shape_of,
)
from .completion import Completion
from .key_index import KeyIndex
from .observation import notify_observer

_BIAS_TYPES = Bias.__args__
AnyK = int | Sequence[int] | Tensor | Literal["all"] | None


class Selection(NamedTuple):
    """Which keys each query kept. K is the largest k, at most the number of keys.

    indices  [..., H, N, K]  int32, ascending; -1 marks an empty slot
    weights  [..., H, N, K]  float32 (float64 for float64 inputs), softmax weights before dropout, 0 in empty slots;
                             without gradient; with completion they sum to 1 less the weight of the rest, with sinks to
                             1 less that of the sink
    """

    indices: Tensor
    weights: Tensor


@overload
def topk_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    k: AnyK,
    attn_mask: Tensor | None = ...,
    bias: Tensor | Bias | None = ...,
    is_causal: bool = ...,
    dropout_p: float = ...,
    dropout_seed: int | Tensor | None = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    sinks: Tensor | None = ...,
    softcap: float | None = ...,
    backend: str = ...,
    query_chunk_size: int | None = ...,
    completion: Completion | None = ...,
    key_sums: KeySums | None = ...,
    key_index: KeyIndex | None = ...,
    return_selection: Literal[False] = ...,
) -> Tensor: ...


@overload
def topk_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    k: AnyK,
    attn_mask: Tensor | None = ...,
    bias: Tensor | Bias | None = ...,
    is_causal: bool = ...,
    dropout_p: float = ...,
    dropout_seed: int | Tensor | None = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    sinks: Tensor | None = ...,
    softcap: float | None = ...,
    backend: str = ...,
    query_chunk_size: int | None = ...,
    completion: Completion | None = ...,
    key_sums: KeySums | None = ...,
    key_index: KeyIndex | None = ...,
    return_selection: Literal[True],
) -> tuple[Tensor, Selection]: ...


def topk_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    k: AnyK,
    attn_mask: Tensor | None = None,
    bias: Tensor | Bias | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    backend: str = "auto",
    query_chunk_size: int | None = None,
    completion: Completion | None = None,
    key_sums: KeySums | None = None,
    key_index: KeyIndex | None = None,
    return_selection: bool = False,
) -> Tensor | tuple[Tensor, Selection]:
    """Let each query attend only to its k best-scoring keys (Gupta et al. 2021, section 2).

    B batch (any number of leading axes), H heads, N queries, M keys, D head size, E value size

    query       [B, H, N, D]  float16, bfloat16, float32 or float64
    key         [B, H, M, D]  same dtype and device as query
    value       [B, H, M, E]  same dtype and device as query
    k           keys kept per query: an int, one int per head (a list, tuple or 1-D tensor), or "all" or None for all
                (query chunking alone)
    attn_mask   bool, True = may attend, or float, added to the scores; broadcasts to [B, H, N, M]; size-1 axes are
                never expanded (of several leading axes, all or none); gets no gradient
    bias        float tensor that broadcasts to [B, H, N, M], or RelativeBias, BucketedBias or ALiBi; added to the
                scores; gets a gradient
    is_causal   query i sees keys j <= i + M - N: the last query sees all keys
    dropout_p   probability of dropping a kept weight; applies whenever it is above 0, as in
                `scaled_dot_product_attention`
    dropout_seed  decides the draw: an int of at least 0, or an int64 tensor of one number; by default torch's generator
                gives one to each call
    scale       factor on query . key, 1 / sqrt(D) by default
    enable_gqa  key and value may have fewer heads, each shared by H / heads consecutive query heads
    sinks       [H] float: each query of head h gets one more score, sinks[h], which takes part in its softmax and has
                no value (gpt-oss); never dropped, neither scaled nor capped; gets a gradient
    softcap     c above 0: a score s, scaled, counts as c * tanh(s / c), before masks and biases are added (Gemma 2).
                With float masks or biases beside it "cpu" runs as "chunked" does
    backend     "auto", "cpu" (compiled kernels), "triton" (kernels for a GPU), "chunked" (plain PyTorch, any device) or
                "reference"; a named one runs or raises; what the kernels of "triton" do not have, completion and
                float64 say, runs as "chunked" does; "auto" takes the fastest, which is PyTorch's own for full
                attention; for k=None "cpu" chunks queries as "chunked" does, because its kernels would save every key
                of every query
    query_chunk_size  the most queries of one head whose scores exist at a time; by default what fits a memory budget;
                "cpu" with a k (a few dozen queries) and PyTorch's own attention ignore it
    completion  adds the keys that a query sees and does not keep to its softmax, as one entry: see `Completion`; None
                leaves them out, as the paper does
    key_sums    sums over all keys, `Completion.sums(key, value)`, where the caller has kept them; they spare completion
                a pass over all keys and values where a call has one query, or no is_causal; get no gradient. With a
                boolean attn_mask [B, 1, 1, M] they are over the keys that it shows.
    key_index   a `KeyIndex` of key that the caller has kept; calls with few queries then read few keys, with the same
                output to the last bit. It must be of this very tensor. Calls that cannot use it do without.
    return_selection  also return which keys were kept

    Returns [B, H, N, E] in the dtype of query; with return_selection a pair of that and a `Selection`.

    With is_causal the last query sees the last key, for any number of queries (rows) and keys (columns)::

        5 queries, 5 keys      2 queries, 5 keys      5 queries, 3 keys
        x . . . .              x x x x .              . . .
        x x . . .              x x x x x              . . .
        x x x . .                                     x . .
        x x x x .                                     x x .
        x x x x x                                     x x x

    The softmax runs over the kept scores alone. With k >= M this is full attention. Of tied keys the one with the lower
    index is kept, on every backend. A query that sees no key returns zeros and gets zero gradient. A query that sees
    fewer than k keys uses all of them. A score of -inf hides its key. NaN or inf in a hidden key or value never reaches
    the output. In a key that a query sees, it makes the query's output NaN.

    A cap keeps the order of scores, so it changes which keys are kept only where a float mask or a bias is added to
    what it gives.

    With completion, NaN or inf in a value that a query sees makes its output NaN or inf, whether it is kept or not.

    Sums are kept in float32 (float64 for float64). The backward pass needs query, key, value, and for each kept key an
    int32 index and a float weight; these are saved. Under autocast query, key and value are cast as for
    `scaled_dot_product_attention`. Derivatives of the gradient and forward-mode derivatives exist only for
    backend="reference".

    Raises:
        TypeError: k, a mask or a bias is of the wrong type.
        ValueError: a shape, dtype, device, k or the backend's name does not fit.
        RuntimeError: the backend asked for cannot run here, or the call is within torch's `context_parallel`.
        NotImplementedError: an input carries a tangent, as under `torch.func.jvp`, and the backend cannot use it.

    >>> import torch
    >>> q, key, v = (torch.randn(2, 8, 128, 64) for _ in range(3))
    >>> topk_attention(q, key, v, k=32).shape
    torch.Size([2, 8, 128, 64])
    """
    check_context_parallel()
    panels = _check_index(key_index, key)
    query, key, value = in_autocast_dtype(query), in_autocast_dtype(key), in_autocast_dtype(value)
    check_attention_shapes(query, key, value, enable_gqa)
    *batch, num_heads, num_queries, head_dim = query.shape
    num_keys = key.shape[-2]
    check_dropout(dropout_p)
    if query_chunk_size is not None:
        check_count("query_chunk_size", query_chunk_size)
    full_shape = (*batch, num_heads, num_queries, num_keys)
    dense_bias, relative_bias = _lower_bias(bias, query, full_shape)
    call = AttentionCall(
        query=_with_one_batch_axis(query),
        key=_with_one_batch_axis(key),
        value=_with_one_batch_axis(value),
        head_k=_k_per_head(k, num_heads, num_keys),
        attn_mask=_lower_mask(attn_mask, query, full_shape),
        bias=dense_bias,
        relative_bias=relative_bias,
        is_causal=is_causal,
        scale=_check_scale(scale, head_dim),
        sinks=_check_sinks(sinks, query, num_heads),
        softcap=_check_softcap(softcap, completion),
        dropout_p=dropout_p,
        seed=_seed_of(dropout_seed, dropout_p, query.device),
        query_chunk_size=query_chunk_size,
        return_selection=return_selection,
        mass_scale=_check_completion(completion, num_heads, query),
        rest_lift=0.0 if completion is None else completion.lift,
        sums=_check_sums(key_sums, completion, key, value),
        key_index=panels,
        keys_in_files=panels is not None and key_index is not None and key_index.keys_in_files,
    )
    output, indices, weights = _run(call, backend)
    if call.mass_scale is not None and not call.is_completed() and needs_gradient(call.mass_scale):
        output = output + _zero_of(call.mass_scale).to(output.dtype)  # no backend has read it: nothing is completed
    notify_observer(call, output)
    if len(batch) != 1:
        output = output.view(*batch, *output.shape[1:])
    if indices is None or weights is None:
        return output
    return output, Selection(indices.view(*batch, *indices.shape[1:]), weights.view(*batch, *weights.shape[1:]))


def _run(call: AttentionCall, backend: str) -> tuple[Tensor, Tensor | None, Tensor | None]:
    choice = choose_backend(backend, call)
    if choice.name != "reference":
        check_no_tangent("topk_attention", choice.name, *call.differentiable())
    if call.key.shape[1] == 0 or call.key.shape[2] == 0:  # no heads or no keys: every query returns zeros
        zeros = (_zero_of(x).to(call.query.dtype) for x in call.differentiable() if x is not None)
        output = sum(zeros, call.query.new_zeros(())).expand(*call.query.shape[:3], call.value.shape[3]).clone()
        nothing = call.query.new_empty(*call.query.shape[:3], 0, dtype=accumulation_dtype(call.query.dtype))
        return (output, nothing.int(), nothing) if call.return_selection else (output, None, None)
    with autocast_off(call.query.device.type):
        match choice.name:
            case "cpu" | "chunked" if call.is_completed():
                from ..backends import completed_attention

                return completed_attention.attention(call, choice.name)
            case "cpu":
                from ..backends import cpu

                return cpu.attention(call)
            case "sdpa":
                from ..backends import full_attention

                return full_attention.attention(call), None, None
            case "reference":
                from ..backends import reference

                output, indices, weights = reference.attention(call)
                return (output, indices, weights.detach()) if call.return_selection else (output, None, None)
            case "triton":
                from ..backends.triton import attention

                return attention.attention(call)
            case "chunked":
                from ..backends import chunked

                return chunked.attention(call)
    raise AssertionError(choice)


def _zero_of(tensor: Tensor) -> Tensor:
    """A sum of none of its elements, so that the tensor gets a gradient, zeros, also where nothing else reads it."""
    return tensor.flatten()[:0].sum()


def check_attention_shapes(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    """Raise unless these are tensors of one dtype and device whose shapes belong together."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_floating(name, tensor)
        if tensor.ndim < 3:
            raise ValueError(f"{name} must have shape [..., heads, length, size], got {shape_of(tensor)}")
    check_same_dtype_and_device("query", query, key=key, value=value)
    *batch, num_heads, _, head_dim = query.shape
    if head_dim == 0:
        raise ValueError(f"query must have a head size of at least 1, got {shape_of(query)}")
    key_heads = key.shape[-3] if enable_gqa else num_heads
    expected: list[int | str] = [*batch, key_heads, "M", head_dim]
    if key.ndim != query.ndim or [*key.shape[:-2], "M", key.shape[-1]] != expected:
        hint = (
            "; fewer key heads need enable_gqa=True"
            if key.ndim == query.ndim and key.shape[-3] != num_heads and num_heads % max(key.shape[-3], 1) == 0
            else ""
        )
        wanted: list[int | str] = [*batch, "heads", "M", head_dim] if enable_gqa else expected
        raise ValueError(f"key must have shape {_shape_text(wanted)} to match query, got {shape_of(key)}{hint}")
    if num_heads % max(key_heads, 1) != 0 or (key_heads == 0) != (num_heads == 0):
        raise ValueError(f"query heads must be a multiple of key heads, got {num_heads} and {key_heads}")
    if list(value.shape[:-1]) != list(key.shape[:-1]):
        raise ValueError(
            f"value must have shape {_shape_text([*key.shape[:-1], 'E'])} to match key, got {shape_of(value)}"
        )
    if key.shape[-2] >= 2**31:
        raise ValueError(f"key must have fewer than 2^31 rows because indices are int32, got {key.shape[-2]}")


def _seed_of(dropout_seed: int | Tensor | None, dropout_p: float, device: torch.device) -> Tensor | None:
    if dropout_seed is not None:
        check_seed(dropout_seed)
    if dropout_p == 0:
        return None
    if dropout_seed is None:
        return draw_seed(device)
    if isinstance(dropout_seed, Tensor):
        return dropout_seed.reshape(()).to(device)
    return torch.tensor(dropout_seed, dtype=torch.int64, device=device)


def _check_sinks(sinks: Tensor | None, query: Tensor, num_heads: int) -> Tensor | None:
    """The sinks [H] in the accumulation dtype."""
    if sinks is None:
        return None
    check_floating("sinks", sinks)
    if list(sinks.shape) != [num_heads]:
        raise ValueError(f"sinks must have shape [{num_heads}], one number for each query head, got {shape_of(sinks)}")
    if sinks.device != query.device:
        raise ValueError(f"sinks must be on {query.device} like query, got {sinks.device}; move one of them")
    return sinks.to(accumulation_dtype(query.dtype))


def _check_softcap(softcap: float | None, completion: Completion | None) -> float | None:
    if softcap is None:
        return None
    if isinstance(softcap, bool) or not isinstance(softcap, int | float):
        raise TypeError(f"softcap must be a number above 0 or None, got {type(softcap).__name__} {softcap!r}")
    if not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be finite and above 0, got {softcap}; None caps nothing")
    if completion is not None:
        raise ValueError(
            "completion cannot be combined with softcap: the mean of capped scores is not a sum over keys; leave one "
            "of them out"
        )
    return float(softcap)


def _check_completion(completion: Completion | None, num_heads: int, query: Tensor) -> Tensor | None:
    if completion is None:
        return None
    if not isinstance(completion, Completion):
        raise TypeError(f"completion must be a Completion or None, got {type(completion).__name__} {completion!r}")
    return completion.per_head(num_heads, query)


def _check_sums(sums: KeySums | None, completion: Completion | None, key: Tensor, value: Tensor) -> KeySums | None:
    if sums is None:
        return None
    if not isinstance(sums, KeySums):
        raise TypeError(f"key_sums must be a KeySums or None, got {type(sums).__name__}")
    if completion is None:
        raise ValueError("key_sums are for completion, but completion is None; leave them out")
    *leading, _, head_dim = key.shape
    shapes = ([*leading, head_dim], [*leading, value.shape[-1]], [*leading, head_dim, value.shape[-1]])
    dtype = accumulation_dtype(key.dtype)
    checked = []
    for name, total, shape in zip(sums._fields, sums, shapes, strict=True):
        if list(total.shape) != shape or total.dtype != dtype or total.device != key.device:
            raise ValueError(
                f"key_sums.{name} must be {dtype} {_shape_text(shape)} on {key.device} to match key and value, got "
                f"{total.dtype} {shape_of(total)} on {total.device}"
            )
        if total.requires_grad:
            raise ValueError(f"key_sums get no gradient, but {name} requires one; detach it")
        is_canonical = len(leading) == 2  # even a view that changes nothing takes time
        checked.append(
            total if is_canonical else total.reshape(math.prod(leading[:-1]), *total.shape[len(leading) - 1 :])
        )
    return KeySums(*checked)


def _check_index(key_index: KeyIndex | None, key: Tensor) -> KeyPanels | None:
    if key_index is None:
        return None
    if not isinstance(key_index, KeyIndex):
        raise TypeError(f"key_index must be a KeyIndex or None, got {type(key_index).__name__}")
    if is_transformed():
        return None
    check_floating("key", key)
    key_index.check_is_of(key)
    # Under autocast attention reads rounded keys.
    return key_index.panels() if in_autocast_dtype(key) is key else None


def _with_one_batch_axis(tensor: Tensor) -> Tensor:
    # Even a view that changes nothing takes 3 us.
    return tensor if tensor.ndim == 4 else tensor.reshape(math.prod(tensor.shape[:-3]), *tensor.shape[-3:])


def _shape_text(shape: Sequence[int | str]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def _check_scale(scale: float | None, head_dim: int) -> float:
    if scale is None:
        return 1 / math.sqrt(head_dim)
    if not -math.inf < scale < math.inf:
        raise ValueError(f"scale must be finite, got {scale}")
    return float(scale)


def _k_per_head(k: AnyK, num_heads: int, num_keys: int) -> tuple[int, ...] | None:
    k = as_k("k", k)
    if k is None:
        return None
    if not isinstance(k, tuple):
        return (min(k, num_keys),) * num_heads
    if len(k) != num_heads:
        raise ValueError(f"k must hold one number for each of the {num_heads} query heads, got {len(k)}")
    return tuple(min(k_of_head, num_keys) for k_of_head in k)


def _lower_bias(
    bias: Tensor | Bias | None, query: Tensor, full_shape: tuple[int, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """The dense and the relative part of a bias; at least one of them is None."""
    if bias is None:
        return None, None
    if isinstance(bias, _BIAS_TYPES):
        num_heads, num_queries, num_keys = full_shape[-3:]
        values = bias.relative_values(num_queries, num_keys) if num_queries + num_keys > 0 else None
        if values is not None and values.shape[0] != 1 and values.shape[0] != num_heads:
            raise ValueError(f"bias must be for 1 head or {num_heads} heads to match query, got {values.shape[0]}")
        if values is not None and values.device != query.device:
            raise ValueError(f"bias must be on {query.device} like query, got {values.device}")
        return None, values
    if not isinstance(bias, Tensor):
        names = ", ".join(kind.__name__ for kind in _BIAS_TYPES)
        raise TypeError(f"bias must be a tensor, {names} or None, got {type(bias).__name__}")
    check_floating("bias", bias)
    return _broadcastable("bias", bias, query, full_shape), None


def _lower_mask(attn_mask: Tensor | None, query: Tensor, full_shape: tuple[int, ...]) -> Tensor | None:
    if attn_mask is None:
        return None
    if not isinstance(attn_mask, Tensor):
        raise TypeError(f"attn_mask must be a tensor or None, got {type(attn_mask).__name__}")
    if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise TypeError(
            f"attn_mask must be bool (True = may attend) or float (added to the scores), got {attn_mask.dtype}; "
            "convert a 0/1 mask with .bool()"
        )
    if attn_mask.requires_grad:
        raise ValueError("attn_mask gets no gradient but requires one; pass it as bias=")
    return _broadcastable("attn_mask", attn_mask, query, full_shape)


def _broadcastable(name: str, tensor: Tensor, query: Tensor, full_shape: tuple[int, ...]) -> Tensor:
    """The tensor as [B|1, H|1, N|1, M|1]."""
    if tensor.device != query.device:
        raise ValueError(f"{name} must be on {query.device} like query, got {tensor.device}")
    aligned = (1,) * (len(full_shape) - tensor.ndim) + tuple(tensor.shape)
    fits = len(aligned) == len(full_shape) and all(
        size == 1 or size == full  # not `in`: compiled code with dynamic shapes gets that wrong
        for size, full in zip(aligned, full_shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{name} must broadcast to {_shape_text(full_shape)}, got {shape_of(tensor)}")
    tensor = tensor.view(aligned) if tensor.ndim != len(aligned) else tensor
    batch = full_shape[:-3]
    if all(size == 1 for size in aligned[:-3]):
        return tensor.reshape(1, *aligned[-3:])
    # Only the leading axes are expanded, and only where the mask differs along one of them.
    return tensor.expand(*batch, *aligned[-3:]).reshape(math.prod(batch), *aligned[-3:])
