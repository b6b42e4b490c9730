"""One HTML page of all results: what to conclude, the paper's figures and tables, and what was measured beside them.

Every table and picture is drawn again from its records before the page is written. Nothing in this file measures.
"""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from topk_attention.environment import environment

from . import benchmarks
from .conformance import report as conformance
from .language_model import report as language_model
from .lra import table as lra
from .pretrained import calibration_report, demo_report, passkey_report, stand_ins_report, transcription_report
from .pretrained.demo_parts import report as demonstration
from .qa import report as qa
from .results_conclusions import conclusions
from .runs.files import read_utf8
from .runs.records import write_whole
from .show.html import counted, page, picture, scrolling
from .show.plots import narrow
from .versions import report as versions

PAGE = "report.html"
TITLE = "Top-k attention: when it helps, and the paper's figures beside what a user would pick today"
# Each draws the tables and pictures of its folders again, from the records below the folder of all results.
REDRAWS = (
    benchmarks.redraw,
    demo_report.redraw,
    demonstration.redraw,
    calibration_report.redraw,
    stand_ins_report.redraw,
    passkey_report.redraw,
    transcription_report.redraw,
    language_model.redraw,
    lra.redraw,
    qa.redraw,
    conformance.redraw,
    versions.redraw,
)


class Section(NamedTuple):
    """
    folder    of the records, in the folder of all results
    title     heading
    paper     the part of the paper that it stands beside; None: the paper has nothing like it
    text      what to see, and how it differs from the paper
    is_open   whether tables are unfolded
    """

    folder: str
    title: str
    paper: str | None
    text: str
    is_open: bool = False


SECTIONS = (
    Section(
        "attention",
        "One attention layer against length",
        "time and memory of one causal self-attention layer",
        "Batch 1, 12 heads of 64, forward and backward, k = 128, as in the paper, which measured with dropout 0.1 on a "
        "GPU. Beside its four curves: PyTorch's scaled_dot_product_attention, which today has linear memory too, "
        "Random Feature Attention, and each of this library's backends.",
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
    ),
    Section(
        "chunk-size",
        "Chunk size",
        "time and memory of query chunking against the chunk size",
        "Forward pass without a mask, top-k off, as in the paper, and with top-k. Dashed: what has no chunk size.",
    ),
    Section(
        "attention-error",
        "Error against dense attention at equal time and equal memory",
        None,
        "What the paper's figures leave out: how far the output is from that of dense attention. Queries, keys and "
        "values are those of a real pretrained model reading real text; no method was trained for them.",
        is_open=True,
    ),
    Section("lra", "Long Range Arena", "accuracy on Long Range Arena", "Training from scratch with top-k and without."),
    Section(
        "qa",
        "Question answering",
        "UnifiedQA with top-k feed-forward layers, zero-shot, and T5 fine-tuning",
        "Top-k in models that answer questions.",
    ),
    Section(
        "calibration",
        "A k for each head",
        None,
        "Calibrated k beside one k for every head, in models that were trained without top-k. Each calibration has a "
        "page of its own in the folder.",
    ),
    Section(
        "stand-ins",
        "Stand-ins for the neurons that are not kept",
        None,
        "Perplexity with a part of the neurons, and with what a constant or a linear function of low rank adds for the "
        "others.",
    ),
    Section(
        "passkey",
        "A passkey in a long text",
        None,
        "Five digits hidden at ten depths of 7,500 tokens: found with full attention, with few keys, and completed.",
    ),
    Section("whisper", "Speech recognition", None, "What Whisper hears with a part of the keys."),
    Section(
        "demonstration",
        "The demo: what top-k attention gives and costs",
        None,
        "SmolLM2-135M and the operations, each against full attention in turns, and perplexity against k.",
    ),
    Section("demo", "A pretrained model as it is", None, "Perplexity, time and memory of SmolLM2-135M against k."),
    Section(
        "attention-kernel",
        "The attention operation alone",
        None,
        "Tensors in, output and gradients out, in alternation with PyTorch's attention and Performer.",
    ),
    Section(
        "decode",
        "One token at a time: the attention operation",
        None,
        "One query against a long cache of keys, beside PyTorch's two forms and the time of reading the keys.",
    ),
    Section(
        "generation",
        "One token at a time: a whole model",
        None,
        "SmolLM2-135M after a long prompt, beside transformers' caches and llama.cpp.",
    ),
    Section(
        "long-cache",
        "One token at a time: a context in files",
        None,
        "The attention of 16 layers over keys and values that lie in files, exact, with 100,000 and 1,000,000 tokens.",
    ),
    Section(
        "sequence-parallel",
        "One long sequence over processes",
        None,
        "A training step of 16,384 tokens on one process, and shared by two: time, and memory of each.",
    ),
    Section(
        "feed-forward-kernel",
        "The feed-forward operation alone",
        None,
        "The same for feed-forward layers, in alternation with the dense layer.",
    ),
    Section(
        "networks",
        "Networks of experts and of fused weights",
        None,
        "One layer in the shapes of models, beside transformers' own ways to compute it, with random weights.",
    ),
    Section(
        "paths",
        "Peak memory of each way through a converted model",
        None,
        "Sinks, soft caps, masks with gradients, fused networks, experts and adapted attention, against length.",
    ),
    Section(
        "feed-forward-curve",
        "Training with top-k feed-forward layers",
        None,
        "Loss of a small language model from scratch, dense and with a part of its neurons.",
    ),
    Section(
        "language-model",
        "Training a small language model",
        None,
        "Loss of a small GPT from scratch: full, with top-k attention, and with top-k feed-forward layers.",
    ),
    Section(
        "conformance",
        "Every type of model",
        None,
        "A tiny random model of every type that transformers has, converted and compared with itself and with dense "
        "attention over all scores.",
    ),
    Section(
        "versions",
        "Versions of torch and transformers",
        None,
        "A part of the tests with the oldest, the newest and some versions between.",
    ),
)


def write_page(out: Path, *, redraw: bool = True) -> Path:
    """Write `report.html` into the folder of all results and return its path.

    redraw  whether to draw every table and picture again from its records first

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if not out.is_dir():
        raise FileNotFoundError(f"out must be a folder with results, got {out}; a benchmark makes one")
    if redraw:
        redraw_all(out)
    written = out / PAGE
    write_whole(written, as_html(out))
    return written


def redraw_all(out: Path) -> list[Path]:
    """Draw every table and picture again from the records in the folder of all results; return the files written."""
    return [path for redraw in REDRAWS for path in redraw(out)]


def as_html(out: Path) -> str:
    """The page, from the files in the folder of all results."""
    known = {section.folder for section in SECTIONS}
    others = sorted(folder.name for folder in out.iterdir() if folder.is_dir() and folder.name not in known)
    sections = [*SECTIONS, *(Section(name, name.replace("-", " ").capitalize(), None, "") for name in others)]
    shown = [section for section in sections if _files(out, section, ".png", ".md")]
    written = environment()
    return page(
        TITLE,
        "<style>th, td { text-align: left; } .scroll td:not(:first-child) { text-align: right; }\n"
        ".scroll table { font-size: .85rem; } #contents td { text-align: left; }</style>",
        _conclusions(out),
        "<p>Every picture and table below comes from the records in the folder named below it. Faint dotted points "
        "are the paper's own (Gupta et al. 2021, arXiv 2106.06899), read off its figures and measured on a GPU: "
        "compare their shape, not their seconds. A method has the same colour in every figure.</p>",
        _contents(sections, shown),
        *(_section(out, section) for section in shown),
        f"<footer>Written by topk_attention {escape(written['topk_attention'])}, {escape(written['date'][:10])}."
        "</footer>",
    )


def _conclusions(out: Path) -> str:
    sentences = conclusions(out)
    if not sentences:
        return ""
    items = "".join(f"<li>{escape(sentence)}</li>\n" for sentence in sentences)
    return f"<h2>What to conclude</h2>\n<ul>\n{items}</ul>"


def _contents(sections: list[Section], shown: list[Section]) -> str:
    """A table: what the paper shows, and where that is on the page."""
    rows = []
    for section in sections:
        if section.paper is None and section not in shown:
            continue
        link = f'<a href="#{section.folder}">{escape(section.title)}</a>'
        where = link if section in shown else "not recorded"
        rows.append(f"<tr><td>{escape(section.paper or 'not in the paper')}</td><td>{where}</td></tr>\n")
    table = f"<table>\n<tr><th>in the paper</th><th>on this page</th></tr>\n{''.join(rows)}</table>"
    return f'<div id="contents">{scrolling(table)}</div>'


def _section(out: Path, section: Section) -> str:
    parts = [f'<section id="{section.folder}">\n<h2>{escape(section.title)}</h2>\n']
    if section.text:
        parts.append(f"<p>{escape(section.text)}</p>\n")
    for path in _files(out, section, ".png"):
        on_a_phone = narrow(path).read_bytes() if narrow(path).exists() else None
        parts.append(picture(f"{section.title}, {path.stem}", path.read_bytes(), on_a_phone) + "\n")
    for path in _files(out, section, ".md"):
        is_open = " open" if section.is_open else ""
        parts.append(
            f"<details{is_open}><summary>Numbers: {escape(path.name)}</summary>\n"
            f"{_from_markdown(read_utf8(path))}</details>\n"
        )
    parts.append(f"<p><small>{_records(out, section)}</small></p>\n</section>")
    return "".join(parts)


def _files(out: Path, section: Section, *suffixes: str) -> list[Path]:
    folder = out / section.folder
    found = (path for path in folder.glob("*") if path.suffix in suffixes and ".narrow" not in path.suffixes)
    return sorted(found, key=lambda path: path.stem)  # attention before attention-k


def _records(out: Path, section: Section) -> str:
    """Which records the folder holds, and their commits."""
    listed = []
    for path in _files(out, section, ".jsonl", ".json"):
        text = read_utf8(path)
        lines = list(filter(str.strip, text.split("\n"))) if path.suffix == ".jsonl" else [text]
        try:
            records = [json.loads(line) for line in lines]
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} holds something else than records: {error}") from error
        places = [_environment(record) for record in records]
        commits = ", ".join(dict.fromkeys(str(place["commit"]) for place in places if place.get("commit")))
        number = f"{counted(len(records), 'record')}{f', commit {commits}' if commits else ''}"
        listed.append(f"{section.folder}/{path.name} ({number})")
    return escape(f"Records: {'; '.join(listed)}.") if listed else ""


def _environment(record: Any) -> dict[str, Any]:
    place = record.get("environment") if isinstance(record, dict) else None
    return place if isinstance(place, dict) else {}


def _from_markdown(text: str) -> str:
    """HTML of a table's file. Every table scrolls in its own box; text between tables keeps the width of the page."""
    from markdown_it import MarkdownIt

    # Records are text: HTML in them is escaped.
    html = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    return html.replace("<table>", '<div class="scroll"><table>').replace("</table>", "</table></div>")
