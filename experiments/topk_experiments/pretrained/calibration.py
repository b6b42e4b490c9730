"""Calibration from the command line: measure what each head needs on one text, then read another one to see what the k
found there are worth, beside one k for every head. A causal language model is judged by its perplexity, an encoder by
how far its sentence embeddings move.

Measuring and every evaluation have a process of their own. What was measured is written before anything is evaluated,
and the record after every run, so that an interrupted calibration continues where it stopped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from topk_attention.backends import choose_backend
from topk_attention.calibrate import Calibration, LossIncrease, LostMass, MeanK, calibrate
from topk_attention.environment import environment, now
from topk_attention.files import check_writable
from topk_attention.functional.checks import check_count

from ..models.pretrained import (
    ModelSource,
    Say,
    find_model,
    is_encoder,
    load_config,
    load_model,
    load_tokenizer,
    longest_input,
    unpacked,
)
from ..models.sentence_embedding import embedding_error, embedding_of, first_windows, hidden_states
from ..models.text import Text, first_tokens, read_text
from ..runs.memory import PeakMeter
from ..runs.process import Send, WorkerError, run_in_fresh_process
from ..runs.progress import progress_bar
from ..runs.records import SAME_ENVIRONMENT, Json, differences, read_json, write_json, write_whole
from ..runs.timing import Stopwatch
from . import demo
from .calibration_measures import measure_of
from .calibration_report import html_page, recommendation, run_name, table_rows

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = "topk_attention/calibration/1"
RECORDS = Path("results/calibration")
_DEFAULT_TARGET = MeanK(64.0)
_AFTER = "after the calibration windows"
# Of a language model and of an encoder, unless something else is asked for. One window of an encoder is one vector.
_DEFAULT_TOKENS = 2048
_DEFAULT_WINDOWS = {"perplexity": 1, "embedding_error": 16}
_WINDOWS_AT_A_TIME = 8
# What is known only once a run was made, or does not bear on it.
_NO_IDENTITY = ("overlaps_calibration", "num_parameters")


@dataclass(frozen=True)
class CalibrationConfig:
    """What a calibration runs; paths and the model as the user wrote them.

    text, start, num_tokens, windows  calibrate on so many windows of a text, from this character on. Without numbers:
                   2,048 tokens or as many as the model takes; one window, for an encoder 16
    uniform        k for every head to compare with; None: the mean k of the calibrated points
    mean_ks        mean k of calibrated points beside the target's; None: half and twice that
    evaluate_text, evaluate_start, evaluate_tokens, evaluate_windows  windows of a text to read with every k. Without
                   a text and a start: what comes after the calibration windows; as long as those

    >>> CalibrationConfig(target=MeanK(64), num_tokens=1)
    Traceback (most recent call last):
    ValueError: tokens must be at least 2, got 1
    """

    model: str | None = None
    text: Path | None = None
    start: int = 0
    num_tokens: int | None = None
    windows: int | None = None
    target: MeanK | LostMass | LossIncrease = _DEFAULT_TARGET
    feed_forward_mean_k: float | None = None
    uniform: Sequence[int] | None = None
    mean_ks: Sequence[int] | None = None
    evaluate_text: Path | None = None
    evaluate_start: int | None = None
    evaluate_tokens: int | None = None
    evaluate_windows: int | None = None
    report: Path = RECORDS / "calibration.html"
    out: Path = RECORDS / "calibration.json"
    records: Path = RECORDS
    seed: int = 0
    threads: int | None = None
    backend: str = "auto"
    fresh: bool = False

    def __post_init__(self) -> None:
        for name, number, least in (
            ("tokens", self.num_tokens, 2),
            ("evaluate-tokens", self.evaluate_tokens, 2),
            ("windows", self.windows, 1),
            ("evaluate-windows", self.evaluate_windows, 1),
            ("start", self.start, 0),
            ("evaluate-start", self.evaluate_start, 0),
            ("threads", self.threads, 1),
        ):
            if number is not None and number < least:
                raise ValueError(f"{name} must be at least {least}, got {number}")
        for name, ks in (("uniform", self.uniform), ("also-mean-k", self.mean_ks)):
            for k in ks or ():
                check_count(name, k)
        if self.report == self.out:
            raise ValueError(f"report and out must be two files, got {self.out} for both")
        choose_backend(self.backend)

    @property
    def record(self) -> Path:
        return self.records / f"{self.out.stem}.record.json"


@dataclass(frozen=True)
class Point:
    """One way to run the model: `convert(model, attention_k=..., feed_forward_k=...)`; None leaves a kind alone."""

    kind: str  # "full", "uniform" or "calibrated"
    attention_k: int | dict[str, list[int]] | None = None
    feed_forward_k: int | dict[str, int] | None = None

    @property
    def key(self) -> str:
        """The same for the same k: such a run need not be made again."""
        ks = json.dumps([self.attention_k, self.feed_forward_k], sort_keys=True)
        return hashlib.sha256(ks.encode()).hexdigest()[:16]

    def describe(self) -> Json:
        return {
            "key": self.key,
            "kind": self.kind,
            "mean_k": _mean(self.attention_k),
            "feed_forward_mean_k": _mean(self.feed_forward_k),
        }


def run_calibration(config: CalibrationConfig, console: Console) -> Json:
    """Do what is not done yet, write the calibration, the record and the report, and return the record.

    Raises:
        ValueError: the model, a text, a k or the target does not fit; the message says how.
        FileNotFoundError: there is no such text file.
        WorkerError: a run failed; what was measured and the runs before it are kept.
    """
    say: Say = lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True)  # noqa: E731
    text = read_text(config.text)
    evaluate_text = text if config.evaluate_text is None else read_text(config.evaluate_text)
    source = find_model(config.model, say)
    config = _with_defaults(config, source)
    for name, path in (("out", config.out), ("report", config.report), ("records", config.record)):
        check_writable(name, path)
    notes: list[str] = []  # said only once it is certain that what is missing can be measured
    record = _start_or_continue(_new_record(config, source, text, evaluate_text), config, notes.append)
    calibration = _measured_before(record, config, notes.append)
    windows: _Windows | None = None
    if calibration is None:
        source = unpacked(source, config.records / "work" / "model", say)
        _check_budget(config)
        windows = _Windows.read(config, source, text, evaluate_text)
    for note in notes:
        say(note)
    if calibration is None:
        assert windows is not None
        calibration = _measure(record, config, source, windows, console)
    points = _points(calibration, config, say)
    missing = [point for point in points if point.key not in [run["key"] for run in record["runs"]]]
    if missing:
        if windows is None:
            source = unpacked(source, config.records / "work" / "model", say)
            windows = _Windows.read(config, source, text, evaluate_text)
        _evaluate(record, missing, source, windows, config, console)
    else:
        say(f"All {len(points)} runs are in {config.record} already; --fresh makes them again.")
    shown = record | {"runs": _in_order(record["runs"], points)}
    shown["target_key"] = next(point.key for point in points if point.kind == "calibrated")
    write_whole(config.report, html_page(shown, calibration, config.out.name))
    _show(shown, config, console, say)
    return shown


def _check_budget(config: CalibrationConfig) -> None:
    tokens = config.num_tokens or 0
    if isinstance(config.target, MeanK) and config.target.mean_k > tokens:
        raise ValueError(
            f"mean-k must be at most {tokens}, the tokens of a window, where it is full attention, got "
            f"{config.target.mean_k:g}; give a smaller one, or more --tokens"
        )


def measure_calibration(request: Json, send: Send) -> Json:
    """In a process of its own: load the model, calibrate it, and write the calibration to request["out"]."""
    import torch

    torch.set_num_threads(request["threads"])
    torch.manual_seed(request["seed"])
    encoder = request["measure"] == "embedding_error"
    model = load_model(ModelSource(**request["model"]), "AutoModel" if encoder else "AutoModelForCausalLM")
    feed_forward_mean_k = request["feed_forward_mean_k"]
    windows, at_a_time = request["windows"], _WINDOWS_AT_A_TIME if encoder else 1
    with PeakMeter() as meter, Stopwatch() as stopwatch:
        calibration = calibrate(
            model,
            [torch.tensor(windows[first : first + at_a_time]) for first in range(0, len(windows), at_a_time)],
            objective=(lambda output, batch: embedding_of(output)) if encoder else None,
            target=_target(request["target"]),
            feed_forward_target=None if feed_forward_mean_k is None else MeanK(feed_forward_mean_k),
            progress=lambda what, done, total: send({"what": what, "done": done / total}),
        )
    _save(replace(calibration, about=calibration.about | request["about"]), Path(request["out"]))
    return {
        "loss": calibration.about.get("loss"),
        "search": calibration.about.get("search"),
        "mean_k": calibration.mean_k,
        "elapsed_s": stopwatch.elapsed_s,
        "peak_mib": meter.read().peak_mib,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def measure_embeddings(request: Json, send: Send) -> Json:
    """In a process of its own: embed every window with full attention, then with a k, and compare."""
    import torch

    from topk_attention.convert import convert

    torch.set_num_threads(request["threads"])
    torch.manual_seed(request["seed"])
    model = load_model(ModelSource(**request["model"]), "AutoModel")
    windows = request["windows"]
    expected = hidden_states(
        model, windows, batch_size=_WINDOWS_AT_A_TIME, progress=lambda done, total: send({"done": done / total / 2})
    )
    if request["k"] is not None or request["feed_forward_k"] is not None:
        convert(model, attention_k=request["k"], feed_forward_k=request["feed_forward_k"], backend=request["backend"])
    with PeakMeter() as meter, Stopwatch() as stopwatch:
        ours = hidden_states(
            model,
            windows,
            batch_size=_WINDOWS_AT_A_TIME,
            progress=lambda done, total: send({"done": (1 + done / total) / 2}),
        )
    memory = meter.read()
    vectors = embedding_of([ours]), embedding_of([expected])
    return {
        "attn_implementation": model.config._attn_implementation,
        "hidden_error": ((ours - expected).norm() / expected.norm()).item(),
        "embedding_error": embedding_error(*vectors),
        "cosine": (vectors[0] * vectors[1]).sum(1).double().mean().item(),
        "elapsed_s": stopwatch.elapsed_s,
        "other_cores": stopwatch.other_cores,
        "peak_mib": memory.peak_mib,
        "baseline_mib": memory.baseline_mib,
        "total_peak_mib": memory.total_peak_mib,
        "memory_method": memory.method,
    }


# By what a model is judged -> the worker that does it.
_WORKERS = {"perplexity": f"{demo.__name__}:measure_run", "embedding_error": f"{__name__}:measure_embeddings"}


@dataclass(frozen=True)
class _Windows:
    """Token ids to calibrate on, and to evaluate on."""

    calibration: list[list[int]]
    evaluation: list[list[int]]
    overlap: bool

    @staticmethod
    def read(config: CalibrationConfig, source: ModelSource, text: Text, evaluate_text: Text) -> _Windows:
        model_config = load_config(source)
        limit = longest_input(model_config)
        for name, number in (("tokens", config.num_tokens), ("evaluate-tokens", config.evaluate_tokens)):
            if limit is not None and number is not None and number > limit:
                raise ValueError(f"{name} must be at most {limit}, the longest input of {source.name}, got {number}")
        tokenizer = load_tokenizer(source)
        read = _encoder_windows if is_encoder(model_config) else _language_model_windows
        return read(config, tokenizer, text, evaluate_text)


def _language_model_windows(config: CalibrationConfig, tokenizer: Any, text: Text, evaluate_text: Text) -> _Windows:
    num_tokens, num_windows = config.num_tokens or 0, config.windows or 0
    evaluate_tokens, evaluate_windows = config.evaluate_tokens or 0, config.evaluate_windows or 0
    num_measured, num_read = num_tokens * num_windows, evaluate_tokens * evaluate_windows
    after = _evaluation_start(config) == _AFTER
    ids = first_tokens(_from(text, config.start), tokenizer, num_measured + (num_read if after else 0))[0].tolist()
    measured, rest = ids[:num_measured], ids[num_measured:]
    overlap = False
    if not after:
        begin = config.evaluate_start or 0
        rest = first_tokens(_from(evaluate_text, begin), tokenizer, num_read)[0].tolist()
        ends = config.start + len(tokenizer.decode(measured)), begin + len(tokenizer.decode(rest))
        overlap = text.sha256 == evaluate_text.sha256 and begin < ends[0] and config.start < ends[1]
    return _Windows(_cut(measured, num_tokens), _cut(rest, evaluate_tokens), overlap)


def _encoder_windows(config: CalibrationConfig, tokenizer: Any, text: Text, evaluate_text: Text) -> _Windows:
    measured, num_characters = first_windows(
        _from(text, config.start), tokenizer, config.windows or 0, config.num_tokens or 0
    )
    end = config.start + num_characters
    begin = end if _evaluation_start(config) == _AFTER else config.evaluate_start or 0
    rest, num_read = first_windows(
        _from(evaluate_text, begin), tokenizer, config.evaluate_windows or 0, config.evaluate_tokens or 0
    )
    overlap = text.sha256 == evaluate_text.sha256 and begin < end and config.start < begin + num_read
    return _Windows(measured, rest, overlap)


def _cut(ids: list[int], num_tokens: int) -> list[list[int]]:
    return [ids[first : first + num_tokens] for first in range(0, len(ids), num_tokens)]


def _with_defaults(config: CalibrationConfig, source: ModelSource) -> CalibrationConfig:
    """With numbers of tokens and windows that fit the model where none were given."""
    limit, windows = None, 1
    if source.gguf_file is None:  # packed weights hold a language model, and say how long its input is once unpacked
        model_config = load_config(source)
        limit, windows = longest_input(model_config), _DEFAULT_WINDOWS[_measure_for(source)]
    tokens = min(_DEFAULT_TOKENS, limit or _DEFAULT_TOKENS)
    return replace(
        config,
        num_tokens=config.num_tokens or tokens,
        windows=config.windows or windows,
        evaluate_tokens=config.evaluate_tokens or config.num_tokens or tokens,
        evaluate_windows=config.evaluate_windows or windows,
    )


def _measure_for(source: ModelSource) -> str:
    return "embedding_error" if source.gguf_file is None and is_encoder(load_config(source)) else "perplexity"


def _from(text: Text, start: int) -> Text:
    if start >= len(text.content):
        raise ValueError(f"{text.source} has {len(text.content):,} characters, so none from {start:,} on")
    return Text(text.content[start:], text.source if start == 0 else f"{text.source} from character {start:,}")


def _evaluation_start(config: CalibrationConfig) -> int | str:
    if config.evaluate_text is None and config.evaluate_start is None:
        return _AFTER
    return config.evaluate_start or 0


def _new_record(config: CalibrationConfig, source: ModelSource, text: Text, evaluate_text: Text) -> Json:
    import torch

    def described(text: Text) -> Json:
        return {"text": text.source, "text_sha256": text.sha256}

    calibrated_on = described(text) | {
        "start": config.start,
        "num_tokens": config.num_tokens,
        "windows": config.windows,
        "feed_forward_mean_k": config.feed_forward_mean_k,
        "target": repr(config.target),
    }
    evaluated_on = described(evaluate_text) | {
        "start": _evaluation_start(config),
        "num_tokens": config.evaluate_tokens,
        "windows": config.evaluate_windows,
    }
    if evaluated_on["start"] == _AFTER:
        evaluated_on["first_token"] = (config.num_tokens or 0) * (config.windows or 0)
        evaluated_on["first_character"] = config.start
    return {
        "schema": SCHEMA,
        "measure": _measure_for(source),
        "config": {
            "seed": config.seed,
            "threads": config.threads or torch.get_num_threads(),
            "backend": choose_backend(config.backend).name,
            "dtype": "float32",
        },
        "model": {"name": source.name, "revision": source.revision},
        "calibrated_on": calibrated_on,
        "evaluated_on": evaluated_on,
        "measurement": None,
        "environment": environment(),
        "runs": [],
    }


def _start_or_continue(new: Json, config: CalibrationConfig, say: Say) -> Json:
    """The new record with what still holds of the one on disk."""
    old = read_json(config.record)
    if old is None:
        return new
    if config.fresh:
        say(f"Starting anew as asked: {config.record} is replaced.")
        return new
    if changed := differences(_identity(old), _identity(new)):
        say(f"{config.record} was made with another configuration and is replaced ({'; '.join(changed)}).")
        return new
    # Measurements hold for any target but a searched one: they can be spent anew.
    ignored = () if isinstance(config.target, LossIncrease) else ("target",)
    if changed := differences(_section(old, "calibrated_on", ignored), _section(new, "calibrated_on", ignored)):
        say(f"Measuring anew ({'; '.join(changed)}).")
    else:
        new["measurement"] = old.get("measurement")
        new["model"] = old["model"]
    if changed := differences(_section(old, "evaluated_on"), _section(new, "evaluated_on")):
        say(f"Evaluating anew ({'; '.join(changed)}).")
    else:
        new["evaluated_on"], new["runs"] = old["evaluated_on"], old["runs"]
    return new


def _identity(record: Json) -> Json:
    """What has to agree for two runs to stand in one table."""
    environment_of_record = record.get("environment", {})
    return (
        {"schema": record.get("schema"), "measure": record.get("measure")}
        | _section(record, "config")
        | _section(record, "model")
        | {name: environment_of_record.get(name) for name in SAME_ENVIRONMENT}
    )


def _section(record: Json, name: str, ignored: Sequence[str] = ()) -> Json:
    fields = record.get(name, {})
    return {f"{name} {field}": value for field, value in fields.items() if field not in (*_NO_IDENTITY, *ignored)}


def _measured_before(record: Json, config: CalibrationConfig, say: Say) -> Calibration | None:
    """The calibration on disk where it is the record's, for the target asked for."""
    measurement = record["measurement"]
    if measurement is None or not config.out.is_file() or _sha256(config.out) != measurement["sha256"]:
        record["measurement"] = None
        return None
    say(f"Measured already: {config.out}; --fresh measures again.")
    calibration = Calibration.load(config.out)
    if calibration.about.get("target") != repr(config.target):
        assert not isinstance(config.target, LossIncrease)
        calibration = calibration.reallocated(config.target)
        _save(calibration, config.out)
        record["measurement"] = measurement | {
            "sha256": _sha256(config.out),
            "mean_k": calibration.mean_k,
            "search": None,
        }
        write_json(config.record, record)
    return calibration


def _measure(
    record: Json, config: CalibrationConfig, source: ModelSource, windows: _Windows, console: Console
) -> Calibration:
    request = {
        "model": vars(source),
        "measure": record["measure"],
        "windows": windows.calibration,
        "target": _target_json(config.target),
        "feed_forward_mean_k": config.feed_forward_mean_k,
        "threads": record["config"]["threads"],
        "seed": record["config"]["seed"],
        "out": str(config.out),
        "about": {"model": record["model"]["name"], **record["calibrated_on"], "date": now()},
    }
    with progress_bar(console) as bar:
        task = bar.add_task("measuring", total=1)
        result = run_in_fresh_process(
            f"{__name__}:measure_calibration",
            request,
            on_message=lambda message: bar.update(task, description=message["what"], completed=message["done"]),
        )
        bar.update(task, completed=1)
    record["model"]["num_parameters"] = result.pop("num_parameters")
    record["measurement"] = result | {"sha256": _sha256(config.out), "date": now()}
    write_json(config.record, record)
    console.print(
        f"measured: {result['mean_k']:.1f} keys a head on average, {result['elapsed_s']:.1f} s, "
        f"{result['peak_mib']:,.0f} MiB",
        highlight=False,
        soft_wrap=True,
    )
    return Calibration.load(config.out)


def _points(calibration: Calibration, config: CalibrationConfig, say: Say) -> list[Point]:
    """What to run: full attention, the calibration itself, other budgets, and one k for every head."""
    mean_k = calibration.mean_k
    largest_k = max(curves.ks[-1] for curves in calibration.curves.values())
    wanted = config.mean_ks if config.mean_ks is not None else [round(mean_k / 2), round(2 * mean_k)]
    others = [k for k in wanted if 1 <= k <= largest_k]
    if left_out := [k for k in wanted if k > largest_k]:
        say(f"Left out: mean k = {_commas(left_out)}, above {largest_k:,}, the largest k that was measured.")
    uniform = config.uniform if config.uniform is not None else sorted({*others, max(1, round(mean_k))})
    points = [Point("full"), _calibrated(calibration)]
    points += [_calibrated(calibration.reallocated(MeanK(k))) for k in others]
    points += [Point("uniform", k) for k in uniform]
    if calibration.feed_forward:
        neurons = dict(calibration.feed_forward)
        mean_neurons = round(sum(neurons.values()) / len(neurons))
        points.append(Point("calibrated", None, neurons))
        points.append(Point("uniform", None, dict.fromkeys(neurons, mean_neurons)))
        points.append(replace(_calibrated(calibration), feed_forward_k=neurons))
    return list({point.key: point for point in reversed(points)}.values())[::-1]


def _calibrated(calibration: Calibration) -> Point:
    return Point("calibrated", {path: list(ks) for path, ks in calibration.items()})


def _evaluate(
    record: Json,
    missing: Sequence[Point],
    source: ModelSource,
    windows: _Windows,
    config: CalibrationConfig,
    console: Console,
) -> None:
    from rich.markup import escape

    record["evaluated_on"]["overlaps_calibration"] = windows.overlap
    measure = measure_of(record)
    with progress_bar(console) as bar:
        task = bar.add_task("", total=len(missing))
        for number, point in enumerate(missing):
            described = point.describe()
            name = run_name(described)
            bar.update(task, description=f"{escape(name)} ({number + 1} of {len(missing)})", completed=number)

            def on_message(message: Json, number: int = number) -> None:
                bar.update(task, completed=number + message["done"])

            request = {
                "model": vars(source),
                "k": point.attention_k,
                "feed_forward_k": point.feed_forward_k,
                "windows": windows.evaluation,
                "threads": record["config"]["threads"],
                "seed": record["config"]["seed"],
                "backend": record["config"]["backend"],
            }
            try:
                run = run_in_fresh_process(
                    _WORKERS[record["measure"]], request, on_message=on_message, memory_in_use=True
                )
            except WorkerError as error:
                raise WorkerError(error.outcome, f"{name} failed ({error.outcome}): {error}") from error
            for field in ("k", "num_parameters"):
                run.pop(field, None)
            record["runs"].append(described | run | {"date": now()})
            write_json(config.record, record)
            bar.update(task, completed=number + 1)
            bar.console.print(
                f"{escape(name)}: {measure.name} {measure.number(run)}, {run['elapsed_s']:.1f} s",
                highlight=False,
                soft_wrap=True,
            )


def _show(record: Json, config: CalibrationConfig, console: Console, say: Say) -> None:
    from rich.markup import escape
    from rich.table import Table

    title = f"{escape(record['model']['name'])}, {record['evaluated_on']['num_tokens']:,} tokens"
    table = Table(title=title, title_justify="left")
    headings, *rows = table_rows(record)
    for heading in headings:
        table.add_column(escape(heading), justify="left" if heading == headings[0] else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    say(recommendation(record))
    say(f"Calibration: {config.out}")
    say(f"Record:      {config.record}")
    say(f"Report:      {config.report}")


def _in_order(runs: Sequence[Json], points: Sequence[Point]) -> list[Json]:
    """The runs of these points: full attention, then by k with rivals side by side, then those that choose neurons."""
    keys = [point.key for point in points]

    def place(run: Json) -> tuple[bool, float, str]:
        return run["feed_forward_mean_k"] is not None, round(run["mean_k"] or 0), run["kind"]

    return sorted((run for run in runs if run["key"] in keys), key=place)


def _mean(ks: int | dict[str, Any] | None) -> float | None:
    if ks is None or isinstance(ks, int):
        return ks
    flat = [k for entry in ks.values() for k in (entry if isinstance(entry, list) else [entry])]
    return sum(flat) / len(flat)


def _target_json(target: MeanK | LostMass | LossIncrease) -> list[Any]:
    return [type(target).__name__, target.mean_k if isinstance(target, MeanK) else target.bound]


def _target(stored: Sequence[Any]) -> MeanK | LostMass | LossIncrease:
    name, number = stored
    kinds: dict[str, type[MeanK] | type[LostMass] | type[LossIncrease]]
    kinds = {kind.__name__: kind for kind in (MeanK, LostMass, LossIncrease)}
    return kinds[name](number)


def _save(calibration: Calibration, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    calibration.save(partial)
    partial.replace(path)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _commas(numbers: Sequence[int]) -> str:
    return ", ".join(f"{number:,}" for number in numbers)
