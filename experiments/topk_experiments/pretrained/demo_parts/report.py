"""What the record of the demo shows: sentences, table, picture and page. Nothing in this file measures."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

from ...runs.records import Json, read_json, reads, write_whole
from ...runs.timing import busy_note
from ...show.html import counted, drawn, footer, page, table
from ...show.plots import QUOTED, STYLES, new_figure, only_ticks_at, save

SCHEMA, RECORD = "topk_attention/demo-parts/1", "demo.json"
# Times faster below which nothing is claimed.
_NO_FASTER = 1.1
# Characters of a line beside a bar.
_WIDTH = 30
_CURVES = {
    "alone": ("one k for all heads", "topk"),
    "calibrated": ("calibrated k, mean over heads", "calibrated"),
    "completed": ("one k, completed", "topk-completed"),
}
_ANSWERS = (
    "A model as small as the default one often answers wrongly in full too: compare the answers with one another."
)


class Comparison(NamedTuple):
    """One row of the table: seconds and MiB of both. None: not measured."""

    name: str
    theirs_s: float
    ours_s: float
    theirs_mib: float | None = None
    ours_mib: float | None = None

    @property
    def times_faster(self) -> float:
        return self.theirs_s / self.ours_s


@reads("demonstration/" + RECORD)
def redraw(results: Path) -> list[Path]:
    """Write picture and page of the record below the folder of all results again; return their paths."""
    folder = results / "demonstration"
    record = read_json(folder / RECORD)
    return [] if record is None else write_report(record, folder)


def write_report(record: Json, out: Path) -> list[Path]:
    """Write `demo.png` and `demo.html`; return their paths."""
    png, written = out / "demo.png", out / "demo.html"
    save(draw(record), png)
    write_whole(written, html_page(record))
    return [png, written]


def comparisons(record: Json) -> list[Comparison]:
    """Every time that was measured in full and with top-k, of the parts that are there."""
    parts, config = record["parts"], record["config"]
    found = []
    if "reading" in parts:
        full, length = parts["reading"]["full"], f"{config['num_tokens']:,}"
        for what, prefill, field in (
            (f"reading {length} tokens", True, "prefill_s"),
            (f"a token after {length}", False, "token_s"),
            ("a token after 64", False, "short_token_s"),
        ):
            for name, suffix in (("topk", ""), ("completed", ", completed")):
                ours = parts["reading"][name]
                peaks = (full["prefill_peak_mib"], ours["prefill_peak_mib"]) if prefill else (None, None)
                found.append(Comparison(what + suffix, full[field], ours[field], *peaks))
    for one in parts.get("operations", {}).get("operations", ()):
        theirs, ours = one["theirs"], one["ours"]
        found.append(
            Comparison(
                f"attention alone, {one['name']}",
                theirs["median_s"],
                ours["median_s"],
                theirs["peak_mib"],
                ours["peak_mib"],
            )
        )
    if "training" in parts:
        of = parts["training"]
        name = f"fine-tuning step of {counted(of['layers'], 'layer')} with dropout, {of['num_tokens']:,} tokens"
        full, topk = of["full"], of["topk"]
        found.append(Comparison(name, full["median_s"], topk["median_s"], full["peak_mib"], topk["peak_mib"]))
    return found


def in_words(part: str, record: Json) -> str:
    """What a part found, on one line."""
    of = record["parts"][part]
    by_name = {one.name: one for one in comparisons(record | {"parts": {part: of}})}
    faster = [f"{name} {one.times_faster:.1f} times as fast" for name, one in by_name.items()]
    match part:
        case "reading":
            shown = [
                f"{label} {of[name]['prefill_s']:.1f} s, then {1 / of[name]['token_s']:.1f} tokens/s, perplexity of "
                f"what follows {of[name]['perplexity']:.2f}"
                + ("" if name == "full" else f", same next token in {100 * of[name]['agreement']:.0f} %")
                for name, label in (("full", "full"), ("topk", "top-k"), ("completed", "completed"))
            ]
            return f"Reading and answering: {'; '.join(shown)}."
        case "operations":
            return f"Operations against PyTorch's best: {'; '.join(faster).replace('attention alone, ', '')}."
        case "quality":
            shown = [
                f"{_CURVES[name][0]} {', '.join(f'{value:.2f} (k = {k})' for k, value in values.items())}"
                for name, values in of["curves"].items()
            ]
            return f"Perplexity of {of['num_tokens']:,} tokens: full {of['full']:.2f}; {'; '.join(shown)}."
    losses = [", ".join(f"{loss:.2f}" for loss in of[name]["losses"]) for name in ("full", "topk")]
    return (
        f"Fine-tuning: full {of['full']['median_s']:.2f} s a step and {of['full']['peak_mib']:,.0f} MiB, top-k "
        f"{of['topk']['median_s']:.2f} s and {of['topk']['peak_mib']:,.0f} MiB; losses {losses[0]} and {losses[1]}."
    )


def table_rows(record: Json) -> list[list[str]]:
    """Headings, then a row for each comparison."""
    rows = [["what", "full [s]", "top-k [s]", "times faster", "peak in full [MiB]", "with top-k [MiB]"]]
    for one in comparisons(record):
        memory = ["" if mib is None else f"{mib:,.0f}" for mib in (one.theirs_mib, one.ours_mib)]
        rows.append([one.name, _seconds(one.theirs_s), _seconds(one.ours_s), f"{one.times_faster:.1f}", *memory])
    return rows


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f}" if seconds >= 10 else f"{seconds:.3g}"


def summary(record: Json) -> list[str]:
    """What the numbers say, and where top-k does not help."""
    parts = record["parts"]
    sentences = []
    found = comparisons(record)
    helped = [one for one in found if one.times_faster >= _NO_FASTER]
    if helped:
        listed = ", ".join(f"{one.name} {one.times_faster:.1f}" for one in helped)
        sentences.append(f"Times faster than full attention: {listed}.")
    if "quality" in parts:
        sentences += _quality(parts["quality"])
    sentences += _limits(record, found)
    return sentences


def _quality(of: Json) -> list[str]:
    full, sentences = of["full"], []
    for name, values in of["curves"].items():
        changes = ", ".join(f"{100 * (value / full - 1):+.1f} % at k = {k}" for k, value in values.items())
        sentences.append(f"Perplexity against full attention, {_CURVES[name][0]}: {changes}.")
    return sentences


def _limits(record: Json, found: Sequence[Comparison]) -> list[str]:
    """Where top-k does not help, as far as this record shows it."""
    parts = record["parts"]
    sentences = []
    not_helped = [one for one in found if one.times_faster < _NO_FASTER]
    if not_helped:
        listed = ", ".join(f"{one.name} ({one.times_faster:.2f} times as fast)" for one in not_helped)
        sentences.append(f"No help: {listed}. After few tokens there is little to leave out.")
    larger = [one for one in found if one.ours_mib is not None and one.ours_mib > 0.9 * (one.theirs_mib or 0)]
    if larger:
        listed = ", ".join(f"{one.name} ({one.ours_mib:,.0f} against {one.theirs_mib:,.0f} MiB)" for one in larger)
        sentences.append(f"No memory saved: {listed}. PyTorch's plain attention is linear in memory too.")
    if "quality" in parts:
        of = parts["quality"]
        k, value = next(iter(of["curves"]["alone"].items()))
        if value > 1.05 * of["full"]:
            sentences.append(
                f"A small k alone costs quality: perplexity {value:.2f} against {of['full']:.2f} at k = {k}. Complete "
                "it, calibrate, or keep more keys."
            )
    sentences.append("A GPU was not tried; there PyTorch's flash attention is far faster than on a CPU.")
    return sentences


def html_page(record: Json) -> str:
    """One page without other files: what was run, the picture, the numbers, both answers, and what they say."""
    config, model, text, parts = record["config"], record["model"], record["text"], record["parts"]
    busy = [part.get("other_cores") for part in parts.values()]
    note = busy_note(busy, record["environment"].get("num_cpus"))
    points = "".join(f"<li>{escape(sentence)}</li>\n" for sentence in summary(record))
    return page(
        f"{model['name']} with top-k attention, in {counted(len(parts), 'part')}",
        f"<p>{escape(model['name'])} ({escape(model['revision'])}, {escape(config['dtype'])}, no training before) with "
        f"full attention and with {config['k']} keys per query, alone and completed, on {escape(text['source'])}, and "
        "the operations alone against PyTorch's.</p>",
        drawn("Times faster than full attention, and perplexity against k", draw(record)),
        f"<ul>\n{points}</ul>",
        table(table_rows(record)),
        *_answers(record),
        "<p>Each part had a process of its own; within it, full attention and top-k took turns, and times are medians. "
        "Peaks are resident memory above what the process held before. Operations: PyTorch's best form, float32; "
        "forward and backward in training, 4 heads of 64; decoding has 32 heads on 8 of keys, D = 128. Fine-tuning: "
        f"the loss of the last tokens of each window.{'' if note is None else f' {escape(note)}'}</p>",
        footer(record, f"text sha256 {text['sha256'][:16]}"),
    )


def _answers(record: Json) -> list[str]:
    of = record["parts"].get("reading")
    if of is None:
        return []
    k = record["config"]["k"]
    rows = [["", "full attention", f"k = {k}", f"k = {k}, completed"]]
    for label, field, form in (
        ("reading the document [s]", "prefill_s", "{:.1f}"),
        ("a token of the answer [ms]", "token_s", "{:.1f}"),
        ("perplexity of the text that follows", "perplexity", "{:.2f}"),
        ("same next token as in full [%]", "agreement", "{:.0f}"),
        ("answer", "answer", "{}"),
    ):
        factor = {"token_s": 1e3, "agreement": 100}.get(field, 1)
        rows.append([label, *(form.format(of[name][field] * factor) for name in ("full", "topk", "completed"))])
    return [
        f"<h2>{escape(record['config']['question'])}</h2>",
        table(rows).replace(' class="numbers"', ""),
        f"<p>{_ANSWERS}</p>",
    ]


def draw(record: Json) -> Any:
    """A figure: bars of times faster beside perplexity against k, with full attention's line in both."""
    figure = new_figure(width=12, height=5.2)
    bars = figure.add_subplot(1, 2, 1)
    found = comparisons(record)
    if found:
        ratios = [one.times_faster for one in found]
        styles = [STYLES["topk-completed" if one.name.endswith("completed") else "topk"] for one in found]
        colours = [style.colour if ratio >= _NO_FASTER else QUOTED for style, ratio in zip(styles, ratios, strict=True)]
        drawn_bars = bars.barh([fill(one.name, _WIDTH) for one in found], ratios, color=colours, height=0.7)
        bars.bar_label(drawn_bars, [f"{ratio:.1f}" for ratio in ratios], padding=3, fontsize=8)
        bars.set_xscale("log")
        bars.set_xlim(min(0.8, 0.8 * min(ratios)), 1.5 * max(ratios))
        bars.set_xticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
        bars.minorticks_off()
        bars.set_xlim(min(0.8, 0.8 * min(ratios)), 1.5 * max(ratios))
        bars.invert_yaxis()
    bars.axvline(1, color=STYLES["full"].colour, linestyle="--", linewidth=1)
    bars.set_title("Times faster than full attention (dashed: as fast)", fontsize=10, loc="left")
    bars.tick_params(labelsize=7.5)
    bars.spines[["top", "right"]].set_visible(False)
    curves = figure.add_subplot(1, 2, 2)
    if (of := record["parts"].get("quality")) is not None:
        for name, values in of["curves"].items():
            label, style = _CURVES[name][0], STYLES[_CURVES[name][1]]
            ks = [int(k) for k in values]
            curves.plot(ks, list(values.values()), label=label, color=style.colour, marker=style.marker)
        curves.axhline(of["full"], color=STYLES["full"].colour, linestyle="--", label="full attention")
        curves.set_xscale("log", base=2)
        only_ticks_at(curves.xaxis, ks)
        curves.legend(frameon=False, fontsize=8)
        curves.set_xlabel(f"k, keys kept of up to {of['num_tokens']:,}")
    curves.set_title("Perplexity (lower is better)", fontsize=10, loc="left")
    curves.grid(alpha=0.25)
    return figure
