"""The options, and which points are missing. Every round measures each method once, in a fresh process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from topk_attention.backends import choose_backend
from topk_attention.functional.checks import check_count

from ...models.pretrained import ModelSource, find_model, load_config, load_tokenizer, longest_input, unpacked
from ...models.text import first_tokens, read_text
from ...runs.checks import check_at_least, check_different
from ...runs.process import Send
from ...runs.progress import line_printer, say
from ...runs.records import Json
from ...runs.steps import Limits, run_within
from ..rounds import Benchmark, Seed, Threads, records_of
from . import measure
from .methods import METHODS, why_not
from .report import NAME, SCHEMA, in_words, pages, report

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Point:
    """One method in one round.

    length  tokens of the prompt
    model, text  (name, revision) and (source, hash)
    """

    method: str
    round: int
    length: int
    num_tokens: int
    short_length: int
    k: int | None
    backend: str | None
    threads: int
    seed: int
    model: Sequence[str]
    text: Sequence[str]

    def as_record(self) -> Json:
        return asdict(self) | {"model": list(self.model), "text": list(self.text)}

    def __str__(self) -> str:
        kept = "" if self.k is None else f", k = {self.k}"
        return f"{self.length:,} tokens, round {self.round}, {METHODS[self.method].description}{kept}"


@dataclass(frozen=True, kw_only=True)
class GenerationBenchmark(Benchmark):
    """What is read after which prompts.

    >>> GenerationBenchmark(lengths=[60])
    Traceback (most recent call last):
    ValueError: lengths must be above short-length, 64, got 60
    """

    model: Annotated[
        str | None, "Local folder or Hugging Face id of a causal model. Default: SmolLM2-135M from a package."
    ] = None
    text: Annotated[Path | None, "UTF-8 text file. Default: Python's own documentation topics."] = None
    lengths: Annotated[Sequence[int], "Tokens of the prompt."] = (2048, 7900)
    methods: Annotated[Sequence[str], f"Among {', '.join(METHODS)}."] = tuple(METHODS)
    k: Annotated[int, "Keys kept per query (topk)."] = 64
    repetitions: Annotated[int, "Rounds, each of which runs every method once in a fresh process."] = 3
    tokens: Annotated[int, "Tokens read after the prompt, one by one as in generation."] = 32
    short_length: Annotated[int, "Tokens of the short prompt, after which a token costs little attention."] = 64
    out: Annotated[Path, "Folder for the results."] = Path("results/generation")
    threads: Threads = 2
    seed: Seed = 0
    limits: Limits = Limits(900.0)  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.methods or not self.lengths:
            raise ValueError("there is nothing to measure: give at least one length and one method")
        for method in self.methods:
            if method not in METHODS:
                raise ValueError(f"methods must be among {', '.join(METHODS)}, got {method!r}")
        check_different("methods", self.methods, "method")
        check_different("lengths", self.lengths)
        check_count("k", self.k)
        check_at_least(1, self, "tokens", "short_length", "threads")
        for length in self.lengths:
            check_count("lengths", length)
        if min(self.lengths) <= self.short_length:
            raise ValueError(f"lengths must be above short-length, {self.short_length}, got {min(self.lengths)}")

    def points(self, model: Sequence[str], text: Sequence[str]) -> Iterator[Point]:
        """Every method in every round, at each length."""
        backend = choose_backend("auto").name
        for length in sorted(self.lengths):
            for number in range(1, self.repetitions + 1):
                for method in self.methods:
                    k, computed_by = (self.k, backend) if METHODS[method].keeps_k else (None, None)
                    sizes = (length, self.tokens, self.short_length)
                    yield Point(method, number, *sizes, k, computed_by, self.threads, self.seed, model, text)


def run_generation_benchmark(benchmark: GenerationBenchmark, console: Console) -> list[Json]:
    """Measure every point that is not on file and append each to `generation.jsonl` as it finishes.

    A method that is not there has a record that says why.

    Raises:
        ValueError: the model or the text does not fit; the message says how.
        WorkerError: an answer is wrong, or a process died; the points before it are kept.
    """
    tell = line_printer(console)
    text = read_text(benchmark.text)
    source = find_model(benchmark.model, tell)
    loadable = unpacked(source, benchmark.out / "work" / "model", tell)
    tokenizer = load_tokenizer(loadable)
    _check_length(benchmark, loadable)
    text_ids = first_tokens(text, tokenizer, max(benchmark.lengths) + benchmark.tokens)[0].tolist()
    ledger, limits = benchmark.ledger(NAME, SCHEMA, __name__), benchmark.limits

    def run(point: Point, send: Send) -> Json:
        if (reason := why_not(point.method, source.gguf_file)) is not None:
            return {"outcome": "not there", "message": reason}
        llama = METHODS[point.method].is_llama
        ids = text_ids[: point.length]
        request = {
            "point": asdict(point) | {"k": point.k or 0},
            "prompt": ids,
            "following": text_ids[point.length :][: point.num_tokens],
            "prompt_text": tokenizer.decode(ids, clean_up_tokenization_spaces=False),
            "model": vars(source if llama else loadable),
            "memory_limit_gib": limits.memory_gib,
        }
        return run_within(limits, f"{measure.__name__}:measure_point", request, str(point), send)

    def spares(record: Json) -> bool:
        if record["outcome"] == "not there":
            return why_not(record["point"]["method"], source.gguf_file) is not None
        return limits.spare(record)

    points = list(benchmark.points((source.name, source.revision), (text.source, text.sha256)))
    return records_of(points, ledger, run, spares=spares, in_words=in_words, console=console)


def run_and_show(benchmark: GenerationBenchmark, console: Console) -> None:
    """Measure what is missing, show the table of what was asked for, and write the report of all on file."""
    for page in pages(run_generation_benchmark(benchmark, console)):
        page.show(console)
    for path in (benchmark.out / f"{NAME}.jsonl", *report(benchmark.out)):
        say(console, f"Written: {path}")


def _check_length(benchmark: GenerationBenchmark, source: ModelSource) -> None:
    limit = longest_input(load_config(source))
    longest = max(benchmark.lengths) + benchmark.tokens
    if limit is not None and longest > limit:
        raise ValueError(
            f"lengths must be at most {limit - benchmark.tokens}, the longest input of {source.name} less the "
            f"tokens after it, got {max(benchmark.lengths)}"
        )
