"""The table and the picture, made from records alone."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
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
    def reader(self) -> str:
        return str(next(iter(self.records.values()))["protocol"]["reader"])

    def score(self, setting: str, some: str, metric: str) -> Mean | None:
        """In per cent; None where there is no record."""
        record = self.records.get((setting, some))
        return None if record is None else _per_cent(unpack(record["outcomes"][metric]))

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
    write_whole(out / PICTURE, picture(evaluated))
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
            parts += [f"### {group.name}", *_tables(group)]
    parts += [
        "## Published (quoted)",
        "Gupta et al. 2021, tables of the authors' repository: other models, whole development sets, exact match by a "
        "SQuAD 1.1 scorer. Means are taken from their rows.",
    ]
    parts += [f"**{table.title}**\n\n{_published(table)}" for table in TABLES]
    return "\n\n".join(parts) + "\n"


def picture(evaluated: Sequence[Group]) -> bytes:
    """Mean score over the sets against attention k and against feed-forward k, a level line for the full model."""
    figure = new_figure(width=11, height=4.6)
    for number, (field, label) in enumerate(
        (("attention_k", "k, keys kept per query"), ("feed_forward_k", "k, neurons kept per token")), 1
    ):
        axes = figure.add_subplot(1, 2, number)
        ticks: set[int] = set()
        for index, group in enumerate(evaluated):
            colour = COLOURS[index % len(COLOURS)]
            for metric, line in _SHOWN_IN_PICTURE.items():
                points = sorted(_points(group, field, metric)) if metric in group.metrics else []
                if not points:
                    continue
                ks, values, errors = zip(*points, strict=True)
                style = {"color": colour, "linestyle": line, "marker": "o", "markersize": 4, "capsize": 2}
                axes.errorbar(ks, values, yerr=errors, label=f"{group.name}: {_METRICS[metric]}", **style)
                full = _mean_of([group.score("full", some, metric) for some in group.sets])
                if full is not None:
                    axes.axhline(full.value, color=colour, linestyle=line, linewidth=0.8, alpha=0.6)
                ticks |= {round(k) for k in ks}
        if field == "feed_forward_k":
            for name, curve in curves().items():
                axes.plot(list(curve), list(curve.values()), color=QUOTED, linestyle=":", marker=".", alpha=0.6)
                k, value = max(curve.items())
                axes.annotate(name, (k, value), fontsize=7, color=QUOTED, ha="right", va="bottom")
                ticks |= set(curve)
        axes.set_xscale("log", base=2)
        if ticks:
            only_ticks_at(axes.xaxis, sorted(ticks))
            axes.tick_params(axis="x", labelrotation=45, labelsize=7)
        axes.set_xlabel(label)
        axes.set_title("Mean over the sets [%]; level lines: the full model", fontsize=10, loc="left")
        axes.grid(alpha=0.25)
    # Below the panels: the names are longer than a panel is wide.
    named = {
        name: handle for axes in figure.axes for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if named:
        figure.legend(list(named.values()), list(named), loc="outside lower center", frameon=False, fontsize=7)
    return png_of(figure)


def _points(group: Group, field: str, metric: str) -> list[tuple[float, float, float]]:
    """(k, mean, its error) of the settings that limit this field alone, where every set is there."""
    points = []
    for setting in group.settings:
        described = next(r["setting"] for (name, _), r in group.records.items() if name == setting)
        others = [k for name, k in described.items() if name != field]
        k = mean_k(described[field])
        mean = _mean_of([group.score(setting, some, metric) for some in group.sets])
        # A calibrated k is another way to spend the same mean, not a point of the curve.
        if k is not None and others == [None] and mean is not None and not isinstance(described[field], dict):
            points.append((k, mean.value, mean.error))
    return points


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
