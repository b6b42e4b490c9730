"""The options, and which points are missing. Points are measured one by one and written down when they finish."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from topk_attention.functional.checks import check_count

from ...models.pretrained import find_model, load_config, load_tokenizer, longest_input, unpacked
from ...models.text import first_tokens, read_text
from ...runs.checks import check_at_least
from ...runs.devices import check_device
from ...runs.process import Send
from ...runs.progress import say
from ...runs.records import Json
from ...runs.steps import run_within
from ..rounds import Benchmark, Device, Seed, Threads, records_of
from . import measure
from .capture import captured
from .measure import METHODS, Point, sizes_of
from .report import NAME, SCHEMA, in_words, report, show

if TYPE_CHECKING:
    from rich.console import Console

_DEFAULT_NUM_LAYERS = 5


@dataclass(frozen=True, kw_only=True)
class ErrorBenchmark(Benchmark):
    """Which points to measure. A step is timed in each layer, in all of them for about `enough_s`."""

    model: Annotated[
        str | None, "Local folder or Hugging Face id of a causal model. Default: SmolLM2-135M from a package."
    ] = None
    text: Annotated[Path | None, "UTF-8 text file. Default: Python's own documentation topics."] = None
    lengths: Annotated[Sequence[int], "Tokens of the window."] = (2048, 8192)
    layers: Annotated[Sequence[int] | None, "Numbers from 0. Default: five from first to last."] = None
    methods: Annotated[Sequence[str], f"Among {', '.join(METHODS)}."] = tuple(METHODS)
    k: Annotated[Sequence[int] | None, "Keys kept per query. Default: 4 to 1,024."] = None
    features: Annotated[Sequence[int] | None, "Numbers of random features. Default: 32 to 4,096."] = None
    draws: Annotated[int, "Draws of random features; errors are means over them."] = 3
    out: Annotated[Path, "Folder for the results."] = Path("results/attention-error")
    enough_s: float = 60.0
    device: Device = "cpu"
    threads: Threads = 1
    seed: Seed = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for method in self.methods:
            if method not in METHODS:
                raise ValueError(f"methods must be among {', '.join(METHODS)}, got {method!r}")
        if not self.methods or not self.lengths:
            raise ValueError("there is nothing to measure: give at least one length and one method")
        for name, numbers in (("k", self.k), ("features", self.features), ("lengths", self.lengths)):
            for number in numbers or ():
                check_count(name, number)
        if any(number % 2 for number in self.features or ()):
            raise ValueError(f"features must be even, half sines and half cosines for rfa, got {self.features}")
        if min(self.lengths) < 2:
            raise ValueError(f"lengths must be at least 2, got {min(self.lengths)}")
        check_at_least(1, self, "draws", "threads")
        if self.layers is not None and (not self.layers or min(self.layers) < 0):
            raise ValueError(f"layers must be numbers from 0, got {list(self.layers)}")
        check_device(self.device)

    @property
    def ks(self) -> list[int]:
        """The k of all its points."""
        names = [name for name in self.methods if METHODS[name].size == "k"]
        return [k for name in names for k in sizes_of(name, self.k) if k is not None]

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
        for name in dict.fromkeys(self.methods):
            method = METHODS[name]
            draws = self.draws if method.is_random else None
            shared = (length, list(model), list(text), list(layers), draws, self.device, self.threads, self.seed)
            sizes = sizes_of(name, self.k if method.size == "k" else self.features)
            points += [Point(name, size, *shared) for size in sizes]
        return points


def run_error_benchmark(benchmark: ErrorBenchmark, console: Console) -> list[Json]:
    """Measure every point that is not on file yet, append each to `error.jsonl` when it finishes, and show them all.

    Raises:
        ValueError: the model, the text or a length does not fit; the message says how.
        FileNotFoundError: there is no such text file.
        WorkerError: the model's attention is not plain, or a process died; the points before it are kept.
    """
    tell = functools.partial(say, console)
    text = read_text(benchmark.text)
    source = find_model(benchmark.model, tell)
    work = benchmark.out / "work"
    loadable = unpacked(source, work / "model", tell)
    config, tokenizer = load_config(loadable), load_tokenizer(loadable)
    limit = longest_input(config)
    if limit is not None and max(benchmark.lengths) > limit:
        raise ValueError(
            f"lengths must be at most {limit}, the longest input of {source.name}, got {max(benchmark.lengths)}"
        )
    layers = benchmark.layers_of(config.num_hidden_layers)
    limits, ledger = benchmark.limits, benchmark.ledger(NAME, SCHEMA, __name__)

    @functools.cache
    def captured_at(length: int) -> str:
        input_ids = first_tokens(text, tokenizer, length)[0].tolist()
        return str(captured(work, loadable, input_ids, layers, benchmark.threads, tell))

    def run(point: Point, on_message: Send) -> Json:
        request = {
            "point": asdict(point),
            "memory_limit_gib": limits.memory_gib,
            "repetitions": benchmark.repetitions,
            "enough_s": benchmark.enough_s,
            "captured": captured_at(point.length),
        }
        return run_within(limits, f"{measure.__name__}:measure_point", request, str(point), on_message)

    identity = ((source.name, source.revision), (text.source, text.sha256), layers)
    points = [point for length in sorted(set(benchmark.lengths)) for point in benchmark.points(length, *identity)]
    records = records_of(points, ledger, run, spares=limits.spare, in_words=in_words, console=console)
    show(records, console)
    for written in report(benchmark.out):
        tell(f"Written: {written}")
    tell(f"Records: {ledger.path}")
    return records
