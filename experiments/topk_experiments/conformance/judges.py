"""What converted models are judged by: dense attention and dense networks that drop all but the k best, with nothing of
what the library computes in them.

Attention that asks transformers' interface gets `DenseAttention` in its place. In attention that computes in its own
code, every softmax over keys within the layer is one over the k best scores.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from topk_attention.convert import torch_layers
from topk_attention.convert.adapters import adapter
from topk_attention.convert.masks import CompactMask
from topk_attention.convert.position_bias import TableBias

from .exercises import Results

NAME = "dense_topk"
# A gradient that is zero apart from rounding has no scale of its own.
_LEAST_SHARE = 1e-3
_LIFT = 0.35
# What families call the last weight of their experts.
_LAST_WEIGHT = re.compile(r"down|w2|output")

Difference = float | str  # a share, or what is wrong in words


class DenseAttention:
    """Attention over a matrix of all scores.

    k          keys kept; None: all
    completed  whether the other keys enter the softmax as one entry
    modules    layers that keep k keys; None: all layers. The others keep all
    called     ids of the layers that asked for attention
    """

    def __init__(self) -> None:
        self.k: int | None = None
        self.completed = False
        self.modules: set[int] | None = None
        self.called: set[int] = set()

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        position_bias: Tensor | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        sinks: Tensor | None = None,
        indices: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Of query [B, H, N, D], key [B, G, M, D] and value [B, G, M, E], as transformers passes them."""
        self.called.add(id(module))
        batch = max(query.shape[0], key.shape[0])
        group = query.shape[1] // key.shape[1]
        query, key, value = (one.expand(batch, -1, -1, -1) for one in (query, key, value))
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        products = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        scores = products if softcap is None else torch.tanh(products / softcap) * softcap
        if position_bias is not None:
            scores = scores + position_bias
        if attention_mask is not None:
            scores = _masked(scores, attention_mask[..., : key.shape[2]])
        if indices is not None:  # keys that the model's own selector has chosen, [B, N, K]; -1: none
            places = torch.where(indices < 0, key.shape[2], indices).long()
            chosen = torch.zeros(*indices.shape[:2], key.shape[2] + 1, dtype=torch.bool).scatter(-1, places, True)
            scores = scores.masked_fill(~chosen[:, None, :, :-1], -torch.inf)
        k = self.k if self.modules is None or id(module) in self.modules else None
        if s_aux is not None:
            sinks = s_aux.reshape(1, -1, 1, 1)
        output = _attend(scores, products, value, k, sinks, self.completed)
        return output.to(value.dtype).transpose(1, 2).contiguous(), None


ATTENTION = DenseAttention()


def register() -> None:
    """Make transformers know dense attention, with the whole masks that its own eager attention gets."""
    AttentionInterface.register(NAME, ATTENTION)
    AttentionMaskInterface.register(NAME, eager_mask)


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, -torch.inf)
    hidden = mask <= torch.finfo(mask.dtype).min / 2
    return (scores + mask.masked_fill(hidden, 0)).masked_fill(hidden, -torch.inf)


def kept_keys(scores: Tensor, k: int | None) -> Tensor:
    """Which of [..., M] are among the k best of their row; of tied ones those with the lower index."""
    if k is None or k >= scores.shape[-1]:
        return torch.ones_like(scores, dtype=torch.bool)
    best = scores.detach().sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)


def _attend(
    scores: Tensor, products: Tensor, value: Tensor, k: int | None, sinks: Tensor | None, completed: bool
) -> Tensor:
    """Softmax over the kept scores and, beside them, the sinks [1|B, H, 1|N, 1] and the entry for the rest."""
    visible = scores != -torch.inf
    kept = kept_keys(scores, k) & visible
    columns, values = [scores.masked_fill(~kept, -torch.inf)], value
    if sinks is not None:
        columns.append(sinks.expand(*scores.shape[:-1], 1))
    if completed:
        rest = (visible & ~kept).to(scores.dtype)
        number = rest.sum(-1, keepdim=True)
        share = rest / number.clamp(min=1)
        mean = (share * scores.masked_fill(~visible, 0)).sum(-1, keepdim=True)
        smallest = scores.masked_fill(~kept, torch.inf).amin(-1, keepdim=True)
        smallest = torch.where(kept.any(-1, keepdim=True), smallest, 0)
        entry = number.clamp(min=1).log() + (1 - _LIFT) * mean + _LIFT * smallest
        columns.append(entry.masked_fill(number == 0, -torch.inf))
        first_order = share * (1 + products - (share * products).sum(-1, keepdim=True))
        rest_value = first_order @ values
    joined = torch.cat(columns, -1)
    sees_nothing = (joined == -torch.inf).all(-1, keepdim=True)
    weights = joined.masked_fill(sees_nothing, 0).softmax(-1).masked_fill(sees_nothing, 0)
    output = weights[..., : scores.shape[-1]] @ values
    return output + weights[..., -1:] * rest_value if completed else output


@contextlib.contextmanager
def dense_attention(
    model: Any, k: int | None, *, completed: bool = False, layers: Sequence[str] | None = None
) -> Iterator[None]:
    """A model of transformers with dense attention that keeps the k best keys in these layers; None: in all.

    Raises:
        ValueError: transformers gives the model no other attention.
    """
    ATTENTION.k, ATTENTION.completed = k, completed
    ATTENTION.modules = None if layers is None else {id(model.get_submodule(path)) for path in layers}
    ATTENTION.called = set()
    before = {id(config): (config, config._attn_implementation) for config in _configurations(model)}
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        for config, name in before.values():
            config._attn_implementation = name


def _configurations(model: Any) -> list[Any]:
    found = [model.config, *(module.config for module in model.modules() if hasattr(module, "config"))]
    for config in found:
        parts = (getattr(config, name, None) for name in getattr(type(config), "sub_configs", None) or {})
        found.extend(part for part in parts if part is not None and all(part is not other for other in found))
    return [config for config in found if hasattr(config, "_attn_implementation")]


@contextlib.contextmanager
def best_scores_in(modules: Sequence[nn.Module], k: int | None) -> Iterator[None]:
    """Within a call of these layers, softmax over keys is one over the k best scores.

    PyTorch's scaled_dot_product_attention, as nn.MultiheadAttention calls it, is dense attention there.
    """
    inside = 0

    def enter(*_: Any) -> None:
        nonlocal inside
        inside += 1

    def leave(*_: Any) -> None:
        nonlocal inside
        inside -= 1

    def softmax_of_best(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def softmax(scores: Tensor, dim: int | None = None, *rest: Any, **options: Any) -> Tensor:
            dim = options.pop("dim", dim)
            if inside and scores.ndim >= 3 and dim in (-1, scores.ndim - 1):
                scores = scores.masked_fill(~kept_keys(scores, k), -torch.inf)
            return original(scores, dim, *rest, **options)

        return softmax

    original = F.scaled_dot_product_attention

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if not inside:
            return original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        group = query.shape[1] // key.shape[1] if enable_gqa else 1
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        if attn_mask is not None:
            scores = _masked(scores, attn_mask)
        return _attend(scores, scores, value, k, None, False)

    # With layers deactivated that compute a whole encoder layer in one call, all goes through the functions below.
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    hooks = [module.register_forward_pre_hook(enter) for module in modules]
    hooks += [module.register_forward_hook(leave, always_call=True) for module in modules]
    patches = [
        mock.patch.object(F, "scaled_dot_product_attention", attention),
        *(mock.patch.object(owner, "softmax", softmax_of_best(owner.softmax)) for owner in (F, torch, Tensor)),
    ]
    try:
        with contextlib.ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patch)
            yield
    finally:
        for hook in hooks:
            hook.remove()
        torch.backends.mha.set_fastpath_enabled(fast_path)


@contextlib.contextmanager
def dense_in_converted(k: int, *, completed: bool) -> Iterator[set[int]]:
    """Converted layers that had computed attention in their own code hand queries, keys, values, masks and biases to
    dense attention: those that have an adapter, and PyTorch's own.

    That they hand on the right ones shows with all keys and with few, where their own code is the judge.

    Yields the ids of the layers, or of their values, that reached it.
    """
    reached: set[int] = set()

    def of_adapter(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: CompactMask | Tensor | None,
        *,
        scaling: float,
        position_bias: Tensor | TableBias | None = None,
        is_causal: bool | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        if mask is None and is_causal is not False:
            raise ValueError(f"{type(module).__name__} hands on no mask, and what that means is not known here")
        reached.add(id(module))
        if isinstance(mask, CompactMask):
            mask = mask.dense()
        if isinstance(position_bias, TableBias):
            position_bias = _written_out(position_bias, query.shape[2], key.shape[2])
        attention = DenseAttention()
        attention.k, attention.completed = k, completed
        return attention(module, query, key, value, mask, scaling, position_bias)

    def of_torch(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        attn_mask: Tensor | None,
        bias: Tensor | None,
        is_causal: bool,
        **_: Any,
    ) -> Tensor:
        reached.add(id(value))
        products = query @ key.mT * query.shape[-1] ** -0.5
        scores = products if bias is None else products + bias
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        if attn_mask is not None:
            scores = _masked(scores, attn_mask)
        return _attend(scores, products, value, k, None, completed)

    with (
        mock.patch.object(adapter, "topk_attention_forward", of_adapter),
        mock.patch.object(torch_layers, "topk_attention", of_torch),
    ):
        yield reached


def _written_out(bias: TableBias, num_queries: int, num_keys: int) -> Tensor:
    """A bias of relative positions as [1, H, N, M]."""
    by_distance = bias.at(num_queries, num_keys).relative_values(num_queries, num_keys)
    distance = torch.arange(num_keys) - torch.arange(num_queries)[:, None]
    return by_distance[:, distance + num_queries - 1][None]


@contextlib.contextmanager
def dense_networks(networks: Sequence[tuple[Sequence[nn.Module], nn.Module]], k: int) -> Iterator[None]:
    """Networks whose last layer sees only the k best neurons of each token.

    networks  first layers and last layer of each. A network with one first layer ranks neurons by what that layer
              gives, one with a gate by the size of what the last layer is given
    """
    hooks = []
    for first, last in networks:
        given: dict[str, Tensor] = {}

        def remember(_: nn.Module, __: Any, output: Tensor, given: dict[str, Tensor] = given) -> None:
            given["before activation"] = output

        def keep_best(_: nn.Module, inputs: Any, given: dict[str, Tensor] = given) -> Any:
            hidden = inputs[0]
            ranked = given.get("before activation")
            if ranked is None or ranked.shape != hidden.shape:  # a gate, beside or in the same layer
                ranked = hidden.abs()
            return (hidden.masked_fill(~kept_keys(ranked, k), 0), *inputs[1:])

        if len(first) == 1:
            hooks.append(first[0].register_forward_hook(remember))
        hooks.append(last.register_forward_pre_hook(keep_best))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def dense_experts(modules: Sequence[nn.Module], k: int) -> Iterator[set[int]]:
    """Experts whose last product sees only the k best neurons of each token, within the eager code of their families.

    Yields the ids of those modules in which a last product was seen: one with a weight whose name says so.
    """
    reached: set[int] = set()
    inside: list[tuple[nn.Module, set[int]]] = []
    before: Tensor | None = None

    def enter(module: nn.Module, _: Any) -> None:
        last = {one.data_ptr() for name, one in module.named_parameters() if _LAST_WEIGHT.search(name)}
        inside.append((module, last))

    def leave(*_: Any) -> None:
        inside.pop()

    def of_best(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def multiply(x: Tensor, weight: Tensor, *rest: Any, **options: Any) -> Tensor:
            nonlocal before
            if not inside:
                return original(x, weight, *rest, **options)
            module, last = inside[-1]
            if weight.untyped_storage().data_ptr() not in last:
                before = original(x, weight, *rest, **options)
                return before
            ranked = x.abs() if before is None or before.shape != x.shape or _has_gate(module) else before
            reached.add(id(module))
            return original(x.masked_fill(~kept_keys(ranked, k), 0), weight, *rest, **options)

        return multiply

    hooks = [module.register_forward_pre_hook(enter) for module in modules]
    hooks += [module.register_forward_hook(leave, always_call=True) for module in modules]
    products = ((F, "linear"), (torch, "matmul"), (torch, "bmm"), (Tensor, "matmul"), (Tensor, "__matmul__"))
    try:
        with contextlib.ExitStack() as stack:
            for owner, name in products:
                stack.enter_context(mock.patch.object(owner, name, of_best(getattr(owner, name))))
            yield reached
    finally:
        for hook in hooks:
            hook.remove()


def _has_gate(experts: nn.Module) -> bool:
    """By the names of their weights: in DBRX gate and up are two products of one width."""
    return any(re.search(r"gate|v1", name) for name, _ in experts.named_parameters())


def difference(found: Results, expected: Results) -> Difference:
    """The largest difference of two results, as a share of the largest number of its tensor; or what is wrong."""
    if found.keys() != expected.keys():
        return f"other tensors: {', '.join(sorted(found.keys() ^ expected.keys())[:3])}"
    floating = [one for one in expected.values() if one.is_floating_point() and one.numel()]
    least = _LEAST_SHARE * max((float(one.abs().max()) for one in floating), default=0.0)
    worst = 0.0
    for name, right in expected.items():
        one = found[name]
        if one.shape != right.shape:
            return f"{name} has shape {list(one.shape)}, not {list(right.shape)}"
        if not right.is_floating_point():
            if not torch.equal(one, right):
                return f"other {name}"
            continue
        if right.numel() == 0:
            continue
        one, right = (tensor.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0) for tensor in _finite_alike(name, one, right))
        worst = max(worst, float((one - right).abs().max()) / (max(float(right.abs().max()), least) or 1.0))
    return float(f"{worst:.1e}")


def _finite_alike(name: str, found: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """The tensors; where one of them alone is finite, an infinite difference."""
    alike = (found == expected) | (found.isfinite() & expected.isfinite()) | (found.isnan() & expected.isnan())
    if bool(alike.all()):
        return found, expected
    return torch.where(alike, found, torch.finfo(found.dtype).max), expected
