"""What the benchmark computes: sizes, how much faster and smaller than the dense layer, and the paper's figure."""

from __future__ import annotations

from dataclasses import dataclass, replace

from topk_attention.backends.activations import ACTIVATIONS
from topk_attention.functional.checks import check_count

from ...runs.checks import check_at_least
from ...show.quoted import FEED_FORWARD_LAYER
from ..kernel_benchmark.subject import Goal


@dataclass(frozen=True)
class Work:
    """A feed-forward layer without biases in float32: x [tokens, d_model], weights [d_ff, d_model] and back."""

    d_model: int
    d_ff: int
    k: int
    tokens: int
    is_gated: bool = False
    activation: str = "relu"

    def __post_init__(self) -> None:
        check_count("k", self.k)
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")
        check_at_least(1, self, "d_model", "d_ff", "tokens")

    @property
    def gradients_mib(self) -> float:
        """The gradients of the weights."""
        return 4 * (3 if self.is_gated else 2) * self.d_model * self.d_ff / 2**20

    def __str__(self) -> str:
        tokens = f"{self.tokens:,} token{'s' if self.tokens > 1 else ''}"
        kind = f"gated {self.activation}" if self.is_gated else self.activation
        return f"d_model = {self.d_model:,}, d_ff = {self.d_ff:,}, k = {self.k}, {tokens}, {kind}"


_T5_BASE = Work(d_model=768, d_ff=3072, k=256, tokens=8192)
_SMOLLM2 = Work(d_model=576, d_ff=1536, k=384, tokens=4096, is_gated=True, activation="silu")
_LARGE = {
    "t5-11b": Work(d_model=1024, d_ff=65536, k=256, tokens=1024),
    "t5-base": _T5_BASE,
    "smollm2": _SMOLLM2,
}
_SMALL = {
    f"{name}-{tokens}": replace(work, tokens=tokens)
    for name, work in (("t5-base", _T5_BASE), ("smollm2", _SMOLLM2))
    for tokens in (1, 2, 4, 8)
}
TABLE = _LARGE | _SMALL
GOALS = {
    TABLE["t5-11b"]: Goal(1.5, 4.0, 1 / 20),
    TABLE["t5-base"]: Goal(1.0, 1.8, 1 / 4),
    TABLE["smollm2"]: Goal(1.0, 1.3, 1 / 2),
    **{work: Goal(1.0, None) for work in _SMALL.values()},
}

# The paper's figure has 262,144 tokens, for which the dense layer's activations would be 64 GiB each at the right end.
# With 4,096 a step of the dense layer takes about 20 s there on two cores.
SWEEP = Work(d_model=768, d_ff=2048, k=512, tokens=4096)
D_FFS = (2048, 6144, 16384, 32768, 65536)
PAPER = {
    "top-k": FEED_FORWARD_LAYER["topk"],
    "vanilla": FEED_FORWARD_LAYER["vanilla"],
    "query chunks": FEED_FORWARD_LAYER["query-chunks"],
}
