"""Sizes of one decoding step, and the methods that compute it."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from topk_attention.functional.checks import check_count

from ...runs.checks import check_at_least, check_one_of
from ...runs.records import Json

DTYPES = ("float32", "bfloat16")
# Method -> its name in tables and pictures, in their order.
METHODS = {
    "sdpa": "PyTorch's SDPA, enable_gqa",
    "sdpa-rows": "PyTorch's SDPA, a group's heads as rows",
    "topk": "top-k",
    "topk-index": "top-k, kept index",
    "topk-index-append": "top-k, kept index, one key added",
}
OURS = tuple(name for name in METHODS if name.startswith("topk"))


@dataclass(frozen=True)
class Work:
    """One query for each head; heads share keys and values in groups.

    >>> print(Work(32, 8, 128, 32768))
    32 heads on 8, D = 128, 32,768 keys, k = 64, float32
    """

    num_heads: int
    num_key_heads: int
    head_dim: int
    num_keys: int
    k: int = 64
    dtype: str = "float32"

    def __post_init__(self) -> None:
        check_at_least(1, self, "num_heads", "num_key_heads", "head_dim", "num_keys")
        check_count("k", self.k)
        check_one_of(DTYPES, self, "dtype")
        if self.num_heads % self.num_key_heads:
            raise ValueError(f"num_heads must be a multiple of {self.num_key_heads} key heads, got {self.num_heads}")

    def as_record(self) -> Json:
        return asdict(self)

    @property
    def sizes(self) -> str:
        return f"{self.num_heads} heads on {self.num_key_heads}, D = {self.head_dim}, {self.num_keys:,} keys"

    def __str__(self) -> str:
        return f"{self.sizes}, k = {self.k}, {self.dtype}"


# The shapes of Llama 3 8B and of SmolLM2-135M.
WORKS = {
    "llama": Work(32, 8, 128, 32768),
    "llama-bfloat16": Work(32, 8, 128, 32768, dtype="bfloat16"),
    "smollm2": Work(9, 3, 64, 8192),
    "smollm2-bfloat16": Work(9, 3, 64, 8192, dtype="bfloat16"),
}
