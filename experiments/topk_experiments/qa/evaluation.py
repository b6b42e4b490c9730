"""Zero-shot evaluation: one model answers sets of questions, in full and with several k.

Each point (a model, a k, a set) has a process of its own, which hands back its answers batch by batch. They are kept in
a file of their own until the point is done and its record is written, so that an interrupted evaluation goes on with
the next batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from topk_attention.backends import choose_backend
from topk_attention.environment import environment

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
from ..models.settings import Setting, convert_model, setting_name
from ..runs.checks import check_at_least
from ..runs.process import Send, WorkerError, run_in_fresh_process
from ..runs.progress import progress_bar
from ..runs.records import Json, append_json_line, read_json_lines
from ..runs.timing import Stopwatch
from .points import find_record, in_words, key_of, packed
from .readers import READERS, reader_name, scores
from .tasks import Question, QuestionSet, read_questions

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = "topk_attention/qa-evaluation/1"
DEFAULT_OUT = Path("results/qa")
RECORDS = "evaluations.jsonl"
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class EvaluationConfig:
    """What is evaluated; paths and names as the user wrote them.

    datasets  files, folders or ids, see `read_questions`
    settings  the k to run with
    limit     questions of each set, drawn at random; None: all
    shots     solved examples before each question, drawn from the same set (decoder models alone)
    """

    datasets: Sequence[str]
    settings: Sequence[Setting] = (Setting(),)
    model: str | None = None
    limit: int | None = None
    shots: int = 0
    seed: int = 0
    out: Path = DEFAULT_OUT
    threads: int | None = None
    backend: str = "auto"
    dtype: str = "float32"
    fresh: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be {' or '.join(DTYPES)}, got {self.dtype!r}")
        check_at_least(1, self, "limit", "threads")
        check_at_least(0, self, "shots")
        for name in ("datasets", "settings"):
            if not getattr(self, name):
                raise ValueError(f"there is nothing to evaluate: give at least one of {name}")
        choose_backend(self.backend)


@dataclass(frozen=True)
class _Point:
    """One record to make. `record` has all that tells it from others."""

    setting: Setting
    questions: list[Question]
    examples: list[Question]
    record: Json

    def __str__(self) -> str:
        return f"{self.record['questions']['name']}, {setting_name(self.record['setting'])}"


def run_evaluation(config: EvaluationConfig, console: Console) -> list[Json]:
    """Evaluate every point that is not there yet, append each to `evaluations.jsonl`, and return those asked for.

    Raises:
        ValueError: the model, a set or a k does not fit; the message says how.
        FileNotFoundError: there is no such file.
        WorkerError: a point failed; points and batches before it are kept.
    """
    say: Say = lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True)  # noqa: E731
    lines = config.out / RECORDS
    source = find_model(config.model, say)
    sets = [read_questions(dataset) for dataset in config.datasets]
    source = unpacked(source, config.out / "work" / source.name, say)
    points = _new_points(config, source, sets)
    before = [] if config.fresh else read_json_lines(lines)
    records = []
    for number, point in enumerate(points, 1):
        told = f"[{number}/{len(points)}] {point}"
        record = find_record(before, point.record)
        if record is None:
            record = _evaluate(point, source, config, told, console)
            append_json_line(lines, record)
            (config.out / "work" / f"{key_of(point.record)}.jsonl").unlink(missing_ok=True)
            say(f"{told}: {in_words(record)}")
        else:
            say(f"{told}: {in_words(record)} (there already, of {record['environment']['date']})")
        records.append(record)
    say(f"Records: {lines}")
    return records


def evaluate_point(request: Json, send: Send) -> Json:
    """One point, in a process of its own: load the model, convert it, and send the answers of every batch."""
    torch.set_num_threads(request["threads"])
    reader = READERS[request["reader"]]
    source = ModelSource(**request["model"])
    model, tokenizer = load_model(source, reader.auto_class, request["dtype"]), load_tokenizer(source)
    convert_model(model, request["convert"], request["backend"])
    questions = {number: Question.from_json(question) for number, question in request["questions"]}
    examples = [Question.from_json(example) for example in request["examples"]]
    batches = reader.answers(model, tokenizer, questions, examples, request["shots"])
    while True:
        with Stopwatch() as stopwatch:
            batch = next(batches, None)
        if batch is None:
            return {}
        send({"answers": [[number, answer] for number, answer in batch.items()], "elapsed_s": stopwatch.elapsed_s})


def _new_points(config: EvaluationConfig, source: ModelSource, sets: Sequence[QuestionSet]) -> list[_Point]:
    name = reader_name(load_config(source))
    if config.shots and not READERS[name].takes_examples:
        raise ValueError(f"shots must be 0 for {source.name}, which takes no examples, got {config.shots}")
    here = environment()
    points = []
    for some in sets:
        shuffled = some.shuffled(config.seed)
        questions = shuffled[: config.limit]
        for setting in config.settings:
            record = {
                "schema": SCHEMA,
                "model": {"name": source.name, "revision": source.revision},
                "questions": some.describe() | {"asked": len(questions), "seed": config.seed},
                "protocol": READERS[name].protocol | {"reader": name, "shots": config.shots},
                "setting": setting.describe(),
                "run": {
                    "backend": choose_backend(config.backend).name,
                    "threads": config.threads or torch.get_num_threads(),
                    "dtype": config.dtype,
                },
                "environment": here,
            }
            examples = shuffled[::-1][: 2 * config.shots]
            points.append(_Point(setting, questions, examples, record))
    return points


def _evaluate(point: _Point, source: ModelSource, config: EvaluationConfig, told: str, console: Console) -> Json:
    """Ask what was not asked before the last interruption, and score all answers."""
    from rich.markup import escape

    reader = READERS[point.record["protocol"]["reader"]]
    lengths = reader.lengths(load_tokenizer(source), point.questions, point.examples, config.shots)
    longest = longest_input(load_config(source))
    if longest is not None and max(lengths.tokens) > longest:
        raise ValueError(
            f"{point.record['questions']['name']} has a question of {max(lengths.tokens):,} tokens with its examples, "
            f"and {source.name} takes {longest:,}"
        )
    partial = config.out / "work" / f"{key_of(point.record)}.jsonl"
    if config.fresh:
        partial.unlink(missing_ok=True)
    lines = read_json_lines(partial)
    done = {number for line in lines for number, _ in line["answers"]}
    request = {
        "reader": point.record["protocol"]["reader"],
        "model": vars(source),
        "convert": point.setting.for_convert(),
        "questions": [[number, asdict(q)] for number, q in enumerate(point.questions) if number not in done],
        "examples": [asdict(example) for example in point.examples],
        "shots": config.shots,
        "threads": point.record["run"]["threads"],
        "backend": point.record["run"]["backend"],
        "dtype": config.dtype,
    }
    with progress_bar(console) as bar:
        task = bar.add_task(escape(told), total=len(point.questions), completed=len(done))

        def on_message(message: Json) -> None:
            append_json_line(partial, message)
            lines.append(message)
            bar.advance(task, len(message["answers"]))

        if request["questions"]:
            try:
                run_in_fresh_process(f"{__name__}:evaluate_point", request, on_message=on_message)
            except WorkerError as error:
                raise WorkerError(error.outcome, f"{told} failed ({error.outcome}): {error}") from error
    answers = {number: answer for line in lines for number, answer in line["answers"]}
    outcomes = reader.outcomes(point.questions, [answers[number] for number in range(len(point.questions))])
    return point.record | {
        "scores": scores(outcomes),
        "outcomes": {name: packed(values) for name, values in outcomes.items()},
        "lengths": lengths.describe(point.record["setting"]["attention_k"]),
        "elapsed_s": sum(line["elapsed_s"] for line in lines),
        "environment": environment(),
    }
