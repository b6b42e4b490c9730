"""The methods that experiments compare with top-k attention, as modules with one interface."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from topk_attention.functional import Completion

from .dense import SdpaAttention, VanillaAttention
from .interface import AttentionMethod
from .names import METHODS
from .performer import PerformerAttention
from .rfa import RandomFeatureAttention
from .topk import LibraryAttention
from .written_out import random_feature_weights

# name -> (class, which of the shared options it takes)
_CLASSES: dict[str, tuple[Callable[..., AttentionMethod], tuple[str, ...]]] = {
    "vanilla": (VanillaAttention, ()),
    "vanilla-chunks": (VanillaAttention, ("query_chunk_size",)),
    "sdpa": (SdpaAttention, ()),
    "query-chunks": (LibraryAttention, ("query_chunk_size",)),
    "topk": (LibraryAttention, ("k", "query_chunk_size")),
    "topk-completed": (LibraryAttention, ("k", "query_chunk_size")),
    "performer": (PerformerAttention, ("head_dim", "num_features", "query_chunk_size")),
    "rfa": (RandomFeatureAttention, ("head_dim", "num_features", "query_chunk_size")),
}
_PAPERS_CHUNK_SIZE = 1024
# Of the code of all methods: a record of a method holds only as long as this code is the same.
FOLDER = Path(__file__).parent


def new_attention(
    name: str,
    *,
    head_dim: int,
    k: int | None = None,
    num_features: int = 256,
    query_chunk_size: int | None = None,
    **options: Any,
) -> AttentionMethod:
    """A method as a module, called as `module(query, key, value, key_mask=..., is_causal=..., dropout_p=...)`.

    name              "vanilla", "vanilla-chunks" (the paper's query chunking), "sdpa", "query-chunks" (this library's),
                      "topk", "topk-completed", "performer" or "rfa"
    head_dim          D, size of queries and keys
    k                 keys kept per query; "topk" and "topk-completed" need it
    num_features      size of the random feature vector of "performer" and "rfa"
    query_chunk_size  rows computed at a time; None: the method's default
    options           of the method's own class alone, such as backend= for "topk", completion= for "topk-completed"
                      (default: the library's) or normalize= for "rfa"

    A method that has no use for k, num_features or query_chunk_size ignores it, so that one call serves all methods.

    Raises:
        ValueError: there is no such method, or a number does not fit.

    >>> import torch
    >>> attention = new_attention("performer", head_dim=16, num_features=64)
    >>> query, key, value = (torch.randn(2, 4, 100, 16) for _ in range(3))
    >>> attention(query, key, value, is_causal=True).shape
    torch.Size([2, 4, 100, 16])
    """
    if name not in METHODS:
        names = ", ".join(f'"{name}"' for name in METHODS)
        raise ValueError(f"name must be one of {names}, got {name!r}")
    new, taken = _CLASSES[name]
    shared = {"head_dim": head_dim, "k": k, "num_features": num_features, "query_chunk_size": query_chunk_size}
    if METHODS[name].keeps_k and k is None:
        raise ValueError(f'k must be a whole number for name="{name}", got None; every key is name="query-chunks"')
    if METHODS[name].is_completed:
        options = {"completion": Completion()} | options
    if name == "query-chunks":
        options = {"backend": "chunked"} | options
    if name == "vanilla-chunks":
        shared["query_chunk_size"] = query_chunk_size or _PAPERS_CHUNK_SIZE
    return new(**{option: shared[option] for option in taken}, **options)


__all__ = [
    "FOLDER",
    "METHODS",
    "AttentionMethod",
    "LibraryAttention",
    "PerformerAttention",
    "RandomFeatureAttention",
    "SdpaAttention",
    "VanillaAttention",
    "new_attention",
    "random_feature_weights",
]
