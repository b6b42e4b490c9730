"""What is computed: sizes and options of attention, how much faster than PyTorch's it should be, and which points.

The rounds are planned by their table.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, ClassVar

from topk_attention.backends import choose_backend
from topk_attention.functional.checks import check_count, check_dropout

from ...rivals.names import METHODS, among, check_method, kept, method_of, on_backend, split_backend
from ...runs.checks import check_at_least, check_one_of
from ...runs.records import Json
from .. import rounds
from ..round_tables import Goal

BIASES = ("none", "learned")
DTYPES = ("float32", "bfloat16")
# The fields of a work in the records of rounds, of layers and of chunk sizes.
_FIELDS = ("num_heads", "length", "k", "is_causal", "bias", "dropout_p", "head_dim")
_LAYER_FIELDS = ("length", "k", "num_features", "num_heads", "head_dim", "bias", "dropout_p", "projections")
_CAPTURED_FIELDS = ("num_key_heads", "layer", "model", "revision", "text", "text_sha256")
_CHUNK_FIELDS = ("chunk_size", "length", "k", "num_heads", "head_dim", "is_causal")


@dataclass(frozen=True, kw_only=True)
class Work:
    """Self-attention of one sequence.

    A learned bias gets a gradient. With projections the input is [1, L, H * D] instead of query, key and value
    [1, H, L, D].

    chunk_size  queries that are handled at a time; None: what the method finds good
    """

    length: int
    k: Annotated[int, "Keys kept per query (topk)."] = 128
    num_heads: Annotated[int, "Number of heads."] = 12
    head_dim: Annotated[int, "Size of a head."] = 64
    is_causal: Annotated[bool, "A query sees the keys up to its own alone."] = False
    bias: Annotated[str, '"none", or "learned": a number per head and distance.'] = "none"
    dropout_p: Annotated[float, "Probability of dropping a weight."] = 0.0
    projections: Annotated[bool, "Four square linear layers around the attention, or the attention alone."] = False
    num_features: Annotated[int, "Random features (performer, rfa)."] = 256
    chunk_size: int | None = None
    dtype: str = "float32"
    gradients_mib: ClassVar[float] = 0.0  # of weights: attention alone has none

    def __post_init__(self) -> None:
        check_count("k", self.k)
        if self.chunk_size is not None:
            check_count("chunk-sizes", self.chunk_size)
        check_dropout(self.dropout_p)
        check_one_of(BIASES, self, "bias")
        check_one_of(DTYPES, self, "dtype")
        check_at_least(1, self, "length", "num_features", "num_heads", "head_dim")

    def as_record(self) -> Json:
        """The fields that distinguish a work of the operation alone."""
        other_dtype = {} if self.dtype == "float32" else {"dtype": self.dtype}  # earlier records do not name it
        return {name: getattr(self, name) for name in _FIELDS} | other_dtype

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
        if self.dtype != "float32":
            parts.append(self.dtype)
        return ", ".join(parts)


@dataclass(frozen=True, kw_only=True)
class LayerWork(Work):
    """The attention of one layer of a model that reads a text, with its queries, keys and values.

    num_key_heads    query heads share them in groups
    model, revision  the model's name and version
    text             the text's source, and the hash of its content
    captured         file that holds the tensors, not part of what identifies the work
    """

    num_key_heads: int
    layer: int
    model: str
    revision: str
    text: str
    text_sha256: str
    captured: str = field(default="", compare=False)

    def as_record(self) -> Json:
        """The fields that distinguish a work."""
        return super().as_record() | {name: getattr(self, name) for name in _CAPTURED_FIELDS}

    def __str__(self) -> str:
        heads, rest = super().__str__().split(", ", 1)
        shared = "" if self.num_key_heads == self.num_heads else f" ({self.num_key_heads} of keys)"
        return f"layer {self.layer} of {self.model}, {heads}{shared}, {rest}"


def new_work(**fields: Any) -> Work:
    """The work of a record."""
    return LayerWork(**fields) if "layer" in fields else Work(**fields)


@dataclass(frozen=True, kw_only=True)
class Point(Work, rounds.Setting):
    """One method at one work: a causal layer's step, or in mode "forward" a pass of the attention for a chunk size."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_setting()
        check_method(self.method, LAYER_METHODS[1:])
        method = method_of(self.method)
        if self.bias != "none" and not method.takes_bias:
            raise ValueError(f'bias must be "none" for {self.method}, got {self.bias!r}')
        if self.dropout_p > 0 and method.is_random:
            raise ValueError(
                f"dropout must be 0 for {self.method}, which forms no weights to drop, got {self.dropout_p:g}"
            )

    def as_record(self) -> Json:
        """The fields that distinguish this point from others, without settings that its method does not look at."""
        fields = asdict(self) | {"k": kept(self.method, self.k)}
        name, backend = split_backend(self.method)
        if self.mode == "forward":
            sizes = {field: fields[field] for field in _CHUNK_FIELDS}
            return {"method": name if backend == "chunked" else self.method} | sizes | self.setting_record()
        if not method_of(name).is_random:
            fields["num_features"] = None
        backend = backend_of(self.method)
        sizes = {field: fields[field] for field in _LAYER_FIELDS}
        return {"implementation": name, "backend": backend} | sizes | self.setting_record()

    def __str__(self) -> str:
        chunks = "" if self.chunk_size is None else f", chunks of {self.chunk_size:,}"
        return f"{self.method}, {super().__str__()}{chunks}"


def backend_of(method: str) -> str | None:
    """The backend that computes a method of this library; None for others.

    >>> backend_of("topk-reference"), backend_of("query-chunks"), backend_of("sdpa")
    ('reference', 'chunked', None)
    """
    if method_of(method).is_completed:
        return choose_backend("auto").name
    return "chunked" if method == "query-chunks" else split_backend(method)[1]


LAYER_METHODS = tuple(METHODS)  # "topk" first, whose points name its backend
# In chunks of queries. "topk" is the backend in plain PyTorch; the compiled kernels of "topk-cpu" have no chunks.
CHUNK_METHODS = {
    "vanilla-chunks": "vanilla, a chunk of queries at a time",
    "query-chunks": f"{METHODS['query-chunks'].description} (chunked)",
    "topk": "top-k (chunked)",
    "topk-cpu": "top-k (compiled kernels)",
    "sdpa": METHODS["sdpa"].description,
}

_PLAIN = Work(num_heads=4, length=8192, k=64)
_ROWS = {
    "plain": (_PLAIN, Goal(4.5, 10.0)),
    "long": (replace(_PLAIN, length=32768), Goal(5.0, 7.0)),
    "causal": (replace(_PLAIN, is_causal=True), Goal(4.0, 8.5)),
    "short": (replace(_PLAIN, num_heads=12, length=2048), Goal(2.8, 3.0)),
    "large-k": (replace(_PLAIN, k=256), Goal(3.0, 3.5)),
    "large-heads": (replace(_PLAIN, head_dim=128), Goal(4.2, None)),
    "bfloat16": (replace(_PLAIN, dtype="bfloat16"), Goal(4.5, None)),
    "learned-bias": (replace(_PLAIN, bias="learned"), Goal(None, 15.0)),
    "dropout": (replace(_PLAIN, dropout_p=0.1), Goal(None, 25.0)),
}
TABLE = {name: work for name, (work, _) in _ROWS.items()}
GOALS = dict(_ROWS.values())
LENGTHS = [replace(_PLAIN, length=2**exponent) for exponent in range(10, 18)]  # 1,024 to 131,072
LAYER_LENGTH, LAYER_K = 8192, 64  # of layers of a model
KS = [replace(_PLAIN, k=2**exponent) for exponent in range(3, 11)]  # 8 to 1,024


def grid(lengths: Iterable[int], methods: Sequence[str], *args: Any, **settings: Any) -> list[Point]:
    """Points of causal layers, as `rounds.grid` makes them; by default with projections.

    >>> [(point.length, point.method, point.k) for point in grid([512], ["topk-chunked", "sdpa"], [64, 32])]
    [(512, 'topk-chunked', 32), (512, 'topk-chunked', 64), (512, 'sdpa', 32)]
    """
    for method in methods:
        check_method(method, LAYER_METHODS, argument="implementations")
    settings = {"is_causal": True, "projections": True} | settings
    return rounds.grid(Point, "length", lengths, methods, *args, **settings)


def able_to(bias: str, dropout_p: float) -> list[str]:
    """The methods that can do a bias and dropout; top-k also with the backend in plain PyTorch."""
    takes_bias, is_random = (True if bias != "none" else None), (False if dropout_p > 0 else None)
    topk, *others = among(LAYER_METHODS, takes_bias=takes_bias, is_random=is_random)
    return [topk, "topk-chunked", *others]


def bias_and_dropout(k: int = 128, **settings: Any) -> list[Point]:
    """Causal points at the two works of the table for which PyTorch's attention on a CPU takes an L x L path."""
    points: list[Point] = []
    for work in (TABLE["learned-bias"], TABLE["dropout"]):
        settings |= {"num_heads": work.num_heads, "bias": work.bias, "dropout_p": work.dropout_p}
        points += grid([work.length], ["topk", "sdpa"], [k], projections=False, **settings)
    return points


def chunk_grid(methods: Iterable[str], chunk_sizes: Sequence[int], length: int = 32768, **settings: Any) -> list[Point]:
    """Points of forward passes: one for each method and chunk size, smallest first; one for a method without chunks.

    methods  names of CHUNK_METHODS

    >>> [(point.method, point.chunk_size) for point in chunk_grid(["topk", "sdpa"], [256, 128])]
    [('topk-chunked', 128), ('topk-chunked', 256), ('sdpa', None)]
    """
    points = []
    for name in dict.fromkeys(methods):
        if name not in CHUNK_METHODS:
            raise ValueError(f"methods must be among {', '.join(CHUNK_METHODS)}, got {name!r}")
        has_chunks = method_of(name).has_chunks and name != "topk-cpu"
        for size in sorted(set(chunk_sizes)) if has_chunks else [None]:
            points.append(
                Point(method=on_backend(name, "chunked"), mode="forward", length=length, chunk_size=size, **settings)
            )
    return points
