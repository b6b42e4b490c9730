"""Which parts of the demo are missing. Each has a process of its own; the record is written when it finishes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from topk_attention.backends import choose_backend
from topk_attention.environment import now
from topk_attention.files import check_writable
from topk_attention.functional.checks import check_count

from ...models.generation import plain_ids, user_turn
from ...models.pretrained import ModelSource, find_model, load_config, load_tokenizer, longest_input, unpacked
from ...models.text import Text, first_tokens, read_text
from ...runs.checks import check_at_least
from ...runs.ledger import experiment_environment, record_of_same_run
from ...runs.process import failures_named, run_in_fresh_process
from ...runs.progress import line_printer
from ...runs.records import Json, write_json
from ...show.console import print_table
from . import operations, quality, reading, training
from .report import RECORD, SCHEMA, in_words, summary, table_rows, write_report

if TYPE_CHECKING:
    from rich.console import Console

DEFAULT_OUT = Path("build/demo")
# Of the default text, whose first page answers it.
_QUESTION = "What does the assert statement do? Answer in one sentence."
_QUESTION_OF_OTHERS = "What is this text about? Answer in one sentence."
# The parts, in their order: name -> (what it does, the function that measures it).
PARTS = {
    "reading": ("reads a document and answers", f"{reading.__name__}:measure"),
    "operations": ("times the operations", f"{operations.__name__}:measure"),
    "quality": ("measures perplexity", f"{quality.__name__}:measure"),
    "training": ("fine-tunes a cut of the model", f"{training.__name__}:measure"),
}


@dataclass(frozen=True)
class DemoConfig:
    """What the demo shows; paths and the model as the user wrote them.

    num_tokens        of the document
    following_tokens  of the real text after it, whose perplexity is measured
    answer_tokens     generated, at most
    num_keys          cached keys of the decoding operation
    length            of the training operations
    read_tokens       of the window whose perplexity is compared
    ks                keys per query in that comparison
    calibrate_tokens  of the window that the calibrated k come from
    train_tokens      of a window of fine-tuning; loss_tokens of them at its end have a loss
    layers            of the model that are fine-tuned

    >>> DemoConfig(k=0)
    Traceback (most recent call last):
    ValueError: k must be at least 1 and below 2^31, got 0
    """

    model: str | None = None
    text: Path | None = None
    question: str | None = None
    num_tokens: int = 7900
    k: int = 64
    out: Path = DEFAULT_OUT
    seed: int = 0
    threads: int | None = None
    backend: str = "auto"
    fresh: bool = False
    following_tokens: int = 128
    answer_tokens: int = 48
    num_keys: int = 32768
    length: int = 8192
    rounds: int = 3
    read_tokens: int = 1536
    ks: tuple[int, ...] = (16, 64)
    calibrate_tokens: int = 768
    train_tokens: int = 2048
    loss_tokens: int = 128
    train_steps: int = 5
    layers: int = 3

    def __post_init__(self) -> None:
        check_count("k", self.k)
        check_at_least(1, self, "threads", "rounds", "layers", "train_steps", "following_tokens")
        if self.num_tokens <= reading.SHORT:
            raise ValueError(f"tokens must be above {reading.SHORT}, got {self.num_tokens}")
        check_count("tokens", self.num_tokens)
        choose_backend(self.backend)

    @property
    def record(self) -> Path:
        return self.out / RECORD

    @property
    def num_threads(self) -> int:
        return self.threads or torch.get_num_threads()


def run_demo(config: DemoConfig, console: Console) -> Json:
    """Run every part that is not on file yet, write the results, and return the record.

    Raises:
        ValueError: the model, the text or the k do not fit; the message says how.
        FileNotFoundError: there is no such text file.
        WorkerError: a part failed. The parts before it are kept.
    """
    say = line_printer(console)
    text = read_text(config.text)
    source = find_model(config.model, say)
    check_writable("out", config.record)
    new = _new_record(config, source, text)
    fields = ("schema", "config", "model", "text")
    old = record_of_same_run(config.record, new, fields, fresh=config.fresh, say=say, as_planned=lambda record: record)
    record = new if old is None else old
    missing = [name for name in PARTS if name not in record["parts"]]
    if missing:
        loadable = unpacked(source, config.out / "work" / "model", say)
        requests = _requests(config, loadable, text)
        say(f"{source.name}, {config.num_threads} CPU threads, in {len(missing)} of {len(PARTS)} parts:")
        for name in missing:
            _run_part(name, requests[name], record, config, console)
    else:
        say(f"All {len(PARTS)} parts are in {config.record} already; --fresh runs them again.")
        for name in PARTS:
            say(in_words(name, record))
    written = write_report(record, config.out)
    headings, *rows = table_rows(record)
    print_table(console, "Times faster than full attention", headings, rows)
    for sentence in summary(record):
        say(f"- {sentence}")
    for path in (config.record, *written):
        say(f"Written: {path}")
    return record


def _run_part(name: str, request: Json, record: Json, config: DemoConfig, console: Console) -> None:
    what, function = PARTS[name]
    number = f"[{list(PARTS).index(name) + 1}/{len(PARTS)}]"
    with console.status(f"{number} {what} ...") as status, failures_named(f"the part that {what}"):

        def on_message(message: Json) -> None:
            status.update(f"{number} {what}: {message['doing']} ...")

        # Freed memory goes back at once, so that peaks are what the calls use.
        result = run_in_fresh_process(function, request, on_message=on_message, memory_in_use=name != "reading")
    record["parts"][name] = result | {"date": now()}
    write_json(config.record, record)
    console.print(f"{number} {in_words(name, record)}", markup=False, highlight=False, soft_wrap=True)


def _new_record(config: DemoConfig, source: ModelSource, text: Text) -> Json:
    told = asdict(config)
    for name in ("model", "text", "out", "fresh"):  # which model and text they were stands beside it
        del told[name]
    return {
        "schema": SCHEMA,
        "config": told
        | {
            "ks": list(config.ks),
            "question": _question(config),
            "threads": config.num_threads,
            "backend": choose_backend(config.backend).name,
            "dtype": "float32",
        },
        "model": {"name": source.name, "revision": source.revision},
        "text": {"source": text.source, "sha256": text.sha256, "num_characters": len(text.content)},
        "environment": experiment_environment(Path(__file__).parent),
        "parts": {},
    }


def _question(config: DemoConfig) -> str:
    return config.question or (_QUESTION if config.text is None else _QUESTION_OF_OTHERS)


def _requests(config: DemoConfig, source: ModelSource, text: Text) -> dict[str, Json]:
    """What each part is asked for.

    Raises:
        ValueError: the text is too short, or the model takes shorter inputs.
    """
    tokenizer = load_tokenizer(source)
    frame = user_turn(tokenizer, "", f"\n\n{_question(config)}")
    before, question = (plain_ids(tokenizer, part) for part in frame)
    after = max(config.following_tokens, len(question) + config.answer_tokens)
    limit = longest_input(load_config(source))
    if limit is not None and config.num_tokens + after > limit:
        raise ValueError(
            f"tokens must be at most {limit - after}, the longest input of {source.name} less {after} for question and "
            f"answer, got {config.num_tokens}"
        )
    windows = config.train_tokens * config.train_steps
    evaluated = config.calibrate_tokens + config.read_tokens
    read = config.num_tokens + config.following_tokens
    ids = first_tokens(text, tokenizer, max(read, windows, evaluated))[0].tolist()
    document = before + ids[: config.num_tokens - len(before)]
    following = ids[config.num_tokens - len(before) :][: config.following_tokens]
    shared = {"threads": config.num_threads, "seed": config.seed, "backend": choose_backend(config.backend).name}
    shared |= {"k": config.k, "model": vars(source)}
    evaluate_from = config.calibrate_tokens
    return {
        "reading": shared
        | {
            "document": document,
            "following": following,
            "question": question,
            "answer_tokens": config.answer_tokens,
        },
        "operations": shared | {"num_keys": config.num_keys, "length": config.length, "rounds": config.rounds},
        "quality": shared
        | {
            "ks": list(config.ks),
            "calibrated_on": ids[:evaluate_from],
            "window": ids[evaluate_from:evaluated],
        },
        "training": shared
        | {
            "layers": config.layers,
            "loss_tokens": config.loss_tokens,
            "windows": [ids[start : start + config.train_tokens] for start in range(0, windows, config.train_tokens)],
        },
    }
