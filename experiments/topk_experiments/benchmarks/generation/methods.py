"""Who generates: a model in transformers with some cache, in full or converted, or llama.cpp on the same file."""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

from ...models.generation import why_no_cache


class Method(NamedTuple):
    """
    description  its name in tables and pictures
    dtype        of the model's weights; "packed": as they lie in the GGUF file
    cache        one of `models.generation.CACHES`, or the type in which llama.cpp keeps keys and values
    keeps_k      converted to top-k attention
    completed    the keys that are not kept enter each softmax as one entry
    is_exact     computes full attention in float32, so that its tokens must be those of "sdpa"
    compiled     tokens that are read one by one go through torch.compile
    one_dnn      products of such tokens by oneDNN, as PyTorch has them computed unless it is told otherwise; without it
                 PyTorch has a loop of its own for a single row in bfloat16
    """

    description: str
    dtype: str = "float32"
    cache: str = "dynamic"
    keeps_k: bool = False
    completed: bool = False
    is_exact: bool = False
    compiled: bool = False
    one_dnn: bool = True

    @property
    def is_llama(self) -> bool:
        return self.dtype == "packed"


# In the order of the tables. The first gives the tokens that the others are compared with.
METHODS = {
    "sdpa": Method("SDPA", is_exact=True),
    "sdpa-bfloat16": Method("SDPA, bfloat16", "bfloat16"),
    "sdpa-bfloat16-plain": Method("SDPA, bfloat16 without oneDNN", "bfloat16", one_dnn=False),
    "sdpa-compiled": Method("SDPA, compiled", is_exact=True, compiled=True),
    "sdpa-bfloat16-compiled": Method(
        "SDPA, bfloat16 without oneDNN, compiled", "bfloat16", compiled=True, one_dnn=False
    ),
    "static": Method("SDPA, static cache", cache="static", is_exact=True),
    "static-compiled": Method("SDPA, static cache, compiled", cache="static", is_exact=True, compiled=True),
    "static-bfloat16": Method("SDPA, static cache, bfloat16", "bfloat16", "static"),
    "static-bfloat16-plain": Method("SDPA, static cache, bfloat16 without oneDNN", "bfloat16", "static", one_dnn=False),
    "sdpa-topk-cache": Method("SDPA, TopKCache", cache="topk", is_exact=True),
    "quanto": Method("SDPA, 4-bit cache (quanto)", cache="quanto"),
    "hqq": Method("SDPA, 4-bit cache (HQQ)", cache="hqq"),
    "fp8": Method("SDPA, 8-bit cache (fp8)", cache="fp8"),
    "llama-f16": Method("llama.cpp, f16 cache", "packed", "f16"),
    "llama-q8_0": Method("llama.cpp, q8_0 cache", "packed", "q8_0"),
    "topk-dynamic": Method("top-k, DynamicCache", keeps_k=True),
    "topk-dynamic-bfloat16": Method("top-k, DynamicCache, bfloat16", "bfloat16", keeps_k=True),
    "topk": Method("top-k", cache="topk", keeps_k=True),
    "topk-bfloat16": Method("top-k, bfloat16", "bfloat16", "topk", keeps_k=True),
    "topk-compiled": Method("top-k, compiled", cache="topk", keeps_k=True, compiled=True),
    "topk-bfloat16-plain": Method("top-k, bfloat16 without oneDNN", "bfloat16", "topk", keeps_k=True, one_dnn=False),
    "topk-bfloat16-compiled": Method(
        "top-k, bfloat16 without oneDNN, compiled", "bfloat16", "topk", keeps_k=True, compiled=True, one_dnn=False
    ),
    "topk-completed": Method("top-k, completed", cache="topk", keeps_k=True, completed=True),
}
REFERENCE = "sdpa"
LLAMA_PACKAGE = "llama-cpp-python==0.3.36"


def why_not(name: str, gguf_file: str | None) -> str | None:
    """Why a method cannot take its turn here; None where it can.

    gguf_file  of the model; None where its weights are not packed
    """
    method = METHODS[name]
    if not method.is_llama:
        return why_no_cache(method.cache)
    if gguf_file is None:
        return "llama.cpp reads GGUF files, and this model is none"
    if importlib.util.find_spec("llama_cpp") is None:
        return f"the package {LLAMA_PACKAGE} is not installed; pip install --no-deps -r requirements-generation.txt"
    return None
