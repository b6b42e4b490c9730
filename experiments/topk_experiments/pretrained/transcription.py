"""What a speech model hears with few keys: one recording, transcribed with full attention and with several k, each in a
fresh process.

A transcript is appended to the record as soon as it is there, so that an interrupted run continues with the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from topk_attention.backends import choose_backend
from topk_attention.convert import convert, is_cross_attention, is_self_attention
from topk_attention.environment import environment

from ..models.pretrained import ModelSource, Say, find_model, load_feature_extractor, load_model, load_tokenizer
from ..models.speech import read_recording, transcribe, word_errors, words
from ..runs.checks import check_at_least, check_runs
from ..runs.memory import PeakMeter
from ..runs.process import Send, WorkerError, run_in_fresh_process
from ..runs.progress import progress_bar
from ..runs.records import SAME_ENVIRONMENT, Json, append_json_line, read_json_lines, write_whole
from ..runs.timing import Stopwatch, busy_note
from .demo_report import run_name

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = "topk_attention/transcription/1"
DEFAULT_K = (32, 64, 128)
DEFAULT_OUT = Path("results/whisper")
LAYERS = ("encoder", "cross", "decoder")
_AUTO_CLASS = "AutoModelForSpeechSeq2Seq"


@dataclass(frozen=True)
class TranscriptionConfig:
    """What is transcribed, and how; paths and the model as the user wrote them.

    layers  which attention layers keep k keys: "encoder", "cross" and "decoder" (its own tokens)

    >>> TranscriptionConfig(model="openai/whisper-base", audio=Path("talk.flac"), layers=("encoder", "all"))
    Traceback (most recent call last):
    ValueError: layers must be among encoder, cross, decoder, got all
    """

    model: str
    audio: Path
    k: Sequence[int] = DEFAULT_K
    layers: Sequence[str] = ("encoder", "cross")
    language: str | None = None
    out: Path = DEFAULT_OUT
    seed: int = 0
    threads: int | None = None
    backend: str = "auto"
    fresh: bool = False

    def __post_init__(self) -> None:
        check_runs(self.k, self.backend)
        check_at_least(1, self, "threads")
        if unknown := [name for name in self.layers if name not in LAYERS]:
            raise ValueError(f"layers must be among {', '.join(LAYERS)}, got {', '.join(unknown)}")
        if not self.layers:
            raise ValueError(f"layers must name at least one of {', '.join(LAYERS)}")


def run_transcription(config: TranscriptionConfig, console: Console) -> list[Json]:
    """Make every transcript that is not there yet, append each to `transcripts.jsonl`, and show them beside full
    attention's.

    Returns the records of all transcripts asked for, full attention's first.

    Raises:
        ValueError: the model or the recording do not fit; the message says how.
        FileNotFoundError: there is no such recording.
        WorkerError: a transcript failed; those before it are kept.
    """
    say: Say = lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True)  # noqa: E731
    lines, page = config.out / "transcripts.jsonl", config.out / "transcripts.md"
    source = find_model(config.model, say)
    before = [] if config.fresh else read_json_lines(lines)
    here = environment()
    records: list[Json] = []
    with progress_bar(console) as bar:
        task = bar.add_task("", total=1 + len(config.k))
        for number, k in enumerate((None, *config.k)):
            bar.update(task, description=run_name(k), completed=number)
            run = _describe(config, source, k)
            record = _find(before, run, here)
            if record is None:

                def on_message(message: Json, number: int = number) -> None:
                    bar.update(task, completed=number + message["done"])

                record = {"schema": SCHEMA, "run": run, "environment": environment()}
                record |= _measure(config, source, k, on_message)
                heard, expected = words(record["transcript"]), words((records or [record])[0]["transcript"])
                record |= {"num_words": len(heard), "word_errors": word_errors(heard, expected)}
                append_json_line(lines, record)
                there = ""
            else:
                there = f" (there already, of {record['environment']['date']})"
            records.append(record)
            bar.console.print(f"{run_name(k)}: {_difference(record, records[0])}{there}", markup=False, soft_wrap=True)
        bar.update(task, completed=1 + len(config.k))
    write_whole(page, as_markdown(records))
    _show(records, console)
    say(f"Records: {lines}")
    say(f"Page:    {page}")
    return records


def measure_transcript(request: Json, send: Send) -> Json:
    """One transcript, in a process of its own: load the model, convert it for a k, listen."""
    import torch

    torch.set_num_threads(request["threads"])
    torch.manual_seed(request["seed"])
    source = ModelSource(**request["model"])
    model, tokenizer = load_model(source, _AUTO_CLASS), load_tokenizer(source)
    feature_extractor = load_feature_extractor(source)
    recording = read_recording(Path(request["audio"]), feature_extractor.sampling_rate)
    num_layers = 0
    if request["k"] is not None:
        chosen = request["layers"]
        report = convert(
            model,
            attention_k=request["k"],
            where=lambda path, module: layer_kind(path, module) in chosen,
            backend=request["backend"],
        )
        num_layers = len(report.replaced)
    with PeakMeter() as meter, Stopwatch() as stopwatch:
        transcript = transcribe(
            model,
            tokenizer,
            feature_extractor,
            recording,
            language=request["language"],
            progress=lambda done, total: send({"done": done / total}),
        )
    return {
        "transcript": transcript,
        "num_converted_layers": num_layers,
        "audio_s": recording.seconds,
        "audio_sha256": recording.sha256,
        "elapsed_s": stopwatch.elapsed_s,
        "other_cores": stopwatch.other_cores,
        "peak_mib": meter.read().peak_mib,
        "memory_method": meter.read().method,
    }


def layer_kind(path: str, module: nn.Module) -> str | None:
    """Which of LAYERS an attention layer is."""
    if is_cross_attention(path, module):
        return "cross"
    if not is_self_attention(path, module):
        return None
    return "encoder" if "encoder" in path.split(".") else "decoder"


def as_markdown(records: Sequence[Json]) -> str:
    """A table with a row for each transcript, and how it came about."""
    run, here = records[0]["run"], records[0]["environment"]
    layers = " and ".join(records[-1]["run"]["layers"])
    lines = [
        f"{run['model']['name']} on {run['audio']} ({records[0]['audio_s']:.1f} s), k in {layers} attention "
        f"({records[-1]['num_converted_layers']} layers), {run['threads']} threads, float32, PyTorch {here['torch']}, "
        f"{here['date'][:10]}, commit {here['commit']}. Words that differ are counted against full attention's: "
        "replaced, put in or left out, without case and punctuation (as a share: the word error rate).",
        "",
        "| attention | words that differ | time [s] | transcript |",
        "|---|---|---|---|",
    ]
    for record in records:
        lines.append(
            f"| {run_name(record['run']['k'])} | {_difference(record, records[0])} | {record['elapsed_s']:.1f} | "
            f"{record['transcript'].replace('|', chr(92) + '|')} |"
        )
    note = _busy(records)
    return "\n".join(lines + ([] if note is None else ["", note])) + "\n"


def _describe(config: TranscriptionConfig, source: ModelSource, k: int | None) -> Json:
    """What has to agree for two runs to be the same."""
    import torch

    stamp = config.audio.stat() if config.audio.is_file() else None
    if stamp is None:
        raise FileNotFoundError(f"audio file not found: {config.audio}")
    return {
        "model": {"name": source.name, "revision": source.revision},
        "audio": config.audio.name,
        "audio_bytes": stamp.st_size,
        "k": k,
        "layers": [] if k is None else [name for name in LAYERS if name in config.layers],
        "language": config.language,
        "threads": config.threads or torch.get_num_threads(),
        "backend": None if k is None else choose_backend(config.backend).name,
        "seed": config.seed,
    }


def _find(records: Sequence[Json], run: Json, here: Json) -> Json | None:
    """The newest record of this run that was made with this software on this processor."""
    for record in reversed(records):
        there = record.get("environment", {})
        if record.get("run") == run and all(there.get(name) == here[name] for name in SAME_ENVIRONMENT):
            return record
    return None


def _measure(config: TranscriptionConfig, source: ModelSource, k: int | None, on_message: Send) -> Json:
    request = {
        "model": vars(source),
        "audio": str(config.audio),
        "language": config.language,
        "k": k,
        "layers": list(config.layers),
        "threads": _describe(config, source, k)["threads"],
        "seed": config.seed,
        "backend": config.backend,
    }
    try:
        return run_in_fresh_process(f"{__name__}:measure_transcript", request, on_message=on_message)
    except WorkerError as error:
        raise WorkerError(error.outcome, f"{run_name(k)} failed ({error.outcome}): {error}") from error


def _difference(record: Json, full: Json) -> str:
    if record is full:
        return f"{full['num_words']} words"
    errors, num_words = record["word_errors"], full["num_words"]
    return f"{errors} of {num_words} ({100 * errors / max(1, num_words):.1f} %)"


def _show(records: Sequence[Json], console: Console) -> None:
    from rich.markup import escape
    from rich.table import Table

    run = records[0]["run"]
    table = Table(title=escape(f"{run['model']['name']}, {run['audio']}"), title_justify="left")
    for heading in ("attention", "words that differ", "time [s]", "peak memory [MiB]", "transcript"):
        table.add_column(escape(heading), justify="left" if heading in ("attention", "transcript") else "right")
    for record in records:
        table.add_row(
            run_name(record["run"]["k"]),
            _difference(record, records[0]),
            f"{record['elapsed_s']:.1f}",
            f"{record['peak_mib']:,.0f}",
            escape(record["transcript"]),
        )
    console.print(table)
    if (note := _busy(records)) is not None:
        console.print(note, markup=False, highlight=False, soft_wrap=True)


def _busy(records: Sequence[Json]) -> str | None:
    return busy_note([record["other_cores"] for record in records], records[0]["environment"]["num_cpus"])
