"""The error of top-k attention and of random features on what a real model attends to, with time and memory."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from ...models.pretrained import find_model, load_config, load_tokenizer, longest_input, unpacked
from ...models.text import first_tokens, read_text
from ...runs.points import PointFile, say
from ...runs.records import Json
from .capture import captured
from .report import in_words, report, show
from .settings import LINES, SCHEMA, ErrorBenchmark

if TYPE_CHECKING:
    from rich.console import Console


def run_error_benchmark(benchmark: ErrorBenchmark, console: Console) -> list[Json]:
    """Measure every point that is not there yet, append each to `error.jsonl` as it finishes, and show them all.

    Raises:
        ValueError: the model, the text or a length do not fit; the message says how.
        FileNotFoundError: there is no such text file.
        WorkerError: the model's attention cannot be imitated, or a process died; the points before it are kept.
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
    file = PointFile(
        benchmark.out / LINES,
        schema=SCHEMA,
        function=f"{__package__}.measure:measure_point",
        limits=benchmark.limits,
        fresh=benchmark.fresh,
    )
    records: list[Json] = []
    for length in sorted(set(benchmark.lengths)):
        points = benchmark.points(length, (source.name, source.revision), (text.source, text.sha256), layers)
        request: Json = {"repetitions": benchmark.repetitions, "enough_s": benchmark.enough_s}
        if any(file.find(point) is None for point in points):
            input_ids = first_tokens(text, tokenizer, length)[0].tolist()
            path = captured(work, loadable, input_ids, layers, benchmark.threads, tell)
            request["captured"] = str(path)
        records += file.measure(points, request, in_words, console)
    show(records, console)
    for written in report(benchmark.out):
        tell(f"Written: {written}")
    tell(f"Records: {file.lines}")
    return records
