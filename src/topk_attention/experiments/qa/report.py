"""The table and the picture, made from records alone."""

from __future__ import annotations

import json
import math
import re
import statistics
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from ...tasks.qa.scores import Mean, mean_and_error
from ..models import Say
from ..plots import COLOURS, QUOTED, new_figure, only_ticks_at, png_of
from ..records import Json, days_and_commits, read_json_lines, write_whole
from ..settings import mean_k, setting_name
from ..timing import busy_note
from . import evaluation, finetuning
from .points import identity, unpack
from .published import TABLES, PublishedTable, curves

TABLE, PICTURE = "qa.md", "qa.png"
_METRICS = {
    "accuracy": "accuracy",
    "accuracy_by_length": "accuracy, likelihoods divided by the choice's characters",
    "exact_match": "exact match",
    "f1": "F1",
}
_PANELS = {"attention_k": "k, keys kept per query", "feed_forward_k": "k, neurons kept per token"}
_ROW_TITLE = {"x": 0.01, "ha": "left", "fontsize": 9.5}
_BARS = "Bars: standard error of each score over its questions.\nChanges, taken question by question, are in the table."
# Points by which F1 may differ from exact match and still needs no line of its own.
_SAME = 0.3
# How each is drawn; of accuracies one is enough.
_SHOWN_IN_PICTURE = {"accuracy_by_length": "-", "exact_match": "-", "f1": "--"}
_HOW = {"choices": "choices by likelihood", "text": "in its own words", "spans": "by marking the passage"}
# Of which tokens the share is that sees more than k keys.
_COUNTED = {
    "choices": ". Counted are the tokens of the question and its choices, not those of solved examples before it",
    "text": ". Counted is the encoder's input alone",
}


@dataclass(frozen=True)
class Group:
    """Records that stand in one table: of one model, asked in one way.

    records  by setting and question set, by names that stand for one setting and one set alone
    """

    name: str
    records: dict[tuple[str, str], Json]

    @property
    def settings(self) -> list[str]:
        return list(dict.fromkeys(setting for setting, _ in self.records))

    @property
    def sets(self) -> list[str]:
        return list(dict.fromkeys(name for _, name in self.records))

    @property
    def metrics(self) -> list[str]:
        return list(next(iter(self.records.values()))["scores"])

    @property
    def compared(self) -> list[str]:
        """Sets that the full model and at least one other setting have answered; all sets where there are none such."""
        shared = {some for name, some in self.records if name != "full" and ("full", some) in self.records}
        return [some for some in self.sets if some in shared or not shared]

    @property
    def reader(self) -> str:
        return str(next(iter(self.records.values()))["protocol"]["reader"])

    def described(self, setting: str) -> Json:
        """What a setting's name stands for."""
        return next(dict(record["setting"]) for (name, _), record in self.records.items() if name == setting)

    def score(self, setting: str, some: str, metric: str) -> Mean | None:
        """In per cent; None where there is no record."""
        record = self.records.get((setting, some))
        return None if record is None else _per_cent(unpack(record["outcomes"][metric]))

    def mean(self, setting: str, metric: str) -> Mean:
        """In per cent, over the sets that are compared, of a setting that has at least one of them."""
        mean = _mean_of([self.score(setting, some, metric) for some in self.compared])
        assert mean is not None
        return mean

    def change(self, setting: str, some: str, metric: str) -> Mean | None:
        """Against the full model, with the standard error of the difference question by question.

        One name stands for one content, drawn with one seed: the questions and their order are the same.
        """
        pair = [self.records.get((name, some)) for name in (setting, "full")]
        if None in pair:
            return None
        ours, full = (unpack(record["outcomes"][metric]) for record in pair if record is not None)
        return _per_cent([a - b for a, b in zip(ours, full, strict=True)])


def write_report(out: Path, say: Say) -> None:
    """Write qa.md and qa.png from the records in a folder.

    Raises:
        ValueError: there are none.
    """
    evaluations, trainings = (read_json_lines(out / name) for name in (evaluation.RECORDS, finetuning.RECORDS))
    if not evaluations and not trainings:
        raise ValueError(
            f"{out} holds neither {evaluation.RECORDS} nor {finetuning.RECORDS}: make them with "
            "topk-attention qa evaluate or finetune"
        )
    evaluated, trained = _groups(evaluations, _evaluation_name), _groups(trainings, _training_name)
    write_whole(out / TABLE, markdown(evaluated, trained))
    write_whole(out / PICTURE, png_of(picture(evaluated)))
    for name in (TABLE, PICTURE):
        say(f"Written: {out / name}")


def markdown(evaluated: Sequence[Group], trained: Sequence[Group]) -> str:
    """The whole page."""
    parts = [
        "# Question answering with the k best keys and neurons",
        "Per cent, with the standard error over the questions. A change is against the full model on the same "
        "questions, with the standard error of the difference question by question. A mean is over the sets that a "
        "setting has; where some are missing, it says over how many, and is not to be held against a mean over others. "
        "Made by `topk-attention qa table` from the records beside it.",
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


def picture(evaluated: Sequence[Group]) -> Any:
    """A figure: mean score against attention k and against feed-forward k, one row a group, each with its own y axis.

    The published curves, of other models on other sets, have a panel of their own beside the legend.
    """
    rows = [group for group in evaluated if any(_is_drawn(group, setting) for setting in group.settings)]
    figure = new_figure(width=11, height=2.9 * len(rows) + 3.2)
    *parts, last = figure.subfigures(len(rows) + 1, 1, squeeze=False)[:, 0]
    for part, group in zip(parts, rows, strict=True):
        _draw_group(part, group)
    labelled: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            labelled.setdefault(name, handle)
    last.suptitle("Published (quoted): other models, whole development sets", **_ROW_TITLE)
    beside, axes = last.subplots(1, 2)
    beside.set_axis_off()
    if labelled:
        beside.legend(labelled.values(), labelled, loc="center left", frameon=False, fontsize=9, title=_BARS)
    _draw_published(axes)
    return figure


def _draw_group(part: Any, group: Group) -> None:
    sets = group.compared
    drawn = {metric: line for metric, line in _SHOWN_IN_PICTURE.items() if metric in group.metrics}
    over = sets[0] if len(sets) == 1 else f"mean over {_counted(len(sets), 'set')}"
    title = f"{group.name}: {over}"
    if "f1" in drawn and _is_nearly_exact_match(group):
        del drawn["f1"]
        title += f"; F1 is within {_SAME} of exact match"
    part.suptitle(textwrap.fill(title, 130), **_ROW_TITLE)
    panels = part.subplots(1, len(_PANELS), sharey=True)
    for axes, (field, label) in zip(panels, _PANELS.items(), strict=True):
        settings = {setting: k for setting, k in _limiting(group, field).items() if _is_drawn(group, setting)}
        if not settings:
            axes.set_axis_off()
            continue
        for metric, line in drawn.items():
            _draw_points(axes, group, settings, metric, line)
        _finish_panel(axes, label, settings.values())
        axes.set_ylabel("per cent", fontsize=9)


def _draw_points(axes: Any, group: Group, settings: Mapping[str, float], metric: str, line: str) -> None:
    """Uniform k as a curve, calibrated ones as hollow markers, the full model as a level line."""
    style = {"marker": "s" if metric == "f1" else "o", "elinewidth": 0.8}
    hollow = {"color": COLOURS[1], "linestyle": "", "markersize": 9, "markerfacecolor": "none", "capsize": 5}
    calibrated = [setting for setting in settings if _is_calibrated(group, setting)]
    uniform = sorted((setting for setting in settings if setting not in calibrated), key=lambda name: settings[name])
    for some, label, more in (
        (uniform, _METRICS[metric], {"color": COLOURS[0], "linestyle": line, "markersize": 4, "capsize": 2}),
        (calibrated, "calibrated, at its mean k", hollow),
    ):
        means = [group.mean(setting, metric) for setting in some]
        if means:
            ks, values, errors = [settings[setting] for setting in some], *zip(*means, strict=True)
            axes.errorbar(ks, values, yerr=errors, label=label, **style | more)
    if "full" in group.settings:
        full = group.mean("full", metric).value
        axes.axhline(full, label="full model", color=QUOTED, linestyle=line, linewidth=1)


def _draw_published(axes: Any) -> None:
    ks: set[int] = set()
    for name, curve in curves().items():
        axes.plot(list(curve), list(curve.values()), color=QUOTED, linestyle=":", marker=".")
        k, value = max(curve.items())
        axes.annotate(name, (k, value + 0.8), fontsize=8, color=QUOTED, ha="right", va="bottom")
        ks |= set(curve)
    _finish_panel(axes, _PANELS["feed_forward_k"], ks)
    axes.margins(y=0.15)
    axes.set_ylabel("exact match, per cent", fontsize=9)


def _finish_panel(axes: Any, label: str, ks: Iterable[float]) -> None:
    """A logarithmic axis with ticks at these k, but for those that would be written over one another."""
    axes.set_xscale("log", base=2)
    ticks: list[int] = []
    rounded = sorted(map(round, ks))
    axes.set_xlim(rounded[0] / 1.3, rounded[-1] * 1.3)
    for k in rounded:
        if not ticks or k > 1.15 * ticks[-1]:
            ticks.append(k)
    only_ticks_at(axes.xaxis, ticks)
    axes.tick_params(labelsize=8, labelleft=True)
    axes.set_xlabel(label, fontsize=9)
    axes.grid(alpha=0.25)


def _limiting(group: Group, field: str) -> dict[str, float]:
    """Settings that limit this field alone -> their mean k."""
    result = {}
    for setting in group.settings:
        limited = [name for name, k in group.described(setting).items() if k is not None]
        k = mean_k(group.described(setting)[field])
        if k is not None and limited == [field]:
            result[setting] = k
    return result


def _is_calibrated(group: Group, setting: str) -> bool:
    return any(isinstance(k, dict) for k in group.described(setting).values())


def _is_drawn(group: Group, setting: str) -> bool:
    limits_one = any(setting in _limiting(group, field) for field in _PANELS)
    return limits_one and all((setting, some) in group.records for some in group.compared)


def _is_nearly_exact_match(group: Group) -> bool:
    settings = [setting for setting in group.settings if setting == "full" or _is_drawn(group, setting)]
    return all(
        abs(group.mean(setting, "f1").value - group.mean(setting, "exact_match").value) <= _SAME for setting in settings
    )


def _left_out(group: Group) -> list[str]:
    """Which points the picture lacks and why, as at most one paragraph."""
    reasons = []
    for setting in group.settings:
        there = sum((setting, some) in group.records for some in group.compared)
        if setting == "full" or _is_drawn(group, setting):
            continue
        if there < len(group.compared):
            reasons.append(f"{setting} ({there} of {_counted(len(group.compared), 'set')})")
        else:
            reasons.append(f"{setting} (limits both)")
    return [f"Not in the picture: {'; '.join(reasons)}."] if reasons else []


def _groups(records: Sequence[Json], name_of: Callable[[Json], str]) -> list[Group]:
    """Of records of the same identity the last one counts; no other replaces another."""
    names = _names(map(_circumstances, records), name_of)
    settings = _names((record["setting"] for record in records), setting_name)
    sets = _names((record["questions"] for record in records), _set_name)
    groups: dict[str, Group] = {}
    for record in records:
        key = _key(_circumstances(record))
        group = groups.setdefault(key, Group(names[key], {}))
        group.records[settings[_key(record["setting"])], sets[_key(record["questions"])]] = record
    return list(groups.values())


def _circumstances(record: Json) -> Json:
    """What has to agree for records to stand in one table."""
    return {name: value for name, value in identity(record).items() if name not in ("setting", "questions")}


def _names(described: Iterable[Json], name_of: Callable[[Json], str]) -> dict[str, str]:
    """`_key` of a description -> its name, with what differs appended where others would be called the same."""
    distinct = {_key(some): some for some in described}
    details = {key: dict(_details(some)) for key, some in distinct.items()}
    names = {}
    for key, some in distinct.items():
        alike = [details[other] for other in distinct if name_of(distinct[other]) == name_of(some)]
        differing = [
            in_words for in_words, value in details[key].items() if any(other.get(in_words) != value for other in alike)
        ]
        names[key] = ", ".join([name_of(some), *(_in_words(words, details[key][words]) for words in differing)])
    return names


def _key(described: Json) -> str:
    return json.dumps(described, sort_keys=True)


def _details(described: Json, within: str = "") -> Iterator[tuple[str, Any]]:
    """All that a description says, with names in words; what is None is left out."""
    for name, value in described.items():
        words = f"{within}{name.replace('_', ' ')}"
        if isinstance(value, dict):
            yield from _details(value, "" if name in ("model", "protocol", "training") else f"{words} ")
        elif value is not None:
            yield words, value


def _in_words(words: str, value: Any) -> str:
    """
    >>> _in_words("learning rate", 0.001), _in_words("sha256", "0420b54464f41432"), _in_words("falls", False)
    ('learning rate 0.001', 'sha256 0420b544', 'learning rate constant')
    """
    if words == "falls":
        return "learning rate falling" if value else "learning rate constant"
    if isinstance(value, str) and re.fullmatch("[0-9a-f]{12,}", value):
        value = value[:8]
    return f"{words} {value}"


def _evaluation_name(circumstances: Json) -> str:
    protocol, dtype = circumstances["protocol"], circumstances["dtype"]
    shots = f", {protocol['shots']} examples before each question" if protocol["reader"] == "choices" else ""
    in_dtype = "" if dtype == "float32" else f", in {dtype}"
    return f"{circumstances['model']['name']}, {_HOW[protocol['reader']]}{shots}{in_dtype}"


def _training_name(circumstances: Json) -> str:
    training = circumstances["training"]
    how = "trained from scratch" if training["from_scratch"] else "fine-tuned"
    return (
        f"{circumstances['model']['name']}, {how}: {training['steps']:,} steps of {training['batch']} questions from "
        f"{training['questions']['name']} ({training['questions']['number']:,})"
    )


def _set_name(questions: Json) -> str:
    asked = questions.get("asked", questions["number"])
    of = "" if asked == questions["number"] else f" of {questions['number']:,}"
    return f"{questions['name']} ({asked:,}{of})"


def _tables(group: Group) -> list[str]:
    tables = []
    columns = group.sets + ([] if len(group.sets) == 1 else ["mean"])
    for metric in group.metrics:
        title = _METRICS[metric]
        tables.append(_table(f"**{title[0].upper()}{title[1:]}**", columns, group, group.settings, group.score, metric))
        limited = [setting for setting in group.settings if setting != "full"]
        if limited and "full" in group.settings:
            tables.append(_table(f"Change of {title}", columns, group, limited, group.change, metric, sign="+"))
    shares = {
        setting: [_share(group.records.get((setting, some))) for some in group.sets] for setting in group.settings
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
        means = [cell(setting, some, metric) for some in group.sets]
        number = sum(mean is not None for mean in means)
        cells = ["-" if mean is None else f"{mean.value:{sign}.1f} ± {mean.error:.1f}" for mean in means]
        if "mean" in columns:
            mean = _mean_of(means)
            of = "" if number == len(means) else f" ({_counted(number, 'set')})"
            cells.append("-" if mean is None else f"{mean.value:{sign}.1f} ± {mean.error:.1f}{of}")
        rows.append([setting, *cells])
    return f"{title}\n\n{_markdown_table(['', *columns], rows)}"


def _note(group: Group) -> str:
    records = list(group.records.values())
    cpus = sorted({f"{record['run']['dtype']} on {record['environment']['cpu']}" for record in records})
    lengths = {
        some: next(record["lengths"] for (_, name), record in group.records.items() if name == some)
        for some in group.sets
    }
    told = "; ".join(
        f"{some}: {length['mean_tokens']:.0f} (most {length['most_tokens']})" for some, length in lengths.items()
    )
    in_all = _minutes(sum(map(_seconds, records)))
    if "curve" in records[0]:
        in_all += " of training in all, by the median step"
    else:
        in_all += " in all"
    busy = busy_note([record.get("other_cores") for record in records], records[0]["environment"].get("num_cpus"))
    return (
        f"Tokens of a sequence, mean: {told}. {', '.join(cpus)}; {in_all}; {days_and_commits(records)}."
        f"{'' if busy is None else f' {busy}'}"
    )


def _seconds(record: Json) -> float:
    """How long a point took; a training without the stretches in which it stood still."""
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
    return "less than a minute" if seconds < 30 else _counted(max(1, round(seconds / 60)), "minute")


def _share(record: Json | None) -> str:
    share = None if record is None else record["lengths"].get("share_beyond_k")
    if share is None:
        return ""
    # Few and almost all are neither none nor all.
    return f"{100 * share:.1f}" if 0 < share < 0.01 or 0.99 < share < 1 else f"{100 * share:.0f}"


def _published(table: PublishedTable) -> str:
    rows = [
        [name, *("-" if value is None else f"{value:g}" for value in values)] for name, values in table.rows.items()
    ]
    return _markdown_table([table.first_column, *table.columns], rows)


def _markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] + ["--:"] * (len(headings) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _per_cent(values: Sequence[float]) -> Mean:
    mean = mean_and_error(values)
    return Mean(100 * mean.value, 100 * mean.error)


def _mean_of(means: Sequence[Mean | None]) -> Mean | None:
    """The mean of the independent means that are there; None where there are none."""
    known = [mean for mean in means if mean is not None]
    if not known:
        return None
    error = math.sqrt(sum(mean.error**2 for mean in known)) / len(known)
    return Mean(sum(mean.value for mean in known) / len(known), error)


def _counted(number: int, noun: str) -> str:
    """
    >>> _counted(1, "set"), _counted(3, "set")
    ('1 set', '3 sets')
    """
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
