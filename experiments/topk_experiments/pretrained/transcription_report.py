"""The table of transcripts, from their records. Nothing in this file transcribes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..runs.ledger import newest
from ..runs.records import Json, read_json_lines, reads, write_whole
from ..runs.timing import busy_note
from .demo_report import run_name

if TYPE_CHECKING:
    from rich.console import Console

_ABOUT_ENCODER = (
    " Cosine and relative error are of the encoder's output against full attention's: the cosine of a frame, mean over "
    "the frames that hold sound, and the error of all of them."
)
RECORDS, PAGE = "transcripts.jsonl", "transcripts.md"


@reads(f"whisper/{RECORDS}")
def redraw(results: Path) -> list[Path]:
    """Write the table again from the records below the folder of all results; return its path.

    The table is that of the last recording and layers on file.
    """
    out = results / "whisper"
    records = newest(read_json_lines(out / RECORDS), lambda record: json.dumps(record["run"], sort_keys=True))
    if not records:
        return []
    last = records[-1]["run"]
    same = ("model", "audio", "language", "threads", "seed")
    shown = [record for record in records if all(record["run"][name] == last[name] for name in same)]
    shown = [record for record in shown if record["run"]["layers"] in ([], last["layers"])]
    return [write_report(sorted(shown, key=_place), out)]


def _place(record: Json) -> tuple[bool, int]:
    """Full attention first, then k alone, then completed, each by k."""
    return record["run"].get("completed", False), record["run"]["k"] or 0


def write_report(records: Sequence[Json], out: Path) -> Path:
    """Write `transcripts.md` and return its path."""
    write_whole(out / PAGE, as_markdown(records))
    return out / PAGE


def as_markdown(records: Sequence[Json]) -> str:
    """A table with a row for each transcript, full attention's first, and how they were made."""
    run, here = records[0]["run"], records[0]["environment"]
    layers = " and ".join(records[-1]["run"]["layers"])
    errors = any("encoder" in record for record in records)
    lines = [
        f"{run['model']['name']} on {run['audio']} ({records[0]['audio_s']:.1f} s), k in {layers} attention "
        f"({records[-1]['num_converted_layers']} layers), {run['threads']} threads, float32, PyTorch {here['torch']}, "
        f"{here['date'][:10]}, commit {here['commit']}. Words that differ are counted against full attention's: "
        "replaced, put in or left out, without case and punctuation (as a share: the word error rate)."
        f"{_ABOUT_ENCODER if errors else ''}",
        "",
        f"| attention | words that differ |{' cosine | relative error |' if errors else ''} time [s] | transcript |",
        f"|---|---|{'---|---|' if errors else ''}---|---|",
    ]
    for record in records:
        of_encoder = _encoder_cells(record) if errors else ""
        lines.append(
            f"| {_name(record)} | {difference(record, records[0])} |{of_encoder} {record['elapsed_s']:.1f} | "
            f"{_shown(record, records[0]).replace('|', chr(92) + '|')} |"
        )
    note = _busy(records)
    return "\n".join(lines + ([] if note is None else ["", note])) + "\n"


def difference(record: Json, full: Json) -> str:
    """Words of a transcript that differ from full attention's; of full attention's own, how many there are."""
    if record is full:
        return f"{full['num_words']} words"
    errors, num_words = record["word_errors"], full["num_words"]
    return f"{errors} of {num_words} ({100 * errors / max(1, num_words):.1f} %)"


def show(records: Sequence[Json], console: Console) -> None:
    """Show the transcripts as a table on the console."""
    from rich.markup import escape
    from rich.table import Table

    run = records[0]["run"]
    table = Table(title=escape(f"{run['model']['name']}, {run['audio']}"), title_justify="left")
    for heading in ("attention", "words that differ", "time [s]", "peak memory [MiB]", "transcript"):
        table.add_column(escape(heading), justify="left" if heading in ("attention", "transcript") else "right")
    for record in records:
        table.add_row(
            _name(record),
            difference(record, records[0]),
            f"{record['elapsed_s']:.1f}",
            f"{record['peak_mib']:,.0f}",
            escape(record["transcript"]),
        )
    console.print(table)
    if (note := _busy(records)) is not None:
        console.print(note, markup=False, highlight=False, soft_wrap=True)


def name_of_run(run: Json, num_keys: int | None) -> str:
    """The name of a run in tables and messages: "full attention", "k = 64" or "k = 64, completed"."""
    return run_name(run["k"], num_keys, completed=run.get("completed", False))


def _name(record: Json) -> str:
    return name_of_run(record["run"], record.get("num_keys"))


def _shown(record: Json, full: Json) -> str:
    """A transcript, cut where it is more than twice as long as full attention's: a model that repeats itself."""
    transcript, most = record["transcript"], 2 * len(full["transcript"])
    return transcript if len(transcript) <= most else f"{transcript[:most].rpartition(' ')[0]} ..."


def _encoder_cells(record: Json) -> str:
    error = record.get("encoder")
    return " - | - |" if error is None else f" {error['cosine']:.3f} | {error['relative_error']:.3f} |"


def _busy(records: Sequence[Json]) -> str | None:
    return busy_note([record["other_cores"] for record in records], records[0]["environment"]["num_cpus"])
