"""Which points are missing. They are measured one after another, and each is written down when it finishes."""

from __future__ import annotations

import functools
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ...models.pretrained import find_model, load_config, load_tokenizer, longest_input, unpacked
from ...models.text import first_tokens, read_text
from ...rivals import FOLDER as RIVALS
from ...runs.ledger import Ledger
from ...runs.process import Send
from ...runs.progress import say
from ...runs.records import Json
from ...runs.steps import run_within
from ..points import records_of
from . import measure
from .capture import captured
from .report import in_words, report, show
from .settings import LINES, SCHEMA, ErrorBenchmark, Point

if TYPE_CHECKING:
    from rich.console import Console


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
    folder = Path(__file__).parent
    ledger = Ledger(benchmark.out / LINES, schema=SCHEMA, folder=folder, also=[RIVALS], fresh=benchmark.fresh)

    @functools.cache
    def captured_at(length: int) -> str:
        input_ids = first_tokens(text, tokenizer, length)[0].tolist()
        return str(captured(work, loadable, input_ids, layers, benchmark.threads, tell))

    def run(point: Point, on_message: Send) -> Json:
        request = {
            "point": asdict(point),
            "memory_limit_gib": benchmark.limits.memory_gib,
            "repetitions": benchmark.repetitions,
            "enough_s": benchmark.enough_s,
            "captured": captured_at(point.length),
        }
        return run_within(benchmark.limits, f"{measure.__name__}:measure_point", request, str(point), on_message)

    identity = ((source.name, source.revision), (text.source, text.sha256), layers)
    points = [point for length in sorted(set(benchmark.lengths)) for point in benchmark.points(length, *identity)]
    records = records_of(points, ledger, run, spares=benchmark.limits.spare, in_words=in_words, console=console)
    show(records, console)
    for written in report(benchmark.out):
        tell(f"Written: {written}")
    tell(f"Records: {ledger.path}")
    return records
