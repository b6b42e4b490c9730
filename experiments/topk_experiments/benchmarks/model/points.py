"""What is measured: one training step of a model of some shape, with some attention, at some length."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

from topk_attention.backends import choose_backend
from topk_attention.functional.checks import check_count, check_dropout

from ...models.pretrained import ModelSource
from ...rivals import METHODS as EVERY_METHOD
from ...rivals.names import TOPK, among, on_backend
from ...runs.checks import check_at_least, check_one_of
from ...runs.records import Json
from ..rounds import Device, Seed, Threads

# In the order of the tables.
METHODS = ("vanilla", "sdpa", "query-chunks", "topk", "performer", "rfa")
RANDOM = among(METHODS, is_random=True)
# Methods that may compute the networks of a model in another way too.
_WITH_NETWORKS = ("query-chunks", "topk")
SHAPES = ("bert-base", "t5-base")
DTYPES = ("float32", "bfloat16", "float16", "float64")
ALL: Literal["all"] = "all"


@dataclass(frozen=True)
class Point:
    """One measurement.

    shape           one of SHAPES, or the name of the configuration in `source`
    method          one of METHODS
    length          tokens of the input; of the encoder's where there are two
    feed_forward_k  neurons kept per token by method "topk". "all" computes every neuron in token chunks; method
                    "query-chunks" does so for "all" and for a number. None leaves the networks as they are, and so
                    does every other method
    dropout_p       methods "performer" and "rfa" form no attention weights and drop none
    source          where the user's own configuration is; None for shapes by name
    """

    shape: str
    method: str
    length: int
    k: Annotated[int, "Keys kept per query (topk)."] = 64
    feed_forward_k: int | Literal["all"] | None = None
    decoder_length: Annotated[int, "Tokens of the decoder, where there is one."] = 64
    dropout_p: Annotated[float, "Probability of every dropout that the model has."] = 0.1
    checkpointing: Annotated[bool, "Gradient checkpointing, layer by layer."] = False
    dtype: Annotated[str, "float32, bfloat16, float16 or float64."] = "float32"
    device: Device = "cpu"
    backend: str = "auto"
    threads: Threads = 1
    seed: Seed = 0
    num_features: Annotated[int, "Random features of a head (performer, rfa)."] = 256
    source: ModelSource | None = None

    def __post_init__(self) -> None:
        if self.source is None and self.shape not in SHAPES:
            raise ValueError(f"shape must be among {', '.join(SHAPES)}, got {self.shape!r}; or give --config")
        if self.method not in METHODS:
            raise ValueError(f"methods must be among {', '.join(METHODS)}, got {self.method!r}")
        check_count("k", self.k)
        if self.feed_forward_k not in (None, ALL):
            check_count("feed_forward_k", self.feed_forward_k)
        check_dropout(self.dropout_p)
        check_at_least(1, self, "length", "decoder_length", "threads", "num_features")
        if self.method == "rfa" and self.num_features % 2:
            raise ValueError(f"num_features must be even for rfa, half sines and half cosines, got {self.num_features}")
        check_one_of(DTYPES, self, "dtype")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f'device must be "cpu" or "cuda", got {self.device!r}')
        choose_backend(self.backend)

    @staticmethod
    def of(request: Json) -> Point:
        """The point of an `asdict`, also after it went through JSON."""
        source = request["source"]
        return Point(**request | {"source": None if source is None else ModelSource(**source)})

    def as_record(self) -> Json:
        """What identifies this point: no folder names, and no settings that its method does not use."""
        record = asdict(self)
        record["source"] = None if self.source is None else self.source.revision
        if self.method != "topk":
            record["k"] = None
        if self.method not in RANDOM:
            del record["num_features"]  # as in records from before this setting existed
        if self.method not in _WITH_NETWORKS:
            record["feed_forward_k"] = None
        elif self.method == "query-chunks" and self.feed_forward_k is not None:
            record["feed_forward_k"] = ALL
        record["backend"] = self.backend_name
        return record

    @property
    def backend_name(self) -> str | None:
        """The backend of the library that computes this point's attention; None for methods of others."""
        if self.method == "topk":
            return on_backend("topk", self.backend, self.device).removeprefix(TOPK)
        return "chunked" if self.method == "query-chunks" else None

    def __str__(self) -> str:
        return f"L = {self.length:,}, {curve_name(self.as_record())}"


def curve_name(point: Json) -> str:
    """The name of a method with its settings in tables and pictures; its point is as in a record."""
    match point["method"]:
        case "vanilla":
            return "vanilla (eager)"
        case "sdpa":
            return "PyTorch's SDPA"
        case "performer" | "rfa" as method:
            return f"{EVERY_METHOD[method].description}, {point['num_features']} features"
        case "query-chunks" as method:
            name = EVERY_METHOD[method].description
        case _:
            name = f"top-k, k = {point['k']} ({point['backend']})"
    if point["feed_forward_k"] is None:
        return name
    if point["feed_forward_k"] == ALL:
        return f"{name}, every neuron in token chunks"
    return f"{name}, {point['feed_forward_k']} neurons"


def settings(point: Json) -> Json:
    """What all points of a table have in common: everything except the length and the method with its settings."""
    varied = ("method", "length", "k", "feed_forward_k", "backend", "seed", "num_features")
    return {name: value for name, value in point.items() if name not in varied}


def grid(lengths: Iterable[int], methods: Iterable[str], **settings: object) -> list[Point]:
    """One point for each length and method, shortest first."""
    pairs = itertools.product(sorted(set(lengths)), dict.fromkeys(methods))
    return [Point(method=method, length=length, **settings) for length, method in pairs]  # type: ignore[arg-type]
