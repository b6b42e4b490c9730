"""The operation: top-k attention of one sequence whose tokens lie on several ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..backends.autocast import in_autocast_dtype
from ..backends.dropout import draw_seed
from ..functional import ALiBi, BucketedBias, Completion, RelativeBias, topk_attention
from ..functional.attention import AnyK, check_attention_shapes
from ..functional.bias import Bias
from ..functional.checks import as_k, check_dropout, check_floating, check_seed, shape_of
from ..functional.completion import check_completion
from .agreement import agree
from .cost import Shape, choose_method, heads_on_ranks, key_heads_on_ranks
from .ranks import Layout, Ranks, ToHeads, ToTokens
from .shards import spans_of_all
from .spans import Order, check_order, num_tokens

Method = Literal["auto", "heads", "keys"]


@torch.compiler.disable
def sequence_parallel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mesh: Any,
    *,
    k: AnyK,
    attn_mask: Tensor | None = None,
    bias: Bias | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    completion: Completion | None = None,
    backend: str = "auto",
    order: Order = "zigzag",
    method: Method = "auto",
) -> Tensor:
    """Top-k attention of one sequence whose tokens lie on several processes: `topk_attention` of the whole sequence.

    B batch, H heads, G key heads, n queries and m keys of this rank, P ranks, D head size, E value size

    query      [B, H, n, D]  this rank's tokens, as `shard_sequence` cuts them
    key        [B, G, m, D]  likewise; keys may be those of another sequence (cross-attention)
    value      [B, G, m, E]
    mesh       a `DeviceMesh` of one dimension, such as mesh["cp"], or a process group: the P ranks
    k          as in `topk_attention`, for all H heads
    attn_mask  [B, 1, 1, m] of this rank's keys (padding): bool, True = may attend, or float, added to the scores; may
               be None on some ranks, where then every key may be seen; no gradient
    bias       RelativeBias, BucketedBias or ALiBi, for all heads and the whole sequence, the same on every rank
    is_causal, dropout_p, scale, enable_gqa, sinks, softcap, completion, backend  as in `topk_attention`, of all heads
               and the whole sequence
    dropout_seed  decides which weights are dropped; by default torch's generator on the first rank gives one
    order      the one in which `shard_sequence` cut the tokens
    method     "heads": each rank computes H / P heads of the whole sequence; tokens go to heads and outputs back by
               all-to-all (Jacobs et al. 2023, DeepSpeed-Ulysses). P must divide H. "keys": each rank gathers all keys
               and values and computes its own queries. "auto" takes the one that sends fewer bytes, forward and
               backward: see `sequence_parallel_cost`
    Returns [B, H, n, E], the outputs of this rank's queries.

    Keys, order of ties, masks, biases, the draw of dropout and completion are those of one process that holds the whole
    sequence; the outputs and gradients are equal to rounding. With the same seed dropout drops the same weights.

    Every rank of the mesh must call it, and run its backward pass, in the same order as the others. query, key and
    value get the whole gradient of their tokens. What all ranks share (the tensors of bias, sinks and completion) gets
    on each rank a part of its gradient, as the weights of the model do: the sum over ranks is that of one process.

    Before anything is sent the ranks compare their arguments, 184 bytes for each rank: where one of them raises, all
    raise the same error, and none waits.

    Raises:
        TypeError, ValueError: an argument is wrong on some rank, or not the same on all; the message names the argument
            and the rank.
        RuntimeError: the backend cannot run here, or the call is within torch's `context_parallel`.

    >>> # each of P processes, started by torchrun
    >>> # mesh = init_device_mesh("cpu", (P,), mesh_dim_names=("cp",))
    >>> # q, key, v = (shard_sequence(x, mesh, dim=2) for x in whole)
    >>> # sequence_parallel_attention(q, key, v, mesh, k=32, is_causal=True).shape
    """
    ranks = Ranks.of(mesh)
    call, error, own_seed = None, None, 0
    try:
        query, key, value = in_autocast_dtype(query), in_autocast_dtype(key), in_autocast_dtype(value)
        _check_own(query, key, value, attn_mask, bias, dropout_p, dropout_seed, enable_gqa, sinks, completion)
        check_order(order)
        _check_method(method, query, ranks)
        kept = _checked_k(k, query.shape[1])
        call = _Call(ranks, query, key, value, kept, bias, is_causal, dropout_p, scale, sinks, softcap, completion)
        if dropout_p > 0:
            own_seed = int(draw_seed(torch.device("cpu")) if dropout_seed is None else dropout_seed)
    except (TypeError, ValueError, RuntimeError) as raised:
        error = raised
    arguments = _words(query, key, value, error is None)
    arguments |= {"k": str(k if call is None else call.k), "bias": _bias_words(bias), "is_causal": str(is_causal)}
    arguments |= {"dropout_p": str(dropout_p), "dropout_seed": "one of the call" if dropout_seed is None else "given"}
    arguments |= {"scale": str(scale), "enable_gqa": str(enable_gqa), "softcap": str(softcap), "backend": str(backend)}
    arguments |= {"sinks": _shape_words(sinks), "completion": "None" if completion is None else str(completion)}
    arguments |= {"order": str(order), "method": str(method)}
    lengths = [0, 0] if call is None else [query.shape[2], key.shape[2]]
    found = agree(ranks, error, arguments, [*lengths, own_seed, *_mask_numbers(attn_mask)])
    assert call is not None
    if dropout_seed is not None and any(row[2] != found[0][2] for row in found):
        seeds = [row[2] for row in found]
        raise ValueError(f"dropout_seed must be the same on every rank, got {seeds}")
    query_spans = spans_of_all("query", [row[0] for row in found], ranks, order)
    key_spans = spans_of_all("key", [row[1] for row in found], ranks, order)
    mask = _mask_where_others_have_one(attn_mask, call, [tuple(row[3:]) for row in found])
    shape = call.shape(query_spans, key_spans)
    chosen = choose_method(shape) if method == "auto" else method
    return _run(call, query_spans, key_spans, mask, found[0][2], backend, chosen)


@dataclass(frozen=True)
class _Call:
    """The arguments that hold for all heads and the whole sequence; query, key and value of this rank's tokens."""

    ranks: Ranks
    query: Tensor
    key: Tensor
    value: Tensor
    k: int | tuple[int, ...] | None
    bias: Bias | None
    is_causal: bool
    dropout_p: float
    scale: float | None
    sinks: Tensor | None
    softcap: float | None
    completion: Completion | None

    def shape(self, query_spans: Sequence[Sequence[range]], key_spans: Sequence[Sequence[range]]) -> Shape:
        """What the number of bytes depends on."""
        return Shape(
            batch_size=self.query.shape[0],
            num_heads=self.query.shape[1],
            num_key_heads=self.key.shape[1],
            head_dim=self.query.shape[3],
            value_dim=self.value.shape[3],
            queries=tuple(map(num_tokens, query_spans)),
            keys=tuple(map(num_tokens, key_spans)),
            element_size=self.query.element_size(),
        )

    def k_of(self, heads: range) -> int | tuple[int, ...] | None:
        return self.k[heads.start : heads.stop] if isinstance(self.k, tuple) else self.k

    def completion_of(self, heads: range) -> Completion | None:
        scale = None if self.completion is None else self.completion.mass_scale
        if self.completion is None or not (isinstance(scale, tuple) or (isinstance(scale, Tensor) and scale.ndim == 1)):
            return self.completion
        return replace(self.completion, mass_scale=scale[heads.start : heads.stop])

    def bias_values(self, heads: range, num_queries: int, num_keys: int) -> Tensor | None:
        """The bias of these heads over the whole sequence, by distance: [h or 1, N + M - 1]."""
        bias, own = self.bias, slice(heads.start, heads.stop)
        if bias is None or num_queries + num_keys == 0:
            return None
        is_for_all_heads = _bias_heads(bias) == 1
        if not is_for_all_heads and isinstance(bias, BucketedBias):
            bias = replace(bias, table=bias.table[:, own])
        elif not is_for_all_heads and isinstance(bias, ALiBi):
            bias = ALiBi(bias.slopes[own])
        elif not is_for_all_heads and isinstance(bias, RelativeBias):
            bias = RelativeBias(bias.values[own])
        return bias.relative_values(num_queries, num_keys)


def _run(
    call: _Call,
    query_spans: tuple[tuple[range, ...], ...],
    key_spans: tuple[tuple[range, ...], ...],
    mask: Tensor | None,
    seed: int,
    backend: str,
    method: str,
) -> Tensor:
    ranks, num_heads, num_key_heads = call.ranks, call.query.shape[1], call.key.shape[1]
    num_queries, num_keys = (sum(map(num_tokens, spans)) for spans in (query_spans, key_spans))
    by_heads = method == "heads"
    heads = heads_on_ranks(num_heads, ranks.size, by_heads)
    key_heads = key_heads_on_ranks(num_heads, num_key_heads, ranks.size, by_heads)
    of_keys = Layout(ranks, key_heads, key_spans, num_key_heads)
    if by_heads:
        of_queries = Layout(ranks, heads, query_spans, num_heads)
        query, key, value = ToHeads.apply((of_queries, of_keys, of_keys), call.query, call.key, call.value)
        spans: tuple[range, ...] = (range(num_queries),)
    else:
        query = call.query
        key, value = ToHeads.apply((of_keys, of_keys), call.key, call.value)
        spans = query_spans[ranks.rank] or (range(0),)  # also without a query the others need this rank's backward pass
    if mask is not None:  # as one head of one number: [B, 1, m, 1]
        layout = Layout(ranks, (range(1),) * ranks.size, key_spans, 1)
        mask = layout.to_heads(mask.mT).mT
    own = heads[ranks.rank]
    part = _Part(
        call=call,
        query=query,
        key=key,
        value=value,
        mask=mask,
        bias=call.bias_values(own, num_queries, num_keys),
        heads=own,
        key_heads=key_heads[ranks.rank],
        spans=spans,
        num_queries=num_queries,
        seed=seed,
        backend=backend,
    )
    output = _join([part.attend_to_span(span) for span in spans], 2)
    return ToTokens.apply(of_queries, output) if by_heads else output


@dataclass(frozen=True)
class _Part:
    """What one rank computes: some heads of some queries over all keys.

    query      [B, h, n, D]  of the heads `heads`, at the positions `spans`
    key        [B, g, M, D]  of the key heads `key_heads`, in the order of positions; value likewise
    mask       [B|1, 1, 1, M]
    bias       [h|1, N + M - 1]
    """

    call: _Call
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    bias: Tensor | None
    heads: range
    key_heads: range
    spans: tuple[range, ...]
    num_queries: int
    seed: int
    backend: str

    def attend_to_span(self, span: range) -> Tensor:
        """The outputs of the queries at these positions, [B, h, n, E]."""
        batch = range(self.query.shape[0])
        return _join([self._attend_in_pieces(batch, heads, span) for heads in self._even_groups()], 1)

    def _even_groups(self) -> list[range]:
        """The heads, cut where a key head serves only some of its query heads here."""
        group = max(self.call.query.shape[1] // max(self.call.key.shape[1], 1), 1)
        start, stop = self.heads.start, self.heads.stop
        first = min(-(-start // group) * group, stop)  # the first head of a key head all of whose query heads are here
        last = max(stop // group * group, first)
        pieces = (range(start, first), range(first, last), range(last, stop))
        return [piece for piece in pieces if piece] or [self.heads]

    def _attend_in_pieces(self, batch: range, heads: range, span: range) -> Tensor:
        """One call, or as many as the draw of dropout needs: see `_Rows`."""
        rows = _Rows(self.query.shape[0], self.call.query.shape[1], self.num_queries, batch, heads, span)
        if self.call.dropout_p == 0 or rows.first_is_base():
            return self._attend(batch, heads, span, self.seed ^ rows.first)
        if len(batch) > 1:
            return _join([self._attend_in_pieces(range(b, b + 1), heads, span) for b in batch], 0)
        if len(heads) > 1:
            return _join([self._attend_in_pieces(batch, range(h, h + 1), span) for h in heads], 1)
        return _join([self._attend_in_pieces(batch, heads, piece) for piece in rows.pieces()], 2)

    def _attend(self, batch: range, heads: range, span: range, seed: int) -> Tensor:
        call, num_keys = self.call, self.key.shape[2]
        # Queries and keys end together, so a part of the queries ends with the keys that its last one sees.
        end = max(0, min(num_keys, span.stop + num_keys - self.num_queries)) if call.is_causal else num_keys
        group = max(call.query.shape[1] // max(call.key.shape[1], 1), 1)
        own = slice(heads.start - self.heads.start, heads.stop - self.heads.start)
        of_keys = slice(heads.start // group - self.key_heads.start, -(-heads.stop // group) - self.key_heads.start)
        of_batch = slice(batch.start, batch.stop)
        key, value = (x[of_batch, of_keys, :end] for x in (self.key, self.value))
        query = self.query[of_batch, own, _place(span, self.spans)]
        mask = self.mask
        if mask is not None:
            mask = mask[of_batch if mask.shape[0] > 1 else slice(None), :, :, :end]
        bias = None
        if self.bias is not None and end > 0 and span:
            # Column j - i + N - 1 of all queries is column j - i' + n - 1 of those from span.start on.
            first = self.num_queries - span.stop
            values = self.bias if self.bias.shape[0] == 1 else self.bias[own]
            bias = RelativeBias(values[:, first : first + len(span) + end - 1])
        return topk_attention(
            query,
            key,
            value,
            k=call.k_of(heads),
            attn_mask=mask,
            bias=bias,
            is_causal=call.is_causal,
            dropout_p=call.dropout_p,
            dropout_seed=seed if call.dropout_p > 0 else None,
            scale=call.scale,
            enable_gqa=query.shape[1] != key.shape[1],
            sinks=None if call.sinks is None else call.sinks[heads.start : heads.stop],
            softcap=call.softcap,
            completion=call.completion_of(heads),
            backend=self.backend,
        )


@dataclass(frozen=True)
class _Rows:
    """The numbers of a part's queries in the call of one process, by which dropout draws.

    Query i of head h of sequence b has number (b * H + h) * N + i, and the draw is a hash of the number XOR the seed.
    A call of n queries counts from 0. Where the first number is a multiple of a power of two that is at least n, adding
    it is the same as XOR, so the call draws with the seed XOR the first number. All other parts are cut into such.
    """

    batch_size: int
    num_heads: int
    num_queries: int
    batch: range
    heads: range
    span: range

    @property
    def first(self) -> int:
        return (self.batch.start * self.num_heads + self.heads.start) * self.num_queries + self.span.start

    def first_is_base(self) -> bool:
        whole = len(self.span) == self.num_queries
        are_in_a_row = (len(self.batch) == 1 or len(self.heads) == self.num_heads) and (
            whole or len(self.batch) == len(self.heads) == 1
        )
        count = len(self.batch) * len(self.heads) * len(self.span)
        return count == 0 or (are_in_a_row and self.first % _power_of_two(count) == 0)

    def pieces(self) -> list[range]:
        """The queries of one head in pieces of which each is as `first_is_base` asks."""
        found, start = [], self.span.start
        while start < self.span.stop:
            number = self.first - self.span.start + start
            size = 1 << ((self.span.stop - start).bit_length() - 1)
            if number:
                size = min(size, number & -number)
            found.append(range(start, start + size))
            start += size
        return found


def _power_of_two(count: int) -> int:
    """The smallest power of two that is at least this."""
    return 1 << (count - 1).bit_length()


def _place(span: range, spans: Sequence[range]) -> slice:
    """Where the tokens at these positions lie among those of `spans`."""
    first = 0
    for held in spans:
        if not span or (held.start <= span.start and span.stop <= held.stop):
            return slice(first + span.start - held.start, first + span.start - held.start + len(span))
        first += len(held)
    raise AssertionError((span, spans))


def _join(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _check_own(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    bias: Bias | None,
    dropout_p: float,
    dropout_seed: int | Tensor | None,
    enable_gqa: bool,
    sinks: Tensor | None,
    completion: Completion | None,
) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_floating(name, tensor)
        if tensor.ndim != 4:
            raise ValueError(f"{name} must have shape [batch, heads, tokens, size], got {shape_of(tensor)}")
    check_attention_shapes(query, key, value, enable_gqa)
    check_dropout(dropout_p)
    if dropout_seed is not None:
        check_seed(dropout_seed)
    if attn_mask is not None:
        _check_mask(attn_mask, key)
    num_heads = query.shape[1]
    if bias is not None:
        if not isinstance(bias, Bias):
            raise TypeError(
                "bias must be RelativeBias, BucketedBias, ALiBi or None where several processes share a sequence, got "
                f"{type(bias).__name__}; a tensor for every query and key would be quadratic in length"
            )
        if _bias_heads(bias) not in (1, num_heads):
            raise ValueError(f"bias must be for 1 head or {num_heads} heads to match query, got {_bias_heads(bias)}")
    if sinks is not None:
        check_floating("sinks", sinks)
        if list(sinks.shape) != [num_heads]:
            raise ValueError(f"sinks must have shape [{num_heads}], one number for each head, got {shape_of(sinks)}")
    if completion is not None:
        check_completion("completion", completion, num_heads)


def _check_mask(attn_mask: Tensor, key: Tensor) -> None:
    if not isinstance(attn_mask, Tensor):
        raise TypeError(f"attn_mask must be a tensor or None, got {type(attn_mask).__name__}")
    if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise TypeError(
            f"attn_mask must be bool (True = may attend) or float (added to the scores), got {attn_mask.dtype}; "
            "convert a 0/1 mask with .bool()"
        )
    if attn_mask.requires_grad:
        raise ValueError("attn_mask gets no gradient but requires one; detach it")
    batch, length = key.shape[0], key.shape[2]
    if attn_mask.ndim != 4 or attn_mask.shape[0] not in (1, batch) or list(attn_mask.shape[1:]) != [1, 1, length]:
        raise ValueError(
            f"attn_mask must have shape [{batch}, 1, 1, {length}], one number for each key of this rank (padding; "
            f"causality is is_causal=True), got {shape_of(attn_mask)}"
        )


def _check_method(method: str, query: Tensor, ranks: Ranks) -> None:
    if method not in ("auto", "heads", "keys"):
        raise ValueError(f'method must be "auto", "heads" or "keys", got {method!r}')
    if method == "heads" and query.shape[1] % ranks.size:
        raise ValueError(
            f'method="heads" needs a number of heads that the {ranks.size} ranks divide, got {query.shape[1]} heads; '
            'use method="keys" or "auto"'
        )


def _checked_k(k: AnyK, num_heads: int) -> int | tuple[int, ...] | None:
    kept = as_k("k", k)
    if isinstance(kept, tuple) and len(kept) != num_heads:
        raise ValueError(f"k must hold one number for each of the {num_heads} query heads, got {len(kept)}")
    return kept


def _bias_heads(bias: Bias) -> int:
    if isinstance(bias, BucketedBias):
        return bias.table.shape[1]
    return (bias.slopes if isinstance(bias, ALiBi) else bias.values).shape[0]


def _words(query: Tensor, key: Tensor, value: Tensor, are_right: bool) -> dict[str, str]:
    """What must be the same on all ranks of the tensors that lie in shards: all but their lengths."""
    if not are_right:
        return dict.fromkeys(("query", "key", "value", "requires_grad of query, key and value"), "")
    tensors = {"query": query, "key": key, "value": value}
    words = {name: f"{x.dtype} [{x.shape[0]}, {x.shape[1]}, tokens, {x.shape[3]}]" for name, x in tensors.items()}
    wants = [name for name, x in tensors.items() if x.requires_grad] if torch.is_grad_enabled() else []
    return words | {"requires_grad of query, key and value": f"{wants}"}


def _bias_words(bias: Bias | None) -> str:
    match bias:
        case BucketedBias():
            return f"BucketedBias {shape_of(bias.table)} {bias.bidirectional} {bias.max_distance}"
        case RelativeBias():
            return f"RelativeBias {shape_of(bias.values)}"
        case ALiBi():
            return f"ALiBi {shape_of(bias.slopes)}"
    return type(bias).__name__


def _shape_words(tensor: Tensor | None) -> str:
    return shape_of(tensor) if isinstance(tensor, Tensor) else str(tensor)


_MASK_DTYPES = (torch.bool, torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _mask_numbers(attn_mask: Tensor | None) -> tuple[int, int]:
    """The dtype of a mask, from 1, and its number of sequences; zeros without one."""
    if not isinstance(attn_mask, Tensor) or attn_mask.dtype not in _MASK_DTYPES or attn_mask.ndim == 0:
        return 0, 0
    return 1 + _MASK_DTYPES.index(attn_mask.dtype), attn_mask.shape[0]


def _mask_where_others_have_one(
    attn_mask: Tensor | None, call: _Call, of_ranks: Sequence[tuple[int, ...]]
) -> Tensor | None:
    kinds = sorted({kind for kind in of_ranks if kind[0]})
    if len(kinds) > 1:
        words = [f"{_MASK_DTYPES[dtype - 1]} of {size} sequences" for dtype, size in kinds]
        raise ValueError(f"attn_mask must have one dtype and number of sequences on all ranks, got {', '.join(words)}")
    if not kinds or attn_mask is not None:
        return attn_mask
    ((dtype, size),) = kinds
    shape, kind = (size, 1, 1, call.key.shape[2]), _MASK_DTYPES[dtype - 1]
    fill: Callable[..., Tensor] = torch.ones if kind == torch.bool else torch.zeros
    return fill(shape, dtype=kind, device=call.key.device)
