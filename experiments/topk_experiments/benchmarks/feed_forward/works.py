"""What is computed: sizes of feed-forward layers, how much better than dense each should be, and which points.

The rounds are planned by their table.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, replace
from typing import Annotated

from topk_attention.backends.activations import ACTIVATIONS
from topk_attention.functional.checks import check_count

from ...rivals.names import check_method, kept
from ...runs.checks import check_at_least, check_one_of
from ...runs.records import Json
from .. import rounds
from ..round_tables import Goal

# name in the records of layers -> what it is; every other method is top-k on a backend
LAYER_METHODS = {
    "vanilla": "vanilla (linear, ReLU, linear)",
    "vanilla-chunks": "vanilla, a sixteenth of the tokens at a time",
    "token-chunks": "every neuron, in this library's token chunks",
    "topk-torch-sparse": "top-k, torch.sparse",
}
# The paper's own two forms, written out; for layers without a gate.
PAPERS = ("dense-chunks", "vanilla-chunks", "topk-torch-sparse")


@dataclass(frozen=True, kw_only=True)
class Work:
    """A feed-forward layer without biases in float32: x [tokens, d_model], weights [d_ff, d_model] and back.

    is_fused  gate and up are the halves of one weight [2 d_ff, d_model], as in Phi-3
    """

    d_model: Annotated[int, "Size of a token."] = 768
    d_ff: int
    k: int = 512
    tokens: Annotated[int, "Tokens; the paper's are 262144."] = 4096
    is_gated: bool = False
    activation: str = "relu"
    is_fused: bool = False

    def __post_init__(self) -> None:
        check_count("k", self.k)
        check_one_of(list(ACTIVATIONS), self, "activation")
        check_at_least(1, self, "d_model", "d_ff", "tokens")
        if self.is_fused and not self.is_gated:
            raise ValueError("is_fused needs is_gated, got False: one weight holds gate and up; pass both or neither")

    def as_record(self) -> Json:
        """The fields that distinguish a work."""
        fields = asdict(self)
        return fields if self.is_fused else {name: fields[name] for name in fields if name != "is_fused"}

    @property
    def gradients_mib(self) -> float:
        """The gradients of the weights."""
        return 4 * (3 if self.is_gated else 2) * self.d_model * self.d_ff / 2**20

    def __str__(self) -> str:
        tokens = f"{self.tokens:,} token{'s' if self.tokens > 1 else ''}"
        kind = f"gated {self.activation}" if self.is_gated else self.activation
        kind += " of one matrix" if self.is_fused else ""
        return f"d_model = {self.d_model:,}, d_ff = {self.d_ff:,}, k = {self.k}, {tokens}, {kind}"


@dataclass(frozen=True, kw_only=True)
class Point(Work, rounds.Setting):
    """One method at one work, measured in a process of its own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_setting()
        check_method(self.method, LAYER_METHODS)

    def as_record(self) -> Json:
        """The fields that distinguish this point from others, without settings that its method does not look at."""
        sizes = {name: getattr(self, name) for name in ("method", "d_ff", "tokens", "d_model")}
        return sizes | self.setting_record() | {"k": kept(self.method, self.k)}

    def __str__(self) -> str:
        return f"{self.method}, {super().__str__()}"


_T5_BASE = Work(d_model=768, d_ff=3072, k=256, tokens=8192)
_SMOLLM2 = Work(d_model=576, d_ff=1536, k=384, tokens=4096, is_gated=True, activation="silu")
_PHI3 = Work(d_model=3072, d_ff=8192, k=1024, tokens=1024, is_gated=True, activation="silu", is_fused=True)
_ROWS = {
    "t5-11b": (Work(d_model=1024, d_ff=65536, k=256, tokens=1024), Goal(1.5, 4.0, 1 / 20)),
    "t5-base": (_T5_BASE, Goal(1.0, 1.8, 1 / 4)),
    "smollm2": (_SMOLLM2, Goal(1.0, 1.3, 1 / 2)),
    "phi3-mini": (_PHI3, Goal(1.0, 1.3, 1 / 2)),
} | {
    f"{name}-{tokens}": (replace(work, tokens=tokens), Goal(1.0, None))
    for name, work in (("t5-base", _T5_BASE), ("smollm2", _SMOLLM2))
    for tokens in (1, 2, 4, 8)
}
TABLE = {name: work for name, (work, _) in _ROWS.items()}
GOALS = dict(_ROWS.values())

# The paper's figure has 262,144 tokens, for which the dense layer's activations would be 64 GiB each at the right end.
# With 4,096 a step of the dense layer takes about 20 s there on two cores.
D_FFS = [Work(d_ff=d_ff) for d_ff in (2048, 6144, 16384, 32768, 65536)]

# By default a benchmark of layers has these methods; "topk" is the best backend.
DEFAULT = ("topk", "topk-chunked", *LAYER_METHODS)
grid = functools.partial(rounds.grid, Point, "d_ff")
