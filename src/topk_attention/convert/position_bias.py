"""Biases of relative positions that one layer computes for all others (T5, UnifiedQA, flan-T5, mT5, ...).

The first layer of a stack computes the bias, [1, H, N, M] numbers, and passes it to the other layers. Cross-attention
computes as many zeros. A converted layer passes on the small table that the bias is made from. Attention then reads
from the table what it needs.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import BucketedBias, RelativeBias
from .settings import NAME

_HOOK = "_topk_attention_hook"
# A layer's argument for the cache, whose name transformers changed in 5.24; BLOOM, Falcon, GPT-J and GPT-Neo have their
# own.
CACHE_NAMES = ("past_key_values", "cache", "layer_past")

Bias = BucketedBias | RelativeBias


@dataclass(frozen=True, eq=False)
class TableBias:
    """A bias of relative positions. The keys begin at position 0, the queries at `first_position`."""

    table: BucketedBias
    first_position: int | Tensor

    def at(self, num_queries: int, num_keys: int) -> Bias:
        """The bias for a call of attention."""
        first = self.first_position
        if isinstance(first, int) and first + num_queries == num_keys:
            return self.table
        # A chunk of the queries, or a static cache that has room for future keys.
        length = num_keys if isinstance(first, Tensor) else max(num_keys, first + num_queries)
        every_distance = self.table.relative_values(length, length)  # column: key - query + length - 1
        columns = torch.arange(num_queries + num_keys - 1, device=every_distance.device)
        return RelativeBias(every_distance.index_select(1, columns + (length - num_queries) - first))

    def from_query(self, index: int) -> TableBias:
        """The bias for the queries from this index on."""
        return TableBias(self.table, self.first_position + index)


@dataclass(frozen=True)
class NoBias:
    """Stands for a bias of zeros. With None a layer would compute the zeros."""


def computes_bias(module: nn.Module) -> bool:
    """Whether this layer computes a bias if it is given none, in a way that this file knows.

    Without the argument that holds the cache, the position of the first query would be unknown.
    """
    if not hasattr(module, "has_relative_attention_bias") or not hasattr(module, "relative_attention_max_distance"):
        return False
    arguments = inspect.signature(type(module).forward).parameters
    return "position_bias" in arguments and any(name in arguments for name in CACHE_NAMES)


def builds_bias_in_full(module: nn.Module) -> bool:
    """Whether this layer (umT5's) always computes its own bias and takes none as an argument."""
    return hasattr(module, "has_relative_attention_bias") and not computes_bias(module)


def keeps_bias_small(module: nn.Module) -> bool:
    """Whether `keep_bias_small` is in force for this layer."""
    return hasattr(module, _HOOK)


def keep_bias_small(module: nn.Module) -> None:
    """Let a T5 layer pass its table on while it runs top-k attention."""
    if computes_bias(module) and not keeps_bias_small(module):
        setattr(module, _HOOK, module.register_forward_pre_hook(_pass_table, with_kwargs=True))


def give_bias_back(module: nn.Module) -> None:
    """Undo `keep_bias_small`: the layer computes its bias in full again."""
    if keeps_bias_small(module):
        getattr(module, _HOOK).remove()
        delattr(module, _HOOK)


def _pass_table(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    if module.config._attn_implementation != NAME or kwargs.get("position_bias") is not None:
        return None
    cache = next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)
    hidden_states = args[0] if args else kwargs["hidden_states"]
    return args, kwargs | {"position_bias": _bias_of(module, cache, hidden_states.device)}


def _bias_of(module: Any, cache: Any, device: torch.device) -> TableBias | NoBias:
    if not module.has_relative_attention_bias:
        return NoBias()
    # Called rather than read: hooks, adapters and offloaded weights act, and FSDP may free the weight before the last
    # layer needs the table.
    buckets = torch.arange(module.relative_attention_num_buckets, device=device)
    table = BucketedBias(
        module.relative_attention_bias(buckets),
        bidirectional=not module.is_decoder,
        max_distance=module.relative_attention_max_distance,
    )
    first_position = 0 if cache is None else cache.get_seq_length(module.layer_idx)
    # A static cache increases this same tensor before attention reads it, so keep a copy.
    return TableBias(table, first_position.clone() if isinstance(first_position, Tensor) else first_position)
