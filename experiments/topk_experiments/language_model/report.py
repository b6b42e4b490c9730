"""Loss curves and console tables of trainings from scratch, from their records. Nothing in this file trains."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..runs.records import Json, read_json, reads
from ..runs.timing import busy_note
from ..runs.training import name_of_arm
from ..show.plots import draw_loss_curves

if TYPE_CHECKING:
    from rich.console import Console

FOLDERS = ("language-model", "feed-forward-curve")


def redraw(results: Path) -> list[Path]:
    """Draw the loss curves of every record below the folder of all results; return the pictures written."""
    pictures = []
    for path in (path for folder in FOLDERS for path in sorted((results / folder).glob("*.json"))):
        record = read_json(path)
        if record is not None:
            pictures.append(reads()(_redraw)(path, record))
    return pictures


def _redraw(path: Path, record: Json) -> Path:
    return draw(record, path.with_suffix(".png"))


def draw(record: Json, picture: Path) -> Path:
    """Draw the validation loss of every arm; return the picture's path."""
    curves = {name_of_arm(arm): arm["curve"] for arm in record["arms"]}
    unit = f"nats per {_tokens(record).removesuffix('s')}"
    draw_loss_curves(curves, picture, title=_title(record), unit=unit)
    return picture


def report(record: Json, path: Path, console: Console) -> None:
    """Draw a record's curves beside its file and show its arms on the console."""
    from rich.table import Table

    picture = draw(record, path.with_suffix(".png"))
    table = Table(title=_title(record), title_justify="left")
    for heading in ("", "training loss", "validation loss", "perplexity", "training time, s"):
        table.add_column(heading, justify="right" if heading else "left")
    for arm in record["arms"]:
        last = arm["curve"][-1]
        table.add_row(
            name_of_arm(arm),
            f"{last['training_loss']:.4f}",
            f"{arm.get('validation_loss', last['validation_loss']):.4f}",
            f"{arm['perplexity']:.3f}" if "perplexity" in arm else "",
            f"{arm['elapsed_s']:.0f}",
        )
    console.print(table)
    note = busy_note([arm["other_cores"] for arm in record["arms"]], record["environment"]["num_cpus"])
    lines = [*([] if note is None else [note]), f"Written: {path}", f"Written: {picture}"]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _title(record: Json) -> str:
    config = record["config"]
    model = f"{config['num_layers']} layers, d_model {config['d_model']}, d_ff {config['d_ff']:,}"
    text = f"{_tokens(record)} of {record['text']['source']}"
    if "tokens" not in config:  # the curve of feed-forward layers
        return f"{model}, {text}, {config['threads']} threads"
    steps = f"{config['steps']:,} steps of {config['batch']} windows"
    return f"{model}, context {config['context']}, {steps}: {text}"


def _tokens(record: Json) -> str:
    """What a token is: "bytes" or "words"."""
    return str(record["config"].get("tokens", "bytes"))
