"""Sums over the keys and values in a cache, for completion: while a model generates, each new token adds its own.

Without them each step would sum all cached keys anew. The sums hang on the very key tensor that they are of, and say of
which value tensor they are. Another tensor has none, so that whatever is done to a cache, no sums are ever those of
other keys; then attention computes them anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.autocast import in_autocast_dtype
from ..backends.calls import accumulation_dtype
from ..functional import Completion, KeySums
from ..functional.checks import version_of
from .position_bias import CACHE_NAMES

_SUMS = "_topk_attention_sums"
_HOOK = "_topk_attention_sums_hook"


@dataclass(eq=False)
class _Known:
    """What is known of the sums over a key tensor [B, G, M, D] and this value tensor [B, G, M, E].

    versions  of both tensors, so that a change in place is noticed
    sums      over the first num_keys keys; None where nobody has asked for them. They are kept in float64: one addition
              a token would add up a rounding error a token.
    shown     [B, num_keys] bool, the keys that the sums are over; None for all
    """

    value: Tensor
    versions: tuple[int | None, int | None]
    sums: KeySums | None
    num_keys: int
    shown: Tensor | None = None

    def over_all(self, key: Tensor, completion: Completion, shown: Tensor | None) -> KeySums:
        """The sums over all keys that are shown; of those that were there before only the sums are read."""
        if self.sums is None or not self._are_over(shown):
            self.sums = _each(_sums(completion, key, self.value, shown), Tensor.double)
        elif self.num_keys < key.shape[2]:
            new = slice(self.num_keys, None)
            new_key, new_value = key[:, :, new], self.value[:, :, new]
            if shown is not None or new_key.shape[2] > 1:
                new_shown = None if shown is None else shown[:, new]
                self.sums = self.sums.plus(_sums(completion, new_key, new_value, new_shown))
            else:
                self.sums = _plus_one(self.sums, new_key, new_value)
        self.num_keys, self.shown = key.shape[2], shown
        dtype = accumulation_dtype(key.dtype)
        return _each(self.sums, lambda total: total.to(dtype))

    def _are_over(self, shown: Tensor | None) -> bool:
        """Whether the sums are over those of their keys that are shown now."""
        if self.shown is None or shown is None:
            return self.shown is shown
        return torch.equal(self.shown, shown[:, : self.num_keys])


def sums_of_cached(key: Tensor, value: Tensor, completion: Completion, shown: Tensor | None = None) -> KeySums | None:
    """The sums over keys and values that come from a cache which keeps them; None for others.

    shown  [B|1, M] bool, the keys to sum; all by default
    """
    known = None if torch.compiler.is_compiling() else known_sums(key, value)
    if known is None:
        return None
    return known.over_all(key, completion, None if shown is None else shown.expand(key.shape[0], -1))


def _plus_one(sums: KeySums, key: Tensor, value: Tensor) -> KeySums:
    """The sums and one more key. This runs for each token and layer; `KeySums.plus` takes twice the time."""
    key, value = (in_autocast_dtype(x.detach()).double() for x in (key, value))
    products = torch.addcmul(sums.products, key.mT, value)
    return KeySums(sums.keys + key[:, :, 0], sums.values + value[:, :, 0], products)


def _sums(completion: Completion, key: Tensor, value: Tensor, shown: Tensor | None) -> KeySums:
    if shown is not None:  # a hidden row may hold NaN, so it is not multiplied by 0
        key, value = (torch.where(shown[:, None, :, None], x, 0) for x in (key, value))
    return completion.sums(key, value)


def keep_sums(module: nn.Module) -> None:
    """Let the caches that this attention layer is called with keep sums."""
    if not hasattr(module, _HOOK):
        setattr(module, _HOOK, module.register_forward_pre_hook(_prepare_cache, with_kwargs=True))


def keep_no_sums(module: nn.Module) -> None:
    """Undo `keep_sums`."""
    if hasattr(module, _HOOK):
        getattr(module, _HOOK).remove()
        delattr(module, _HOOK)


def _prepare_cache(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Make the layer's plain growing cache layers such that keep sums. Sliding-window, static, quantized and all other
    cache layers stay as they are."""
    # Zamba2's layers share one module of attention, which is told at each call for which of them it is.
    index = kwargs.get("layer_idx", getattr(module, "layer_idx", None))
    held = next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)
    if torch.compiler.is_compiling() or held is None or index is None:
        return
    keeping = sum_keeping_layer()
    for part in (getattr(held, "self_attention_cache", held), getattr(held, "cross_attention_cache", None)):
        layers = getattr(part, "layers", ())
        if 0 <= index < len(layers) and type(layers[index]) is keeping.__base__:
            layers[index].__class__ = keeping


@cache
def sum_keeping_layer() -> Any:
    """The class of cache layers that keep sums."""
    from transformers.cache_utils import DynamicLayer

    class SumKeepingLayer(DynamicLayer):
        """A DynamicLayer that passes the sums on from one key tensor to the next."""

        _layer_type = None  # with a name, transformers would take this class for all models
        __qualname__ = "SumKeepingLayer"

        def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            if torch.compiler.is_compiling():
                return super().update(*args, **kwargs)
            before = known_sums(self.keys, self.values)
            super().update(*args, **kwargs)
            pass_sums_on(self.keys, self.values, before)
            return self.keys, self.values

        def reorder_cache(self, beam_idx: Tensor) -> None:
            before = known_sums(self.keys, self.values)
            super().reorder_cache(beam_idx)
            pass_sums_on(self.keys, self.values, before, lambda x: x.index_select(0, beam_idx.to(x.device)))

        def batch_repeat_interleave(self, repeats: int) -> None:
            before = known_sums(self.keys, self.values)
            super().batch_repeat_interleave(repeats)
            pass_sums_on(self.keys, self.values, before, lambda x: x.repeat_interleave(repeats, dim=0))

        def batch_select_indices(self, indices: Tensor) -> None:
            before = known_sums(self.keys, self.values)
            super().batch_select_indices(indices)
            pass_sums_on(self.keys, self.values, before, lambda x: x[indices, ...])

    return SumKeepingLayer


def __getattr__(name: str) -> Any:
    # So that a cache can be pickled, although its class is made only when transformers is there.
    if name == "SumKeepingLayer":
        return sum_keeping_layer()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def known_sums(key: Tensor | None, value: Tensor | None) -> _Known | None:
    """What is known of the sums over these, None if they are not from a cache that keeps sums."""
    known = getattr(key, _SUMS, None)
    if known is None or key is None or value is None or known.value is not value:
        return None
    return known if known.versions == (version_of(key), version_of(value)) else None


def pass_sums_on(
    key: Tensor | None,
    value: Tensor | None,
    before: _Known | None,
    change: Callable[[Tensor], Tensor] = lambda total: total,
) -> None:
    """Note what is known: the sums over the keys with which these begin, their batch rows changed as the keys' were."""
    if key is None or value is None or key.shape[:-1] != value.shape[:-1]:
        return
    known = _Known(value, (version_of(key), version_of(value)), None, 0)
    if before is not None and before.sums is not None:
        known.sums, known.num_keys = _each(before.sums, change), before.num_keys
        known.shown = None if before.shown is None else change(before.shown)
    setattr(key, _SUMS, known)


def _each(sums: KeySums, change: Callable[[Tensor], Tensor]) -> KeySums:
    return KeySums(*map(change, sums))
