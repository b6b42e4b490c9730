"""What the benchmark computes: sizes and options, and how much faster than PyTorch's attention each should be."""

from __future__ import annotations

from dataclasses import dataclass, replace

from topk_attention.functional.checks import check_count, check_dropout

from ...runs.checks import check_at_least
from ..kernel_benchmark.subject import Goal

BIASES = ("none", "learned")


@dataclass(frozen=True)
class Work:
    """Self-attention of one sequence in float32: query, key and value [1, H, L, D].

    bias  "learned": one number per head and distance, which gets a gradient
    """

    num_heads: int
    length: int
    k: int
    is_causal: bool = False
    bias: str = "none"
    dropout_p: float = 0.0
    head_dim: int = 64

    def __post_init__(self) -> None:
        check_count("k", self.k)
        check_dropout(self.dropout_p)
        if self.bias not in BIASES:
            raise ValueError(f'bias must be "none" or "learned", got {self.bias!r}')
        check_at_least(1, self, "num_heads", "length", "head_dim")

    @property
    def saved_mib(self) -> float:
        """An int32 index and a float32 weight for each kept key."""
        return 8 * min(self.k, self.length) * self.num_heads * self.length / 2**20

    def __str__(self) -> str:
        parts = [f"H = {self.num_heads}", f"L = {self.length:,}", f"k = {self.k}"]
        if self.head_dim != 64:
            parts.append(f"D = {self.head_dim}")
        if self.is_causal:
            parts.append("causal")
        if self.bias != "none":
            parts.append(f"{self.bias} relative bias")
        if self.dropout_p:
            parts.append(f"dropout {self.dropout_p:g}")
        return ", ".join(parts)


_PLAIN = Work(num_heads=4, length=8192, k=64)
TABLE = {
    "plain": _PLAIN,
    "long": replace(_PLAIN, length=32768),
    "causal": replace(_PLAIN, is_causal=True),
    "short": replace(_PLAIN, num_heads=12, length=2048),
    "large-k": replace(_PLAIN, k=256),
    "learned-bias": replace(_PLAIN, bias="learned"),
    "dropout": replace(_PLAIN, dropout_p=0.1),
}
GOALS = {
    TABLE["plain"]: Goal(2.0, 5.5),
    TABLE["long"]: Goal(2.3, 7.0),
    TABLE["causal"]: Goal(1.8, 5.0),
    TABLE["short"]: Goal(1.0, 3.0),
    TABLE["large-k"]: Goal(1.5, 3.5),
    TABLE["learned-bias"]: Goal(None, 15.0),
    TABLE["dropout"]: Goal(None, 25.0),
}
LENGTHS = [replace(_PLAIN, length=2**exponent) for exponent in range(10, 18)]  # 1,024 to 131,072
KS = [replace(_PLAIN, k=2**exponent) for exponent in range(3, 11)]  # 8 to 1,024
