"""What the benchmark measures: points, and the options that choose them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from topk_attention.functional.checks import check_k

from ...runs.checks import check_at_least
from ...runs.devices import check_device, device_name
from ...runs.records import Json
from ...runs.steps import Limits
from .methods import METHODS, sizes_of

SCHEMA = "topk_attention/attention-error/1"
LINES = "error.jsonl"
DEFAULT_OUT = Path("results/attention-error")
_DEFAULT_NUM_LAYERS = 5


@dataclass(frozen=True)
class Point:
    """One method of one size on the queries, keys and values of one model reading one text.

    model, text  name and revision, source and hash, which identify them
    layers       numbers, from 0
    draws        of random features; errors are means over them. None for other methods
    """

    method: str
    size: int | None
    length: int
    model: list[str]
    text: list[str]
    layers: list[int]
    draws: int | None
    device: str
    threads: int
    seed: int

    def as_record(self) -> Json:
        """What identifies this point."""
        device = self.device if self.device == "cpu" else f"{self.device} ({device_name(self.device)})"
        return asdict(self) | {"device": device}

    def __str__(self) -> str:
        size = "" if self.size is None else f", {METHODS[self.method].size} = {self.size}"
        return f"L = {self.length:,}, {self.method}{size}"


@dataclass(frozen=True)
class ErrorBenchmark:
    """Which points to measure, and how.

    model, text  as the user wrote them; None: SmolLM2 from a package, Python's documentation topics
    layers       numbers; None: five from the first to the last
    k            sizes of top-k attention; None: its own
    features     sizes of random features; None: their own
    repetitions  of a timed step in each layer; fewer where they would take longer than enough_s in all layers
    limits       of a point's process
    fresh        whether to measure points again that are on file
    """

    model: str | None = None
    text: Path | None = None
    lengths: Sequence[int] = (2048, 8192)
    layers: Sequence[int] | None = None
    methods: Sequence[str] = tuple(METHODS)
    k: Sequence[int] | None = None
    features: Sequence[int] | None = None
    draws: int = 3
    out: Path = DEFAULT_OUT
    repetitions: int = 3
    enough_s: float = 60.0
    limits: Limits = Limits()  # noqa: RUF009 - frozen
    device: str = "cpu"
    threads: int = 1
    seed: int = 0
    fresh: bool = False

    def __post_init__(self) -> None:
        for method in self.methods:
            if method not in METHODS:
                raise ValueError(f"methods must be among {', '.join(METHODS)}, got {method!r}")
        if not self.methods or not self.lengths:
            raise ValueError("there is nothing to measure: give at least one length and one method")
        for name, numbers in (("k", self.k), ("features", self.features), ("lengths", self.lengths)):
            for number in numbers or ():
                check_k(name, number)
        if any(number % 2 for number in self.features or ()):
            raise ValueError(f"features must be even, half sines and half cosines for rfa, got {self.features}")
        if min(self.lengths) < 2:
            raise ValueError(f"lengths must be at least 2, got {min(self.lengths)}")
        check_at_least(1, self, "draws", "repetitions", "threads")
        if self.layers is not None and (not self.layers or min(self.layers) < 0):
            raise ValueError(f"layers must be numbers from 0, got {list(self.layers)}")
        check_device(self.device)

    def layers_of(self, num_layers: int) -> list[int]:
        """The layers to measure in a model with this many.

        >>> ErrorBenchmark().layers_of(30)
        [0, 7, 14, 22, 29]
        """
        if self.layers is None:
            last, parts = num_layers - 1, _DEFAULT_NUM_LAYERS - 1
            return sorted({round(part * last / parts) for part in range(parts + 1)})
        if max(self.layers) >= num_layers:
            raise ValueError(f"layers must be below {num_layers}, the model's number of them, got {max(self.layers)}")
        return sorted(set(self.layers))

    def points(self, length: int, model: Sequence[str], text: Sequence[str], layers: Sequence[int]) -> list[Point]:
        """Every method and size at one length."""
        points = []
        for method in dict.fromkeys(self.methods):
            draws = self.draws if METHODS[method].is_random else None
            shared = (length, list(model), list(text), list(layers), draws, self.device, self.threads, self.seed)
            sizes = sizes_of(method, self.k if METHODS[method].size == "k" else self.features)
            points += [Point(method, size, *shared) for size in sizes]
        return points
