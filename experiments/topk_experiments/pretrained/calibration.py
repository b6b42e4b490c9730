"""Calibration from the command line: measure what each head needs on one text, then try the k found on another text.

Every calibrated k stands beside one k for every head. A causal language model is judged by its perplexity, an encoder
by how far its sentence embeddings move. The measurement and every evaluation run in a process of their own. The
measurement is written before anything is evaluated, and the record after every run, so that an interrupted calibration
continues where it stopped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from topk_attention.backends import choose_backend
from topk_attention.calibrate import Calibration, LossIncrease
from topk_attention.environment import now
from topk_attention.files import check_writable
from topk_attention.functional.words import full_attention_note

from ..models.pretrained import ModelSource, find_model, unpacked
from ..models.text import Text, read_text
from ..runs.files import damage_named
from ..runs.ledger import experiment_environment, record_of_same_run
from ..runs.process import failures_named, run_in_fresh_process
from ..runs.progress import Say, line_printer, progress_bar
from ..runs.records import Json, differences, write_json, write_whole
from .calibration_measures import measure_of
from .calibration_report import html_page, run_name, show
from .calibration_settings import (
    AFTER,
    CalibrationConfig,
    Point,
    check_budget,
    evaluation_start,
    measure_for,
    points_of,
    with_defaults,
)
from .calibration_windows import Windows
from .calibration_workers import EVALUATE, MEASURE, save, target_json

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = "topk_attention/calibration/1"
# Fields that are known only after a run.
_KNOWN_LATER = ("overlaps_calibration", "num_parameters")


def run_calibration(config: CalibrationConfig, console: Console) -> Json:
    """Measure and evaluate what is not on file yet, write calibration, record and report, and return the record.

    Raises:
        ValueError: the model, a text, a k or the target does not fit; the message says how.
        FileNotFoundError: there is no such text file.
        WorkerError: a run failed. The measurement and the runs before it are kept.
    """
    say = line_printer(console)
    text = read_text(config.text)
    evaluate_text = text if config.evaluate_text is None else read_text(config.evaluate_text)
    source = find_model(config.model, say)
    config = with_defaults(config, source)
    for name, path in (("out", config.out), ("report", config.report), ("records", config.record)):
        check_writable(name, path)
    notes: list[str] = []  # said only when it is certain that what is missing can be measured
    record = _start_or_continue(_new_record(config, source, text, evaluate_text), config, notes.append)
    calibration = _measured_before(record, config, notes.append)
    windows: Windows | None = None
    if calibration is None:
        source = unpacked(source, config.records / "work" / "model", say)
        check_budget(config)
        windows = Windows.read(config, source, text, evaluate_text)
    for note in notes:
        say(note)
    if calibration is None:
        assert windows is not None
        calibration = _measure(record, config, source, windows, console)
    points = points_of(calibration, config, say)
    with damage_named(config.record, "move it away or give another --out"):
        finished = [run["key"] for run in record["runs"]]
    missing = [point for point in points if point.key not in finished]
    if missing:
        if windows is None:
            source = unpacked(source, config.records / "work" / "model", say)
            windows = Windows.read(config, source, text, evaluate_text)
        _evaluate(record, missing, source, windows, config, console)
    else:
        say(f"All {len(points)} runs are in {config.record} already; --fresh makes them again.")
    keys = [point.key for point in points]
    shown = record | {"runs": [run for run in record["runs"] if run["key"] in keys]}
    write_whole(config.report, html_page(shown, calibration, config.out.name))
    show(shown, console)
    for name, path in (("Calibration", config.out), ("Record", config.record), ("Report", config.report)):
        say(f"{name + ':':<13}{path}")
    return shown


def _new_record(config: CalibrationConfig, source: ModelSource, text: Text, evaluate_text: Text) -> Json:
    def described(text: Text) -> Json:
        return {"text": text.source, "text_sha256": text.sha256}

    calibrated_on = described(text) | {
        "start": config.start,
        "num_tokens": config.num_tokens,
        "windows": config.windows,
        "feed_forward_mean_k": config.feed_forward_mean_k,
        "target": repr(config.target),
    }
    if config.completion is not None:
        calibrated_on["completion"] = config.completion
    evaluated_on = described(evaluate_text) | {
        "start": evaluation_start(config),
        "num_tokens": config.evaluate_tokens,
        "windows": config.evaluate_windows,
    }
    if evaluated_on["start"] == AFTER:
        evaluated_on["first_token"] = (config.num_tokens or 0) * (config.windows or 0)
        evaluated_on["first_character"] = config.start
    return {
        "schema": SCHEMA,
        "measure": measure_for(source),
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
        "environment": experiment_environment(Path(__file__).parent),
        "runs": [],
    }


def _start_or_continue(new: Json, config: CalibrationConfig, say: Say) -> Json:
    """The new record, with the measurement and the runs on file that still count."""
    old = record_of_same_run(
        config.record,
        new,
        ("schema", "measure", "config", "model"),
        fresh=config.fresh,
        say=say,
        as_planned=lambda record: record | {"model": _section(record, "model")},
    )
    if old is None:
        return new
    # Measurements serve every target but one that is searched for: another budget is only another choice of k.
    ignored = () if isinstance(config.target, LossIncrease) else ("target",)
    if changed := _changed(old, new, "calibrated_on", ignored):
        say(f"Measuring anew ({'; '.join(changed)}).")
    else:
        new["measurement"] = old.get("measurement")
        new["model"] = old["model"]
    if changed := _changed(old, new, "evaluated_on"):
        say(f"Evaluating anew ({'; '.join(changed)}).")
    else:
        new["evaluated_on"], new["runs"] = old["evaluated_on"], old["runs"]
    return new


def _changed(old: Json, new: Json, name: str, ignored: Sequence[str] = ()) -> list[str]:
    """What differs in a section of two records, in words."""
    return differences({name: _section(old, name, ignored)}, {name: _section(new, name, ignored)})


def _section(record: Json, name: str, ignored: Sequence[str] = ()) -> Json:
    """A section of a record without what is known only after a run."""
    left_out = (*_KNOWN_LATER, *ignored)
    return {field: value for field, value in record.get(name, {}).items() if field not in left_out}


def _measured_before(record: Json, config: CalibrationConfig, say: Say) -> Calibration | None:
    """The calibration on file for the target asked for; None if it is not the one that the record names."""
    measurement = record["measurement"]
    if measurement is None or not config.out.is_file() or _sha256(config.out) != measurement["sha256"]:
        record["measurement"] = None
        return None
    say(f"Measured already: {config.out}; --fresh measures again.")
    calibration = Calibration.load(config.out)
    if calibration.about.get("target") != repr(config.target):
        assert not isinstance(config.target, LossIncrease)
        calibration = calibration.reallocated(config.target)
        save(calibration, config.out)
        record["measurement"] = measurement | {
            "sha256": _sha256(config.out),
            "mean_k": calibration.mean_k,
            "search": None,
        }
        write_json(config.record, record)
    return calibration


def _measure(
    record: Json, config: CalibrationConfig, source: ModelSource, windows: Windows, console: Console
) -> Calibration:
    request = {
        "model": vars(source),
        "measure": record["measure"],
        "windows": windows.calibration,
        "target": target_json(config.target),
        "feed_forward_mean_k": config.feed_forward_mean_k,
        "completion": config.completion,
        "threads": record["config"]["threads"],
        "seed": record["config"]["seed"],
        "out": str(config.out),
        "about": {"model": record["model"]["name"], **record["calibrated_on"], "date": now()},
    }
    with progress_bar(console) as bar:
        task = bar.add_task("measuring", total=1)
        result = run_in_fresh_process(
            MEASURE,
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


def _evaluate(
    record: Json,
    missing: Sequence[Point],
    source: ModelSource,
    windows: Windows,
    config: CalibrationConfig,
    console: Console,
) -> None:
    from rich.markup import escape

    record["evaluated_on"]["overlaps_calibration"] = windows.overlap
    measure = measure_of(record)
    ks = [point.attention_k for point in missing if isinstance(point.attention_k, int)]
    if note := full_attention_note(ks, max(map(len, windows.evaluation))):
        line_printer(console)(note)
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
                "completion": point.completion,
                "windows": windows.evaluation,
                "threads": record["config"]["threads"],
                "seed": record["config"]["seed"],
                "backend": record["config"]["backend"],
            }
            with failures_named(name):
                run = run_in_fresh_process(
                    EVALUATE[record["measure"]], request, on_message=on_message, memory_in_use=True
                )
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


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
