"""One HTML page of everything that was recorded: the paper's figures and tables, and what was measured beside them.

Pictures and tables come from the records. Those of layers, chunk sizes and errors are drawn anew; those of other
experiments are the ones that their commands left beside their records. Nothing here measures.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from topk_attention.environment import environment

from .benchmarks import attention_layer_report, chunk_size_report, feed_forward_layer_report
from .benchmarks.error import report as attention_error_report
from .pretrained.demo_report import page_top
from .runs.records import write_whole

PAGE = "report.html"
TITLE = "Top-k attention: the paper's figures, and what a user would pick today"


class Section(NamedTuple):
    """
    folder    of the records, in the folder of all results
    title     heading
    paper     what of the paper it stands beside; None: something that the paper lacks
    text      what to see, and how it differs from the paper
    redraw    writes tables and pictures from the records, and returns them
    is_open   whether tables are unfolded
    """

    folder: str
    title: str
    paper: str | None
    text: str
    redraw: Callable[[Path], list[Path]] | None = None
    is_open: bool = False


SECTIONS = (
    Section(
        "attention",
        "One attention layer against length",
        "time and memory of one causal self-attention layer",
        "Batch 1, 12 heads of 64, forward and backward, k = 128, as in the paper, which measured with dropout 0.1 on a "
        "GPU. Beside its four curves: PyTorch's scaled_dot_product_attention, which today has linear memory too, "
        "Random Feature Attention, and each of this library's backends.",
        attention_layer_report.report,
    ),
    Section(
        "model",
        "A model of 12 layers",
        "time and memory of a 12-layer model",
        "One training step of a whole model.",
    ),
    Section(
        "feed-forward",
        "One feed-forward layer against its number of neurons",
        "time and memory of one feed-forward layer",
        "d_model 768, ReLU, k = 512, forward and backward, as in the paper, which has 262,144 tokens: compare "
        "the shape of its curves over d_ff, not their GiB. Chunks hold the same part of the tokens.",
        feed_forward_layer_report.report,
    ),
    Section(
        "chunk-size",
        "Chunk size",
        "time and memory of query chunking against the chunk size",
        "Forward pass without a mask, top-k off, as in the paper, and with top-k. Dashed: what has no chunk size.",
        chunk_size_report.report,
    ),
    Section(
        "attention-error",
        "Error against dense attention at equal time and equal memory",
        None,
        "What the paper's figures leave out: how far from dense attention the output is. Queries, keys and values are "
        "those of a real pretrained model reading real text; no method was trained for them.",
        attention_error_report.report,
        is_open=True,
    ),
    Section("lra", "Long Range Arena", "accuracy on Long Range Arena", "Training from scratch with top-k and without."),
    Section(
        "qa",
        "Question answering",
        "UnifiedQA with top-k feed-forward layers, zero-shot, and T5 fine-tuning",
        "Top-k in models that answer questions.",
    ),
    Section("whisper", "Speech recognition", None, "What Whisper hears with a part of the keys."),
    Section("demo", "A pretrained model as it is", None, "Perplexity, time and memory of SmolLM2-135M against k."),
    Section(
        "attention-kernel",
        "The attention operation alone",
        None,
        "Tensors in, output and gradients out, in alternation with PyTorch's attention and Performer.",
    ),
    Section(
        "feed-forward-kernel",
        "The feed-forward operation alone",
        None,
        "The same for feed-forward layers, in alternation with the dense layer.",
    ),
    Section(
        "feed-forward-curve",
        "Training with top-k feed-forward layers",
        None,
        "Loss of a small language model from scratch, dense and with a part of its neurons.",
    ),
)


def write_page(out: Path) -> Path:
    """Write `report.html` into the folder of all results and return it.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if not out.is_dir():
        raise FileNotFoundError(f"out must be a folder with results, got {out}; a benchmark makes one")
    for section in SECTIONS:
        if section.redraw is not None:
            section.redraw(out / section.folder)
    page = out / PAGE
    write_whole(page, as_html(out))
    return page


def as_html(out: Path) -> str:
    """The page, from the files that are there."""
    known = {section.folder for section in SECTIONS}
    others = sorted(folder.name for folder in out.iterdir() if folder.is_dir() and folder.name not in known)
    sections = [*SECTIONS, *(Section(name, name.replace("-", " ").capitalize(), None, "") for name in others)]
    shown = [section for section in sections if _files(out, section, ".png", ".md")]
    here = environment()
    parts = [
        page_top(TITLE),
        "<style>.wide { overflow-x: auto; } .wide table { font-size: .85rem; } summary { cursor: pointer; }\n"
        "th, td { text-align: left; } .wide td:not(:first-child) { text-align: right; }\n"
        "img { display: block; margin: 1rem 0; } section { border-top: 1px solid #ddd; margin-top: 2rem; }</style>\n",
        "<p>Every picture and table below comes from the records in the folder named below it. Faint dotted points "
        "are the paper's own (Gupta et al. 2021, arXiv 2106.06899), read off its figures and measured on a GPU: "
        "compare their shape, not their seconds.</p>\n",
        _counterparts(sections, shown),
        *(_section(out, section) for section in shown),
        f"<footer>Written by topk_attention {escape(here['topk_attention'])}, {escape(here['date'][:10])}.</footer>\n"
        "</body>\n</html>\n",
    ]
    return "".join(parts)


def _counterparts(sections: list[Section], shown: list[Section]) -> str:
    """A table: what the paper shows, and where that is on the page."""
    rows = []
    for section in sections:
        if section.paper is None and section not in shown:
            continue
        link = f'<a href="#{section.folder}">{escape(section.title)}</a>'
        where = link if section in shown else "not recorded"
        rows.append(f"<tr><td>{escape(section.paper or 'not in the paper')}</td><td>{where}</td></tr>\n")
    return f"<table>\n<tr><th>in the paper</th><th>here</th></tr>\n{''.join(rows)}</table>\n"


def _section(out: Path, section: Section) -> str:
    parts = [f'<section id="{section.folder}">\n<h2>{escape(section.title)}</h2>\n']
    if section.text:
        parts.append(f"<p>{escape(section.text)}</p>\n")
    for picture in _files(out, section, ".png"):
        data = base64.b64encode(picture.read_bytes()).decode()
        parts.append(f'<img alt="{escape(section.title)}, {picture.stem}" src="data:image/png;base64,{data}">\n')
    for table in _files(out, section, ".md"):
        is_open = " open" if section.is_open else ""
        parts.append(
            f"<details{is_open}><summary>Numbers: {escape(table.name)}</summary>\n"
            f'<div class="wide">{_from_markdown(table.read_text(encoding="utf-8"))}</div></details>\n'
        )
    parts.append(f"<p><small>{_made(out, section)}</small></p>\n</section>\n")
    return "".join(parts)


def _files(out: Path, section: Section, *suffixes: str) -> list[Path]:
    folder = out / section.folder
    found = (path for path in folder.glob("*") if path.suffix in suffixes)
    return sorted(found, key=lambda path: path.stem)  # attention before attention-k


def _made(out: Path, section: Section) -> str:
    """Which records there are, and of when."""
    told = []
    for path in _files(out, section, ".jsonl", ".json"):
        text = path.read_text(encoding="utf-8")
        lines = list(filter(str.strip, text.split("\n"))) if path.suffix == ".jsonl" else [text]
        try:
            records = [json.loads(line) for line in lines]
        except ValueError as error:
            raise ValueError(f"{path} holds something else than records: {error}") from error
        places = [_environment(record) for record in records]
        commits = ", ".join(dict.fromkeys(str(place["commit"]) for place in places if place.get("commit")))
        number = f"{len(records)} record{'s' if len(records) > 1 else ''}"
        told.append(f"{section.folder}/{path.name} ({number}{f', commit {commits}' if commits else ''})")
    return escape(f"Records: {'; '.join(told)}.") if told else ""


def _environment(record: Any) -> dict[str, Any]:
    place = record.get("environment") if isinstance(record, dict) else None
    return place if isinstance(place, dict) else {}


def _from_markdown(text: str) -> str:
    from markdown_it import MarkdownIt

    # No HTML of its own: what stands in a record is text.
    return MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
