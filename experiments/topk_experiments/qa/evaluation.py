"""Zero-shot evaluation: one model answers sets of questions, in full and with several k.

Each point (a model, a k, a set) runs in a process of its own, which sends its answers batch by batch. The answers are
kept in a file until the point is finished and its record is written. An interrupted evaluation continues with the next
batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from topk_attention.backends import choose_backend
from topk_attention.environment import now

from ..models.pretrained import (
    ModelSource,
    find_model,
    load_config,
    load_model_to_run,
    load_tokenizer,
    longest_input,
    unpacked,
)
from ..models.settings import Setting, convert_model, setting_name
from ..runs.checks import check_at_least
from ..runs.files import damage_named
from ..runs.ledger import Ledger, made_when
from ..runs.process import Send, failures_named, run_in_fresh_process
from ..runs.progress import line_printer, progress_bar
from ..runs.records import Json, append_json_line, read_json_lines
from ..runs.timing import Stopwatch
from .points import configuration, in_words, packed, work_name
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
    limit     number of questions of each set, drawn at random; None: all
    shots     solved examples before each question, drawn from the same set (for decoder models only)
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
    """One record to make. `record` holds its configuration."""

    setting: Setting
    questions: list[Question]
    examples: list[Question]
    record: Json

    def __str__(self) -> str:
        return f"{self.record['questions']['name']}, {setting_name(self.record['setting'])}"


def run_evaluation(config: EvaluationConfig, console: Console) -> list[Json]:
    """Evaluate every point that is not on file yet, append it to `evaluations.jsonl`, and return the points asked for.

    Raises:
        ValueError: the model, a set or a k does not fit; the message says how.
        FileNotFoundError: there is no such file.
        WorkerError: a point failed. The points and batches before it are kept.
    """
    say = line_printer(console)
    source = find_model(config.model, say)
    sets = [read_questions(dataset) for dataset in config.datasets]
    source = unpacked(source, config.out / "work" / source.name, say)
    ledger = Ledger(config.out / RECORDS, schema=SCHEMA, folder=Path(__file__).parent, fresh=config.fresh)
    points = _new_points(config, source, sets, ledger.here)
    records = []
    for number, point in enumerate(points, 1):
        label = f"[{number}/{len(points)}] {point}"
        record = ledger.find(configuration(point.record))
        if record is None:
            if note := ledger.why_not(configuration(point.record)):
                say(f"{label}: {note}")
            record = _evaluate(point, source, config, label, console)
            ledger.append(record)
            _answers_so_far(config, point).unlink(missing_ok=True)
            say(f"{label}: {in_words(record)}")
        else:
            say(f"{label}: {in_words(record)} ({made_when(record)})")
        records.append(record)
    say(f"Records: {config.out / RECORDS}")
    return records


def evaluate_point(request: Json, send: Send) -> Json:
    """One point in a process of its own: load the model, convert it, and send the answers of every batch."""
    torch.set_num_threads(request["threads"])
    reader = READERS[request["reader"]]
    source = ModelSource(**request["model"])
    model, tokenizer = load_model_to_run(source, reader.auto_class, request["dtype"]), load_tokenizer(source)
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


def _new_points(config: EvaluationConfig, source: ModelSource, sets: Sequence[QuestionSet], here: Json) -> list[_Point]:
    name = reader_name(load_config(source))
    if config.shots and not READERS[name].takes_examples:
        raise ValueError(f"shots must be 0 for {source.name}, which takes no examples, got {config.shots}")
    points = []
    for question_set in sets:
        shuffled = question_set.shuffled(config.seed)
        questions = shuffled[: config.limit]
        for setting in config.settings:
            record = {
                "schema": SCHEMA,
                "model": {"name": source.name, "revision": source.revision},
                "questions": question_set.describe() | {"asked": len(questions), "seed": config.seed},
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


def _answers_so_far(config: EvaluationConfig, point: _Point) -> Path:
    """The file that keeps the answers of an unfinished point."""
    return config.out / "work" / f"{work_name(point.record)}.jsonl"


def _evaluate(point: _Point, source: ModelSource, config: EvaluationConfig, label: str, console: Console) -> Json:
    """Ask the questions that have no answer on file yet, and score all answers."""
    from rich.markup import escape

    reader = READERS[point.record["protocol"]["reader"]]
    lengths = reader.lengths(load_tokenizer(source), point.questions, point.examples, config.shots)
    longest = longest_input(load_config(source))
    if longest is not None and max(lengths.tokens) > longest:
        raise ValueError(
            f"{point.record['questions']['name']} has a question of {max(lengths.tokens):,} tokens with its examples, "
            f"and {source.name} takes {longest:,}"
        )
    partial = _answers_so_far(config, point)
    if config.fresh:
        partial.unlink(missing_ok=True)
    lines = read_json_lines(partial)
    with damage_named(partial, "delete it to ask these questions again"):
        done = {number for line in lines for number, _ in line["answers"]}
        if lines and not 0 <= min(done, default=0) <= max(done, default=0) < len(point.questions):
            raise ValueError(f"there are {len(point.questions)} questions, got numbers up to {max(done)}")
        sum(line["elapsed_s"] for line in lines)
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
        task = bar.add_task(escape(label), total=len(point.questions), completed=len(done))

        def on_message(message: Json) -> None:
            append_json_line(partial, message)
            lines.append(message)
            bar.advance(task, len(message["answers"]))

        if request["questions"]:
            with failures_named(label):
                run_in_fresh_process(f"{__name__}:evaluate_point", request, on_message=on_message)
    answers = {number: answer for line in lines for number, answer in line["answers"]}
    outcomes = reader.outcomes(point.questions, [answers[number] for number in range(len(point.questions))])
    return point.record | {
        "scores": scores(outcomes),
        "outcomes": {name: packed(values) for name, values in outcomes.items()},
        "lengths": lengths.describe(point.record["setting"]["attention_k"]),
        "elapsed_s": sum(line["elapsed_s"] for line in lines),
        "environment": point.record["environment"] | {"date": now()},
    }
