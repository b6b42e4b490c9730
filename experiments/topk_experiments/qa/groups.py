"""The records of each table, with names that tell all settings and question sets apart."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..models.settings import setting_name
from ..runs.records import Json
from .points import identity, unpack
from .tasks.scores import Mean, mean_and_error

_HOW = {"choices": "choices by likelihood", "text": "in its own words", "spans": "by marking the passage"}


@dataclass(frozen=True)
class Group:
    """The records of one table: one model, asked in one way.

    records  (setting, question set) -> record; each name stands for one setting or one set only
    """

    name: str
    records: dict[tuple[str, str], Json]

    @property
    def settings(self) -> list[str]:
        """The full model first, then the others in the order of their first records."""
        return sorted(dict.fromkeys(setting for setting, _ in self.records), key=lambda setting: setting != "full")

    @property
    def sets(self) -> list[str]:
        return list(dict.fromkeys(name for _, name in self.records))

    @property
    def metrics(self) -> list[str]:
        return list(next(iter(self.records.values()))["scores"])

    @property
    def compared(self) -> list[str]:
        """The sets that the full model and at least one other setting have answered; all sets if no set is such."""
        shared = {each for name, each in self.records if name != "full" and ("full", each) in self.records}
        return [each for each in self.sets if each in shared or not shared]

    @property
    def reader(self) -> str:
        return str(next(iter(self.records.values()))["protocol"]["reader"])

    def described(self, setting: str) -> Json:
        """The setting that a name stands for."""
        return next(dict(record["setting"]) for (name, _), record in self.records.items() if name == setting)

    def score(self, setting: str, question_set: str, metric: str) -> Mean | None:
        """The mean score in per cent; None if there is no record."""
        record = self.records.get((setting, question_set))
        return None if record is None else _per_cent(unpack(record["outcomes"][metric]))

    def mean(self, setting: str, metric: str) -> Mean:
        """The mean score in per cent over the compared sets, of a setting that has answered at least one of them."""
        mean = mean_of([self.score(setting, each, metric) for each in self.compared])
        assert mean is not None
        return mean

    def change(self, setting: str, question_set: str, metric: str) -> Mean | None:
        """The change against the full model in per cent, with the standard error of the differences of all questions.

        A name of a set stands for one content and one seed, so the questions and their order are the same.
        """
        pair = [self.records.get((name, question_set)) for name in (setting, "full")]
        if None in pair:
            return None
        ours, full = (unpack(record["outcomes"][metric]) for record in pair if record is not None)
        return _per_cent([a - b for a, b in zip(ours, full, strict=True)])


def grouped(records: Sequence[Json], name_of: Callable[[Json], str]) -> list[Group]:
    """Records in groups. Of several records of the same identity the last one counts."""
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
    """What must agree for records to stand in one table."""
    return {name: value for name, value in identity(record).items() if name not in ("setting", "questions")}


def _names(described: Iterable[Json], name_of: Callable[[Json], str]) -> dict[str, str]:
    """`_key` of a description -> its name. If several have the same name, what differs is appended."""
    distinct = {_key(each): each for each in described}
    details = {key: dict(_details(each)) for key, each in distinct.items()}
    names = {}
    for key, each in distinct.items():
        alike = [details[other] for other in distinct if name_of(distinct[other]) == name_of(each)]
        differing = [
            in_words for in_words, value in details[key].items() if any(other.get(in_words) != value for other in alike)
        ]
        names[key] = ", ".join([name_of(each), *(_in_words(words, details[key][words]) for words in differing)])
    return names


def _key(described: Json) -> str:
    return json.dumps(described, sort_keys=True)


def _details(described: Json, within: str = "") -> Iterator[tuple[str, Any]]:
    """Every field of a description with its name in words; fields that are None are left out."""
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


def evaluation_name(circumstances: Json) -> str:
    """The heading of a table of evaluations."""
    protocol, dtype = circumstances["protocol"], circumstances["dtype"]
    shots = f", {protocol['shots']} examples before each question" if protocol["reader"] == "choices" else ""
    in_dtype = "" if dtype == "float32" else f", in {dtype}"
    return f"{circumstances['model']['name']}, {_HOW[protocol['reader']]}{shots}{in_dtype}"


def training_name(circumstances: Json) -> str:
    """The heading of a table of trainings."""
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


def _per_cent(values: Sequence[float]) -> Mean:
    mean = mean_and_error(values)
    return Mean(100 * mean.value, 100 * mean.error)


def mean_of(means: Sequence[Mean | None]) -> Mean | None:
    """The mean of independent means, without those that are None; None if all are."""
    known = [mean for mean in means if mean is not None]
    if not known:
        return None
    error = math.sqrt(sum(mean.error**2 for mean in known)) / len(known)
    return Mean(sum(mean.value for mean in known) / len(known), error)
