"""Transcripts of one recording by a speech model, with full attention and with several k, each in a fresh process.

Each transcript is appended to the records as soon as it is finished; an interrupted run continues with the next one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from topk_attention import Completion
from topk_attention.backends import choose_backend
from topk_attention.convert import convert, is_cross_attention, is_self_attention

from ..models.pretrained import (
    ModelSource,
    find_model,
    load_config,
    load_feature_extractor,
    load_model_to_run,
    load_tokenizer,
)
from ..models.speech import encoded, read_recording, transcribe, word_errors, words
from ..runs.checks import check_at_least, check_ks, check_runs
from ..runs.ledger import Ledger, made_when
from ..runs.memory import PeakMeter
from ..runs.process import Send, failures_named, run_in_fresh_process
from ..runs.progress import line_printer, progress_bar
from ..runs.records import Json
from ..runs.timing import Stopwatch
from .transcription_report import PAGE, RECORDS, difference, name_of_run, show, write_report

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = "topk_attention/transcription/1"
DEFAULT_K = (32, 64, 128)
DEFAULT_OUT = Path("results/whisper")
LAYERS = ("encoder", "cross", "decoder")
_AUTO_CLASS = "AutoModelForSpeechSeq2Seq"


@dataclass(frozen=True)
class TranscriptionConfig:
    """What is transcribed and how; paths and the model as the user wrote them.

    k            keys kept per query
    completed_k  keys kept per query where the others enter its softmax as one entry
    layers       which attention layers keep k keys: "encoder", "cross" and "decoder" (its own tokens)

    >>> TranscriptionConfig(model="openai/whisper-base", audio=Path("talk.flac"), layers=("encoder", "all"))
    Traceback (most recent call last):
    ValueError: layers must be among encoder, cross, decoder, got all
    """

    model: str
    audio: Path
    k: Sequence[int] = DEFAULT_K
    completed_k: Sequence[int] = ()
    layers: Sequence[str] = ("encoder", "cross")
    language: str | None = None
    out: Path = DEFAULT_OUT
    seed: int = 0
    threads: int | None = None
    backend: str = "auto"
    fresh: bool = False

    def __post_init__(self) -> None:
        check_runs(self.k, self.backend)
        check_ks("completed-k", self.completed_k)
        check_at_least(1, self, "threads")
        if unknown := [name for name in self.layers if name not in LAYERS]:
            raise ValueError(f"layers must be among {', '.join(LAYERS)}, got {', '.join(unknown)}")
        if not self.layers:
            raise ValueError(f"layers must name at least one of {', '.join(LAYERS)}")


def run_transcription(config: TranscriptionConfig, console: Console) -> list[Json]:
    """Make every transcript that is not on file yet and compare all of them with full attention's.

    Appends to `transcripts.jsonl` and writes `transcripts.md`. Returns the records asked for, full attention's first.

    Raises:
        ValueError: the model or the recording do not fit; the message says how.
        FileNotFoundError: there is no such recording.
        WorkerError: a transcript failed. Those before it are kept.
    """
    say = line_printer(console)
    source = find_model(config.model, say)
    ledger = Ledger(config.out / RECORDS, schema=SCHEMA, folder=Path(__file__).parent, fresh=config.fresh)
    num_keys = _most_keys(load_config(source), config.layers)
    records: list[Json] = []
    runs = [_describe(config, source, k) for k in (None, *config.k)]
    runs += [_describe(config, source, k) | {"completed": True} for k in config.completed_k]
    with progress_bar(console) as bar:
        task = bar.add_task("", total=len(runs))
        for number, run in enumerate(runs):
            name = name_of_run(run, num_keys)
            bar.update(task, description=name, completed=number)
            record = ledger.find({"run": run})
            if record is None:
                note = ledger.why_not({"run": run})

                def on_message(message: Json, number: int = number) -> None:
                    bar.update(task, completed=number + message["done"])

                record = ledger.new_record({"run": run}) | _measure(config, source, run, name, on_message)
                heard, expected = words(record["transcript"]), words((records or [record])[0]["transcript"])
                record |= {"num_words": len(heard), "word_errors": word_errors(heard, expected), "num_keys": num_keys}
                ledger.append(record)
            else:
                note = made_when(record)
            records.append(record)
            line = f"{name}: {difference(record, records[0])}{'' if note is None else f' ({note})'}"
            bar.console.print(line, markup=False, soft_wrap=True)
        bar.update(task, completed=len(runs))
    write_report(records, config.out)
    show(records, console)
    say(f"Records: {config.out / RECORDS}")
    say(f"Page:    {config.out / PAGE}")
    return records


def measure_transcript(request: Json, send: Send) -> Json:
    """One transcript in a process of its own: load the model, convert it for a k, transcribe.

    Where the encoder keeps k keys, its output is compared with that before the conversion.
    """
    torch.set_num_threads(request["threads"])
    torch.manual_seed(request["seed"])
    source = ModelSource(**request["model"])
    model, tokenizer = load_model_to_run(source, _AUTO_CLASS), load_tokenizer(source)
    feature_extractor = load_feature_extractor(source)
    recording = read_recording(Path(request["audio"]), feature_extractor.sampling_rate)
    num_layers, encoder_error = 0, {}
    if request["k"] is not None:
        chosen = request["layers"]
        in_full = encoded(model, feature_extractor, recording)
        report = convert(
            model,
            attention_k=request["k"],
            where=lambda path, module: layer_kind(path, module) in chosen,
            backend=request["backend"],
            completion=Completion() if request["completed"] else None,
        )
        num_layers = len(report.replaced)
        if "encoder" in chosen:
            encoder_error = {"encoder": _difference(encoded(model, feature_extractor, recording), in_full)}
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
        **encoder_error,
    }


def _difference(output: Tensor, in_full: Tensor) -> Json:
    """Of two outputs [frames, size]: the cosine of a frame, mean over frames, and the relative error of all frames."""
    cosine = torch.nn.functional.cosine_similarity(output, in_full, dim=-1).mean()
    return {"cosine": cosine.item(), "relative_error": ((output - in_full).norm() / in_full.norm()).item()}


def layer_kind(path: str, module: nn.Module) -> str | None:
    """Which of LAYERS an attention layer is."""
    if is_cross_attention(path, module):
        return "cross"
    if not is_self_attention(path, module):
        return None
    return "encoder" if "encoder" in path.split(".") else "decoder"


def _most_keys(config: Any, layers: Sequence[str]) -> int | None:
    """The most keys that a query of these layers has: positions of the encoder, or tokens of the decoder."""
    places = {"max_source_positions" if name in ("encoder", "cross") else "max_target_positions" for name in layers}
    known = [most for name in places if isinstance(most := getattr(config, name, None), int)]
    return max(known) if len(known) == len(places) else None


def _describe(config: TranscriptionConfig, source: ModelSource, k: int | None) -> Json:
    """The configuration of a run, for its record."""
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


def _measure(config: TranscriptionConfig, source: ModelSource, run: Json, name: str, on_message: Send) -> Json:
    request = {
        "model": vars(source),
        "audio": str(config.audio),
        "language": config.language,
        "k": run["k"],
        "completed": run.get("completed", False),
        "layers": list(config.layers),
        "threads": run["threads"],
        "seed": config.seed,
        "backend": config.backend,
    }
    with failures_named(name):
        return run_in_fresh_process(f"{__name__}:measure_transcript", request, on_message=on_message)
