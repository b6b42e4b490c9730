"""What a stand-in for dropped neurons is worth: one model reads one text in full, and with some k of its neurons.

For each k the dropped neurons are left out, or a stand-in of each rank, fitted on other text, takes their place. Each k
has a process of its own, in which one of the model's layers is timed too. The record is written after each k.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from topk_attention.backends import choose_backend
from topk_attention.calibrate import StandIns, fit_stand_ins
from topk_attention.convert import convert
from topk_attention.convert.search import feed_forward_sites
from topk_attention.environment import now
from topk_attention.files import check_writable
from topk_attention.nn import TopKFeedForward

from ..models.pretrained import ModelSource, find_model, load_config, load_model_to_run, load_tokenizer, unpacked
from ..models.text import Text, first_tokens, perplexity, read_text
from ..runs.checks import check_at_least, check_different, check_runs
from ..runs.files import damage_named
from ..runs.ledger import experiment_environment, record_of_same_run
from ..runs.process import Send, failures_named, run_in_fresh_process
from ..runs.progress import line_printer, progress_bar
from ..runs.records import Json, write_json
from ..runs.timing import Stopwatch
from .calibration_windows import cut, text_from
from .stand_ins_report import RECORD, run_name, show, write_report

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = "topk_attention/stand-ins/1"
DEFAULT_OUT = Path("results/stand-ins")
# A layer is timed this often with each stand-in, in turns.
_TIMED_ROUNDS = 15


@dataclass(frozen=True)
class StandInsConfig:
    """What is fitted and read; paths and the model as the user wrote them.

    start            character of the text at which the windows to fit on begin; num_tokens each, windows of them
    evaluate_start   character at which the one window to read begins
    evaluate_tokens  its length
    k                neurons kept
    ranks            of the stand-ins, each tried with each k; 0 is a constant

    >>> StandInsConfig(ranks=(0, -1))
    Traceback (most recent call last):
    ValueError: rank must be at least 0, got -1
    """

    model: str | None = None
    text: Path | None = None
    start: int = 0
    num_tokens: int = 1024
    windows: int = 8
    evaluate_start: int = 100_000
    evaluate_tokens: int = 4096
    k: Sequence[int] = (768, 384, 192)
    ranks: Sequence[int] = (0, 64)
    out: Path = DEFAULT_OUT
    seed: int = 0
    threads: int | None = None
    backend: str = "auto"
    fresh: bool = False

    def __post_init__(self) -> None:
        check_runs(self.k, self.backend)
        check_at_least(0, self, "start", "evaluate_start")
        check_at_least(1, self, "windows", "threads")
        check_at_least(2, self, "num_tokens", "evaluate_tokens")
        if not self.ranks:
            raise ValueError("rank must hold at least one number, got none")
        for rank in self.ranks:
            if rank < 0:
                raise ValueError(f"rank must be at least 0, got {rank}")
        check_different("rank", self.ranks)

    @property
    def record(self) -> Path:
        return self.out / RECORD


def run_stand_ins(config: StandInsConfig, console: Console) -> Json:
    """Make every run that is not on file yet, write the table, and return the record.

    Raises:
        ValueError: the model, the text, a k or a rank do not fit; the message says how.
        FileNotFoundError: there is no such text file.
        WorkerError: a run failed. The k before it are kept.
    """
    say = line_printer(console)
    text = read_text(config.text)
    source = find_model(config.model, say)
    check_writable("out", config.record)
    fields = ("schema", "config", "model", "text")
    new = _new_record(config, source, text)
    old = record_of_same_run(config.record, new, fields, fresh=config.fresh, say=say, as_planned=lambda record: record)
    record = new if old is None else old
    with damage_named(config.record, "move it away or give another --out"):
        finished = {run["k"] for run in record["runs"]}
    missing = [k for k in (None, *config.k) if k not in finished]
    if missing:
        source = unpacked(source, config.out / "work" / "model", say)
        _check_sizes(config, source)
        fitted_on, read = _windows(config, source, text)
        with progress_bar(console) as bar:
            task = bar.add_task("", total=len(missing))
            for number, k in enumerate(missing):
                bar.update(task, description=run_name(k, None), completed=number)
                request = {
                    "model": vars(source),
                    "k": k,
                    "ranks": list(config.ranks),
                    "fitted_on": fitted_on,
                    "read": read,
                    "threads": record["config"]["threads"],
                    "seed": config.seed,
                    "backend": record["config"]["backend"],
                }

                def on_message(message: Json, number: int = number) -> None:
                    bar.update(task, completed=number + message["done"])

                with failures_named(run_name(k, None)):
                    result = run_in_fresh_process(f"{__name__}:measure_k", request, on_message=on_message)
                record["runs"] += [run | {"date": now()} for run in result["runs"]]
                write_json(config.record, record)
                bar.update(task, completed=number + 1)
    page = write_report(record, config.out)
    show(record, console)
    say(f"Record: {config.record}")
    say(f"Table:  {page}")
    return record


def measure_k(request: Json, send: Send) -> Json:
    """All runs of one k in a process of its own: without a stand-in and with those of each rank; k None: in full."""
    torch.set_num_threads(request["threads"])
    torch.manual_seed(request["seed"])
    model = load_model_to_run(ModelSource(**request["model"]))
    read = torch.tensor([request["read"]])
    k, ranks = request["k"], request["ranks"]
    if k is None:
        return {"runs": [{"k": None, "rank": None, "perplexity": perplexity(model, read)}]}
    batches = [torch.tensor([window]) for window in request["fitted_on"]]
    runs: list[Json] = []
    fitted: dict[int, StandIns] = {}
    for rank in ranks:
        with Stopwatch() as stopwatch:
            fitted[rank] = fit_stand_ins(model, batches, feed_forward_k=k, rank=rank)
        runs.append({"k": k, "rank": rank, "fit_s": stopwatch.elapsed_s})
        send({"done": len(runs) / (2 * len(ranks) + 2)})
    runs.insert(0, {"k": k, "rank": None})
    layers = []
    for number, run in enumerate(runs, 1):
        stand_ins = k if run["rank"] is None else fitted[run["rank"]]
        report = convert(model, feed_forward_k=stand_ins, backend=request["backend"])
        path = report.replaced[len(report.replaced) // 2].path
        layers.append(model.get_submodule(path))
        run["perplexity"] = perplexity(model, read)
        send({"done": (len(ranks) + number) / (2 * len(ranks) + 2)})
    if all(isinstance(layer, TopKFeedForward) for layer in layers):  # otherwise another module computes the network
        times_of_layers = _layer_times(layers, len(request["read"]), model.config.hidden_size)
        for run, times in zip(runs, times_of_layers, strict=True):
            run["layer_s"] = times
    return {"runs": runs}


@torch.no_grad()
def _layer_times(layers: Sequence[nn.Module], num_tokens: int, width: int) -> list[dict[str, float]]:
    """For each layer the median time of a forward pass [s] by the number of tokens; the layers take turns.

    One token at a time is not measured: the layers share their weights, and the first in turn would load them alone.
    """
    x = torch.randn(1, num_tokens, width)
    taken: list[list[float]] = [[] for _ in layers]
    for _ in range(_TIMED_ROUNDS):
        for layer, of_layer in zip(layers, taken, strict=True):
            with Stopwatch() as stopwatch:
                layer(x)
            of_layer.append(stopwatch.elapsed_s)
    return [{str(num_tokens): statistics.median(of_layer)} for of_layer in taken]


def _new_record(config: StandInsConfig, source: ModelSource, text: Text) -> Json:
    return {
        "schema": SCHEMA,
        "config": {
            "start": config.start,
            "num_tokens": config.num_tokens,
            "windows": config.windows,
            "evaluate_start": config.evaluate_start,
            "evaluate_tokens": config.evaluate_tokens,
            "k": list(config.k),
            "ranks": list(config.ranks),
            "seed": config.seed,
            "threads": config.threads or torch.get_num_threads(),
            "backend": choose_backend(config.backend).name,
            "dtype": "float32",
        },
        "model": {"name": source.name, "revision": source.revision},
        "text": {"source": text.source, "sha256": text.sha256, "num_characters": len(text.content)},
        "environment": experiment_environment(Path(__file__).parent),
        "runs": [],
    }


def _check_sizes(config: StandInsConfig, source: ModelSource) -> None:
    """Look at the model's sizes alone, before any run.

    Raises:
        ValueError: a k leaves no neuron out, or a rank is larger than a layer allows; the message names the option.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(load_config(source))
    sites = [site for site in feed_forward_sites(model) if site.num_neurons]
    if not sites:
        return  # the first run says what the model has instead
    neurons, width = max(site.num_neurons for site in sites), min(min(site.sizes) for site in sites)
    if max(config.k) >= neurons:
        raise ValueError(
            f"k must be below {neurons}, the neurons of a layer of {source.name}, to leave some out, got "
            f"{max(config.k)}"
        )
    if max(config.ranks) > width:
        raise ValueError(
            f"rank must be at most {width}, the width of a layer of {source.name}, got {max(config.ranks)}"
        )


def _windows(config: StandInsConfig, source: ModelSource, text: Text) -> tuple[list[list[int]], list[int]]:
    """The token ids to fit on and those to read.

    Raises:
        ValueError: the text is too short, or the two overlap.
    """
    tokenizer = load_tokenizer(source)
    ids = first_tokens(text_from(text, config.start), tokenizer, config.num_tokens * config.windows)[0].tolist()
    read = first_tokens(text_from(text, config.evaluate_start), tokenizer, config.evaluate_tokens)[0].tolist()
    ends = config.start + len(tokenizer.decode(ids)), config.evaluate_start + len(tokenizer.decode(read))
    if config.evaluate_start < ends[0] and config.start < ends[1]:
        raise ValueError(
            f"evaluate-start must leave out what is fitted on, characters {config.start:,} to {ends[0]:,}, got "
            f"{config.evaluate_start:,} with {config.evaluate_tokens:,} tokens, to {ends[1]:,}"
        )
    return cut(ids, config.num_tokens), read
