"""The demo: one pretrained model reads one text with full attention and with several k, each in a fresh process.

What is measured is the cost of leaving keys out (perplexity), and the time and memory of one forward pass over the
whole window. The record is written after every run, so that an interrupted demo continues where it stopped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from topk_attention.backends import choose_backend
from topk_attention.environment import environment, now
from topk_attention.files import check_writable

from ..models.pretrained import (
    ModelSource,
    Say,
    find_model,
    load_config,
    load_model,
    load_tokenizer,
    longest_input,
    unpacked,
)
from ..models.text import Text, first_tokens, hidden_states_give_logits, perplexity, read_text
from ..runs.checks import check_at_least, check_runs
from ..runs.memory import PeakMeter
from ..runs.process import Send, WorkerError, run_in_fresh_process
from ..runs.progress import progress_bar
from ..runs.records import SAME_ENVIRONMENT, Json, differences, read_json, write_json, write_whole
from ..runs.timing import Stopwatch, busy_note
from ..show.plots import draw_demo
from .demo_report import html_page, run_name, summary

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = "topk_attention/demo/1"
DEFAULT_NUM_TOKENS = 4096
DEFAULT_K = (16, 32, 64, 128, 256)
DEFAULT_OUT = Path("results/demo")


@dataclass(frozen=True)
class DemoConfig:
    """What the demo runs; paths and the model as the user wrote them.

    >>> DemoConfig(k=(16, 0))
    Traceback (most recent call last):
    ValueError: k must be at least 1 and below 2^31, got 0
    """

    model: str | None = None
    text: Path | None = None
    num_tokens: int = DEFAULT_NUM_TOKENS
    k: Sequence[int] = DEFAULT_K
    out: Path = DEFAULT_OUT
    seed: int = 0
    threads: int | None = None
    backend: str = "auto"
    fresh: bool = False

    def __post_init__(self) -> None:
        check_runs(self.k, self.backend)
        if self.num_tokens < 2:
            raise ValueError(f"tokens must be at least 2 (the first one is never predicted), got {self.num_tokens}")
        check_at_least(1, self, "threads")


@dataclass(frozen=True)
class DemoFiles:
    """Where a demo's results are."""

    record: Path
    picture: Path
    page: Path
    work: Path

    @staticmethod
    def under(out: Path) -> DemoFiles:
        return DemoFiles(out / "demo.json", out / "demo.png", out / "demo.html", out / "work")


def run_demo(config: DemoConfig, console: Console) -> Json:
    """Make every run that is not there yet, write the results, and return the record.

    Raises:
        ValueError: the model, the text or the k do not fit; the message says how.
        FileNotFoundError: there is no such text file.
        WorkerError: a run failed; the runs before it are kept.
    """
    files = DemoFiles.under(config.out)
    say: Say = lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True)  # noqa: E731
    text = read_text(config.text)
    source = find_model(config.model, say)
    check_writable("out", files.record)
    notes: list[str] = []  # said only once it is certain that the new runs can be made
    record = _start_or_continue(_new_record(config, source, text), files, config.fresh, notes.append)
    missing = [k for k in (None, *config.k) if k not in [run["k"] for run in record["runs"]]]
    if missing:
        source = unpacked(source, files.work / "model", say)
        input_ids = _input_ids(config, source, text)
    for note in notes:
        say(note)
    if missing:
        _make_runs(record, missing, source, input_ids, files, console)
    draw_demo(record, files.picture)
    write_whole(files.page, html_page(record, files.picture.read_bytes()))
    _show(record, files, console, say)
    return record


def measure_run(request: Json, send: Send) -> Json:
    """One run, in a process of its own: load the model, convert it for a k, warm up, measure.

    The request's k is whatever `convert` takes as attention_k, or None. Of several windows of equal length the
    perplexity is that of all their predicted tokens.
    """
    import torch

    from topk_attention.convert import convert

    torch.set_num_threads(request["threads"])
    torch.manual_seed(request["seed"])
    model = load_model(ModelSource(**request["model"]))
    feed_forward_k = request.get("feed_forward_k")
    if request["k"] is not None or feed_forward_k is not None:
        convert(model, attention_k=request["k"], feed_forward_k=feed_forward_k, backend=request["backend"])
    windows = [torch.tensor([window]) for window in request["windows"]]
    # A short prefix also serves as the warm-up: it touches every weight and starts the threads.
    logits_in_chunks = hidden_states_give_logits(model, windows[0])
    with PeakMeter() as meter, Stopwatch() as stopwatch:
        losses = []
        for number, window in enumerate(windows):

            def report(done: int, total: int, number: int = number) -> None:
                send({"done": (number + done / total) / len(windows)})

            losses.append(math.log(perplexity(model, window, progress=report, logits_in_chunks=logits_in_chunks)))
    memory = meter.read()
    return {
        "k": request["k"],
        "attn_implementation": model.config._attn_implementation,
        "perplexity": math.exp(sum(losses) / len(losses)),
        "elapsed_s": stopwatch.elapsed_s,
        "other_cores": stopwatch.other_cores,
        "peak_mib": memory.peak_mib,
        "baseline_mib": memory.baseline_mib,
        "total_peak_mib": memory.total_peak_mib,
        "memory_method": memory.method,
        "logits_in_chunks": logits_in_chunks,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def _new_record(config: DemoConfig, source: ModelSource, text: Text) -> Json:
    import torch

    return {
        "schema": SCHEMA,
        "config": {
            "num_tokens": config.num_tokens,
            "k": list(config.k),
            "seed": config.seed,
            "threads": config.threads or torch.get_num_threads(),
            "backend": choose_backend(config.backend).name,
            "dtype": "float32",
        },
        "model": {"name": source.name, "revision": source.revision},
        "text": {"source": text.source, "sha256": text.sha256, "num_characters": len(text.content)},
        "memory": "peak_mib is the peak of the process's resident memory during the forward pass, above what it held "
        "just before it (model loaded, converted and warmed up on a short prefix); total_peak_mib includes that",
        "environment": environment(),
        "runs": [],
    }


def _start_or_continue(new: Json, files: DemoFiles, fresh: bool, say: Say) -> Json:
    """The record to go on with: the one on disk where it is of the same configuration, otherwise a new one."""
    old = read_json(files.record)
    if old is None:
        return new
    if fresh:
        say(f"Starting anew as asked: {files.record} is replaced.")
        return new
    different = differences(_identity(old), _identity(new))
    if different:
        say(f"{files.record} was made with another configuration and is replaced ({'; '.join(different)}).")
        return new
    finished, wanted = len(old["runs"]), 1 + len(new["config"]["k"])
    if finished == wanted:
        say(f"All {wanted} runs are in {files.record} already; --fresh makes them again.")
    else:
        say(f"Continuing {files.record}: {finished} of {wanted} runs are there already.")
    return old


def _identity(record: Json) -> dict[str, Any]:
    """What has to agree for two runs to stand in one table."""
    flat = {"schema": record.get("schema")}
    for section in ("config", "model", "text"):
        flat |= {f"{section} {name}": value for name, value in record.get(section, {}).items()}
    flat.pop("model num_parameters", None)  # known after the first run
    environment_of_record = record.get("environment", {})
    return flat | {name: environment_of_record.get(name) for name in SAME_ENVIRONMENT}


def _input_ids(config: DemoConfig, source: ModelSource, text: Text) -> list[int]:
    limit = longest_input(load_config(source))
    if limit is not None and config.num_tokens > limit:
        raise ValueError(f"tokens must be at most {limit}, the longest input of {source.name}, got {config.num_tokens}")
    return first_tokens(text, load_tokenizer(source), config.num_tokens)[0].tolist()


def _make_runs(
    record: Json,
    missing: Sequence[int | None],
    source: ModelSource,
    input_ids: list[int],
    files: DemoFiles,
    console: Console,
) -> None:
    from rich.markup import escape

    with progress_bar(console) as bar:
        task = bar.add_task("", total=len(missing))
        for number, k in enumerate(missing):
            name = run_name(k, len(input_ids))
            bar.update(task, description=f"{name} ({number + 1} of {len(missing)})", completed=number)

            def on_message(message: Json, number: int = number) -> None:
                bar.update(task, completed=number + message["done"])

            request = {
                "model": vars(source),
                "k": k,
                "windows": [input_ids],
                "threads": record["config"]["threads"],
                "seed": record["config"]["seed"],
                "backend": record["config"]["backend"],
            }
            try:
                run = run_in_fresh_process(
                    f"{__name__}:measure_run", request, on_message=on_message, memory_in_use=True
                )
            except WorkerError as error:
                raise WorkerError(error.outcome, f"{name} failed ({error.outcome}): {error}") from error
            record["model"]["num_parameters"] = run.pop("num_parameters")
            record["runs"].append(run | {"date": now()})
            write_json(files.record, record)
            bar.update(task, completed=number + 1)
            bar.console.print(
                f"{escape(name)}: perplexity {run['perplexity']:.2f}, {run['elapsed_s']:.1f} s, "
                f"{run['peak_mib']:,.0f} MiB",
                highlight=False,
                soft_wrap=True,
            )


def _show(record: Json, files: DemoFiles, console: Console, say: Say) -> None:
    from rich.markup import escape
    from rich.table import Table

    model = record["model"]
    table = Table(title=f"{escape(model['name'])}, {record['config']['num_tokens']:,} tokens", title_justify="left")
    table.add_column("attention")
    for heading in ("perplexity", "time [s]", "peak memory [MiB]", "of the process [MiB]"):
        table.add_column(escape(heading), justify="right")
    for run in record["runs"]:
        table.add_row(
            run_name(run["k"], record["config"]["num_tokens"]),
            f"{run['perplexity']:.2f}",
            f"{run['elapsed_s']:.1f}",
            f"{run['peak_mib']:,.0f}",
            f"{run['total_peak_mib']:,.0f}",
        )
    console.print(table)
    say(f"Peak memory is counted above the loaded model. {summary(record)}")
    note = busy_note([run.get("other_cores") for run in record["runs"]], record["environment"]["num_cpus"])
    if note is not None:
        say(note)
    say(f"Record:  {files.record}")
    say(f"Picture: {files.picture}")
    say(f"Page:    {files.page}")
