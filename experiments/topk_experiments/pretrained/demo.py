"""The demo: one pretrained model reads one text with full attention and with several k, alone and completed.

It measures the cost of leaving keys out (perplexity), and time and memory of one forward pass over the whole window.
All settings take turns: every round runs each of them once, in a fresh process, so that a busy stretch of the machine
does not decide which one looks faster. The record is written after every run; an interrupted demo continues with the
runs that are missing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from topk_attention import Completion
from topk_attention.backends import choose_backend
from topk_attention.convert import convert
from topk_attention.convert.settings import completion_to_json
from topk_attention.environment import now
from topk_attention.files import check_writable

from ..models.pretrained import (
    ModelSource,
    find_model,
    load_config,
    load_model_to_run,
    load_tokenizer,
    longest_input,
    unpacked,
)
from ..models.settings import completion_from_json
from ..models.text import Text, first_tokens, hidden_states_give_logits, perplexity, read_text
from ..runs.checks import check_at_least, check_ks, check_runs
from ..runs.files import damage_named
from ..runs.ledger import experiment_environment, record_of_same_run
from ..runs.memory import PeakMeter
from ..runs.process import Send, failures_named, run_in_fresh_process
from ..runs.progress import Say, line_printer, progress_bar
from ..runs.records import Json, write_json
from ..runs.timing import Stopwatch, busy_note
from ..show.console import print_table
from ..show.html import counted
from .demo_report import run_name, summary, table_rows, write_report

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = "topk_attention/demo/3"
DEFAULT_NUM_TOKENS = 4096
# Few settings, so that three rounds take about four minutes on two cores.
DEFAULT_K = (64,)
DEFAULT_COMPLETED_K = (16, 64)
DEFAULT_ROUNDS = 3
DEFAULT_OUT = Path("build/demo")


class Turn(NamedTuple):
    """One run of the demo; a k of None is full attention."""

    round: int
    k: int | None
    completed: bool


@dataclass(frozen=True)
class DemoConfig:
    """What the demo runs; paths and the model as the user wrote them.

    k            keys per query, of top-k attention alone
    completed_k  keys per query, of completed attention
    rounds       times that every setting runs, in turns

    >>> DemoConfig(k=(16, 0))
    Traceback (most recent call last):
    ValueError: k must be at least 1 and below 2^31, got 0
    """

    model: str | None = None
    text: Path | None = None
    num_tokens: int = DEFAULT_NUM_TOKENS
    k: Sequence[int] = DEFAULT_K
    completed_k: Sequence[int] = DEFAULT_COMPLETED_K
    rounds: int = DEFAULT_ROUNDS
    out: Path = DEFAULT_OUT
    seed: int = 0
    threads: int | None = None
    backend: str = "auto"
    fresh: bool = False

    def __post_init__(self) -> None:
        check_runs(self.k, self.backend)
        check_ks("completed-k", self.completed_k)
        if self.num_tokens < 2:
            raise ValueError(f"tokens must be at least 2 (the first one is never predicted), got {self.num_tokens}")
        check_at_least(1, self, "threads", "rounds", "num_tokens")

    @property
    def record(self) -> Path:
        return self.out / "demo.json"

    def turns(self) -> list[Turn]:
        """Every run, in the order in which they run."""
        settings = [(None, False), *((k, False) for k in self.k), *((k, True) for k in self.completed_k)]
        return [Turn(number, k, completed) for number in range(1, self.rounds + 1) for k, completed in settings]


def run_demo(config: DemoConfig, console: Console) -> Json:
    """Make every run that is not on file yet, write the results, and return the record.

    Raises:
        ValueError: the model, the text or the k do not fit; the message says how.
        FileNotFoundError: there is no such text file.
        WorkerError: a run failed. The runs before it are kept.
    """
    say = line_printer(console)
    text = read_text(config.text)
    source = find_model(config.model, say)
    check_writable("out", config.record)
    notes: list[str] = []  # said only when it is certain that the new runs can be made
    record = _start_or_continue(_new_record(config, source, text), config, notes.append)
    with damage_named(config.record, "move it away or give another --out"):
        finished = [Turn(run["round"], run["k"], run["completed"]) for run in record["runs"]]
    missing = [turn for turn in config.turns() if turn not in finished]
    if missing:
        source = unpacked(source, config.out / "work" / "model", say)
        input_ids = _input_ids(config, source, text)
    for note in notes:
        say(note)
    if missing:
        say(_plan(config, source, text, missing))
        _make_runs(record, missing, source, input_ids, config, console)
    picture, page = write_report(record, config.out)
    _show(record, console, say)
    say(f"Record:  {config.record}")
    say(f"Picture: {picture}")
    say(f"Page:    {page}")
    return record


def convert_as_asked(model: Any, request: Json) -> None:
    """Convert a model for the request's k, feed_forward_k and completion; the last two may be missing.

    The completion is as `completion_from_json` takes it.
    """
    k, feed_forward_k = (request.get(name) for name in ("k", "feed_forward_k"))
    if k is None and feed_forward_k is None:
        return
    completion = completion_from_json(request.get("completion"))
    convert(model, attention_k=k, feed_forward_k=feed_forward_k, completion=completion, backend=request["backend"])


def measure_run(request: Json, send: Send) -> Json:
    """One run in a process of its own: load the model, convert it for a k, warm up, measure.

    The request's k is what `convert` takes as attention_k, or None. The perplexity of several windows of equal length
    is that of all their predicted tokens.
    """
    torch.set_num_threads(request["threads"])
    torch.manual_seed(request["seed"])
    model = load_model_to_run(ModelSource(**request["model"]))
    convert_as_asked(model, request)
    windows = [torch.tensor([window]) for window in request["windows"]]
    # The short prefix of this check is also the warm-up: it touches every weight and starts the threads.
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
        **memory.as_record(),
        "logits_in_chunks": logits_in_chunks,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def _new_record(config: DemoConfig, source: ModelSource, text: Text) -> Json:
    return {
        "schema": SCHEMA,
        "config": {
            "num_tokens": config.num_tokens,
            "k": list(config.k),
            "completed_k": list(config.completed_k),
            "rounds": config.rounds,
            "seed": config.seed,
            "threads": config.threads or torch.get_num_threads(),
            "backend": choose_backend(config.backend).name,
            "dtype": "float32",
        },
        "model": {"name": source.name, "revision": source.revision},
        "text": {"source": text.source, "sha256": text.sha256, "num_characters": len(text.content)},
        "memory": "peak_mib is the peak of the process's resident memory during the forward pass, above what it held "
        "just before it (model loaded, converted and warmed up on a short prefix); total_peak_mib includes that",
        "environment": experiment_environment(Path(__file__).parent),
        "runs": [],
    }


def _start_or_continue(new: Json, config: DemoConfig, say: Say) -> Json:
    """The record to continue: that on file if it is of the same run, otherwise a new one."""

    def as_planned(record: Json) -> Json:
        """Without the number of parameters, which is known only after the first run."""
        model = {name: value for name, value in record.get("model", {}).items() if name != "num_parameters"}
        return record | {"model": model}

    fields = ("schema", "config", "model", "text")
    old = record_of_same_run(config.record, new, fields, fresh=config.fresh, say=say, as_planned=as_planned)
    if old is None:
        return new
    finished, wanted = len(old["runs"]), len(config.turns())
    if finished == wanted:
        say(f"All {wanted} runs are in {config.record} already; --fresh makes them again.")
    else:
        say(f"Continuing {config.record}: {finished} of {wanted} runs are on file.")
    return old


def _input_ids(config: DemoConfig, source: ModelSource, text: Text) -> list[int]:
    limit = longest_input(load_config(source))
    if limit is not None and config.num_tokens > limit:
        raise ValueError(f"tokens must be at most {limit}, the longest input of {source.name}, got {config.num_tokens}")
    return first_tokens(text, load_tokenizer(source), config.num_tokens)[0].tolist()


def _plan(config: DemoConfig, source: ModelSource, text: Text, missing: Sequence[Turn]) -> str:
    """What is about to run, for the console."""
    ks, completed_ks = (", ".join(map(str, ks)) for ks in (config.k, config.completed_k))
    ways = f", with k = {ks} and with k = {completed_ks} completed" if completed_ks else f" and with k = {ks}"
    return (
        f"{source.name} now reads {config.num_tokens:,} tokens of {text.source}, with full attention{ways}, in "
        f"{counted(config.rounds, 'round')}. Each of the {counted(len(missing), 'run')} loads the model in a fresh "
        "process and measures one forward pass."
    )


def _make_runs(
    record: Json,
    missing: Sequence[Turn],
    source: ModelSource,
    input_ids: list[int],
    config: DemoConfig,
    console: Console,
) -> None:
    from rich.markup import escape

    with progress_bar(console) as bar:
        task = bar.add_task("", total=len(missing))
        for number, turn in enumerate(missing):
            name = run_name(turn.k, config.num_tokens, completed=turn.completed)
            described = f"round {turn.round} of {config.rounds}, {name}"
            bar.update(task, description=described, completed=number)

            def on_message(message: Json, number: int = number) -> None:
                bar.update(task, completed=number + message["done"])

            request = {
                "model": vars(source),
                "k": turn.k,
                "completion": completion_to_json(Completion()) if turn.completed else None,
                "windows": [input_ids],
                "threads": record["config"]["threads"],
                "seed": record["config"]["seed"],
                "backend": record["config"]["backend"],
            }
            with failures_named(name):
                run = run_in_fresh_process(
                    f"{__name__}:measure_run", request, on_message=on_message, memory_in_use=True
                )
            record["model"]["num_parameters"] = run.pop("num_parameters")
            record["runs"].append({"round": turn.round, "completed": turn.completed} | run | {"date": now()})
            write_json(config.record, record)
            bar.update(task, completed=number + 1)
            bar.console.print(
                f"{escape(described)}: perplexity {run['perplexity']:.2f}, {run['elapsed_s']:.1f} s, "
                f"{run['peak_mib']:,.0f} MiB",
                highlight=False,
                soft_wrap=True,
            )


def _show(record: Json, console: Console, say: Say) -> None:
    title = f"{record['model']['name']}, {record['config']['num_tokens']:,} tokens"
    headings, *rows = table_rows(record)
    print_table(console, title, headings, rows)
    say(f"Peak memory is counted above the loaded model. {summary(record)}")
    note = busy_note([run.get("other_cores") for run in record["runs"]], record["environment"]["num_cpus"])
    if note is not None:
        say(note)
