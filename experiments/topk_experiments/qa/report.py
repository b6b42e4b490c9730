"""The table and the picture of question answering, from records alone. Nothing in this file asks a model."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

from ..runs.progress import Say
from ..runs.records import Json, days_and_commits, read_json_lines, reads, write_whole
from ..runs.timing import busy_note
from ..show.html import counted
from ..show.plots import save
from . import evaluation, finetuning
from .groups import Group, evaluation_name, grouped, mean_of, training_name
from .picture import METRICS, is_drawn, picture
from .published import TABLES, PublishedTable
from .tasks.scores import Mean

TABLE, PICTURE = "qa.md", "qa.png"
# Which tokens the share of queries with more than k keys counts.
_COUNTED = {
    "choices": ". Counted are the tokens of the question and its choices, not those of solved examples before it",
    "text": ". Counted is the encoder's input alone",
}


def redraw(results: Path) -> list[Path]:
    """Write table and picture again from the records below the folder of all results, if there are any."""
    out = results / "qa"
    recorded = any((out / name).exists() for name in (evaluation.RECORDS, finetuning.RECORDS))
    return write_report(out, lambda line: None) if recorded else []


@reads(evaluation.RECORDS, finetuning.RECORDS)
def write_report(out: Path, say: Say) -> list[Path]:
    """Write qa.md and qa.png from the records in a folder; return their paths.

    Raises:
        ValueError: there are no records.
    """
    evaluations, trainings = (read_json_lines(out / name) for name in (evaluation.RECORDS, finetuning.RECORDS))
    if not evaluations and not trainings:
        raise ValueError(
            f"{out} holds neither {evaluation.RECORDS} nor {finetuning.RECORDS}: make them with "
            "topk-experiments qa evaluate or finetune"
        )
    evaluated, trained = grouped(evaluations, evaluation_name), grouped(trainings, training_name)
    write_whole(out / TABLE, markdown(evaluated, trained))
    save(picture(evaluated), out / PICTURE)
    written = [out / TABLE, out / PICTURE]
    for path in written:
        say(f"Written: {path}")
    return written


def markdown(evaluated: Sequence[Group], trained: Sequence[Group]) -> str:
    """The whole table in Markdown."""
    parts = [
        "# Question answering with the k best keys and neurons",
        "Per cent, with the standard error over the questions. A change is against the full model on the same "
        "questions, with the standard error of the difference question by question. A mean is over the sets that the "
        "full model and another setting have answered, or over all if there are none; where a setting lacks some, "
        "it says over how many, and is not to be held against a mean over others. Made by `topk-experiments qa table` "
        "from the records beside it.",
    ]
    for heading, groups in (("Without training", evaluated), ("Trained", trained)):
        if groups:
            parts.append(f"## {heading}")
        if groups and groups is trained:
            parts.append("Errors are over the questions, of one training each; another seed may differ by more.")
        for group in groups:
            parts += [f"### {group.name}", *_tables(group), *(_left_out(group) if groups is evaluated else [])]
    parts += [
        "## Published (quoted)",
        "Gupta et al. 2021, tables of the authors' repository: other models, whole development sets, exact match by a "
        "SQuAD 1.1 scorer. Means are taken from their rows.",
    ]
    parts += [f"**{table.title}**\n\n{_published(table)}" for table in TABLES]
    return "\n\n".join(parts) + "\n"


def _left_out(group: Group) -> list[str]:
    """A paragraph that says which points the picture lacks and why; none if it lacks none."""
    reasons = []
    for setting in group.settings:
        answered = sum((setting, each) in group.records for each in group.compared)
        if setting == "full" or is_drawn(group, setting):
            continue
        if answered < len(group.compared):
            reasons.append(f"{setting} ({answered} of {counted(len(group.compared), 'set')})")
        else:
            reasons.append(f"{setting} (limits both)")
    return [f"Not in the picture: {'; '.join(reasons)}."] if reasons else []


def _tables(group: Group) -> list[str]:
    tables = []
    columns = group.sets + ([] if len(group.compared) == 1 else ["mean"])
    for metric in group.metrics:
        title = METRICS[metric]
        tables.append(_table(f"**{title[0].upper()}{title[1:]}**", columns, group, group.settings, group.score, metric))
        limited = [setting for setting in group.settings if setting != "full"]
        if limited and "full" in group.settings:
            tables.append(_table(f"Change of {title}", columns, group, limited, group.change, metric, sign="+"))
    shares = {
        setting: [_share(group.records.get((setting, each))) for each in group.sets] for setting in group.settings
    }
    if any(share for row in shares.values() for share in row):
        rows = [[setting, *row] for setting, row in shares.items() if any(row)]
        tables.append(
            "Queries that see more than k keys, per cent; all others have full attention whatever k (for a calibrated "
            f"k: more than its mean){_COUNTED.get(group.reader, '')}\n\n" + _markdown_table(["", *group.sets], rows)
        )
    notes = [_note(group)]
    return [*tables, *notes]


def _table(
    title: str,
    columns: Sequence[str],
    group: Group,
    settings: Sequence[str],
    cell: Callable[[str, str, str], Mean | None],
    metric: str,
    sign: str = "",
) -> str:
    rows = []
    for setting in settings:
        means = {each: cell(setting, each, metric) for each in group.sets}
        cells = [_in_cell(mean, sign) for mean in means.values()]
        if "mean" in columns:
            compared = [means[each] for each in group.compared]
            number = sum(mean is not None for mean in compared)
            of = "" if number in (0, len(compared)) else f" ({counted(number, 'set')})"
            cells.append(_in_cell(mean_of(compared), sign) + of)
        rows.append([setting, *cells])
    return f"{title}\n\n{_markdown_table(['', *columns], rows)}"


def _in_cell(mean: Mean | None, sign: str) -> str:
    return "-" if mean is None else f"{mean.value:{sign}.1f} ± {mean.error:.1f}"


def _note(group: Group) -> str:
    records = list(group.records.values())
    cpus = sorted({f"{record['run']['dtype']} on {record['environment']['cpu']}" for record in records})
    lengths = {
        each: next(record["lengths"] for (_, name), record in group.records.items() if name == each)
        for each in group.sets
    }
    listed = "; ".join(
        f"{each}: {length['mean_tokens']:.0f} (most {length['most_tokens']})" for each, length in lengths.items()
    )
    in_all = _minutes(sum(map(_seconds, records)))
    if "curve" in records[0]:
        in_all += " of training in all, by the median step"
    else:
        in_all += " in all"
    busy = busy_note([record.get("other_cores") for record in records], records[0]["environment"].get("num_cpus"))
    return (
        f"Tokens of a sequence, mean: {listed}. {', '.join(cpus)}; {in_all}; {days_and_commits(records)}."
        f"{'' if busy is None else f' {busy}'}"
    )


def _seconds(record: Json) -> float:
    """Seconds that a point took. For a training: its steps times the median step, so that stalls do not count."""
    if "curve" not in record:
        return float(record["elapsed_s"])
    points = [{"step": 0, "elapsed_s": 0.0}, *record["curve"]]
    a_step = [
        (point["elapsed_s"] - before["elapsed_s"]) / (point["step"] - before["step"])
        for before, point in pairwise(points)
    ]
    return float(statistics.median(a_step) * points[-1]["step"])


def _minutes(seconds: float) -> str:
    """
    >>> _minutes(29), _minutes(60), _minutes(4380)
    ('less than a minute', '1 minute', '73 minutes')
    """
    return "less than a minute" if seconds < 30 else counted(max(1, round(seconds / 60)), "minute")


def _share(record: Json | None) -> str:
    share = None if record is None else record["lengths"].get("share_beyond_k")
    if share is None:
        return ""
    # Shares near 0 and 1 keep a digit: they are neither none nor all.
    return f"{100 * share:.1f}" if 0 < share < 0.01 or 0.99 < share < 1 else f"{100 * share:.0f}"


def _published(table: PublishedTable) -> str:
    rows = [
        [name, *("-" if value is None else f"{value:g}" for value in values)] for name, values in table.rows.items()
    ]
    return _markdown_table([table.first_column, *table.columns], rows)


def _markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] + ["--:"] * (len(headings) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
