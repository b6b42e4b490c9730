"""Configuration files: a task, a model and its training. All methods of attention share a configuration."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, cast, get_type_hints

from ..runs.checks import check_above_0, check_at_least, check_one_of
from ..runs.files import read_utf8
from ..runs.records import Json
from .model import ModelConfig
from .tasks import CitedPapers, GreyImages, ListOps, Pathfinder, ReviewSentiment, SameDocument, Task

TASKS: dict[str, type] = {
    task.name: task for task in (ListOps, ReviewSentiment, CitedPapers, SameDocument, GreyImages, Pathfinder)
}
# Method of `rivals.names` -> the options of [attention] that it takes.
METHOD_OPTIONS: dict[str, tuple[str, ...]] = {
    "vanilla": (),
    "query-chunks": (),
    "topk": ("k",),
    "topk-completed": ("k",),
    "performer": ("num_features",),
    "rfa": ("num_features", "sigma"),
}
# Options of [attention] with a default.
_USUAL = {"sigma": 1.0}
SCHEDULES = ("cosine", "inverse-square-root")
PRECISIONS = ("no", "bf16")
Section = TypeVar("Section")
_TYPES = {int: "a whole number", float: "a number", str: "text in quotes", bool: "true or false"}


@dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained: AdamW with beta 0.9 and 0.98.

    batch           examples of a step, over all processes
    learning_rate   the highest one with "cosine"; with "inverse-square-root" over the square root of the step
    warmup          steps over which the learning rate rises linearly
    schedule        of the learning rate after the warm-up
    weight_decay    as a share of the learning rate
    gradient_norm   gradients are scaled down to this norm; 0 leaves them
    evaluate_every  steps between two points of the curve; a checkpoint is written at each
    validation_examples  number of examples that a point is measured on; 0 for all
    patience        training stops after so many points without a better validation accuracy; 0 for never
    precision       "no" for float32, "bf16" for bfloat16 autocast
    alike_over      the examples of so many steps are sorted by length and dealt out so that those of one step are of
                    about equal length, for less padding; 0 for no sorting
    """

    batch: int
    steps: int
    learning_rate: float
    warmup: int
    evaluate_every: int
    schedule: str = "cosine"
    weight_decay: float = 0.0
    gradient_norm: float = 0.0
    validation_examples: int = 0
    patience: int = 0
    precision: str = "no"
    alike_over: int = 0

    def __post_init__(self) -> None:
        check_at_least(1, self, "batch", "steps", "evaluate_every", "warmup")
        check_at_least(0, self, "weight_decay", "gradient_norm", "validation_examples", "patience", "alike_over")
        check_above_0(self, "learning_rate")
        check_one_of(SCHEDULES, self, "schedule")
        check_one_of(PRECISIONS, self, "precision")

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 1.

        >>> training = TrainingConfig(batch=1, steps=100, learning_rate=1.0, warmup=10, evaluate_every=1)
        >>> [round(training.learning_rate_at(step), 3) for step in (1, 10, 55, 100)]
        [0.1, 1.0, 0.5, 0.0]
        """
        rise = min(1.0, step / self.warmup)
        if self.schedule == "inverse-square-root":
            return self.learning_rate * rise / math.sqrt(max(step, self.warmup))
        done = max(0, step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * rise * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


@dataclass(frozen=True)
class LraConfig:
    """The content of one configuration file.

    name          of the file
    task          its name in TASKS
    settings      of the task, without the source of its data
    k             of the methods that keep k keys
    num_features  of the methods with random features
    sigma         initial sigma of RFA: its weights are exp(sigma^2 cos), with the cosine between query and key
    """

    name: str
    task: str
    settings: Mapping[str, Any]
    model: ModelConfig
    training: TrainingConfig
    k: int
    num_features: int
    sigma: float = _USUAL["sigma"]

    def new_task(self, source: str | None) -> Task:
        """The task with its settings.

        Raises:
            ValueError: the task reads files and no source is given, or the other way round.
        """
        kind = TASKS[self.task]
        if self.needs_source and source is None:
            raise ValueError(f"{self.name} reads files: give --source; {_source_words(kind)}")
        if not self.needs_source and source is not None:
            raise ValueError(f"{self.name} makes its own data; leave out --source")
        given = {"source": source} if self.needs_source else {}
        return cast(Task, kind(**given, **self.settings))

    @property
    def needs_source(self) -> bool:
        """Whether the task reads files that a user names."""
        return "source" in {field.name for field in fields(TASKS[self.task])}

    def attention_options(self, method: str) -> Json:
        """Options of one method of attention.

        Raises:
            ValueError: there is no such method.
        """
        if method not in METHOD_OPTIONS:
            raise ValueError(f"method must be one of {', '.join(METHOD_OPTIONS)}, got {method!r}")
        options = {name: getattr(self, name) for name in METHOD_OPTIONS[method]}
        # A default is left out, as in records from before the option existed.
        return {name: value for name, value in options.items() if value != _USUAL.get(name)}

    def as_record(self) -> Json:
        """For records: everything except the name and the options of attention, which belong to a run."""
        training = asdict(self.training)
        if not self.training.alike_over:
            del training["alike_over"]  # as in records from before the setting existed
        return {
            "task": self.task,
            "settings": dict(self.settings),
            "model": asdict(self.model),
            "training": training,
        }


def shipped_configs() -> list[str]:
    """Names of the configuration files that come with the library."""
    folder = resources.files(__package__) / "configs"
    return sorted(file.name.removesuffix(".toml") for file in folder.iterdir() if file.name.endswith(".toml"))


def read_config(name_or_path: str) -> LraConfig:
    """Read a configuration that comes with the library, or a file of the user.

    Raises:
        FileNotFoundError: neither exists.
        ValueError: the file is not TOML, or a section or a setting is missing, unknown or does not fit.

    >>> read_config("listops").training.steps
    5000
    """
    if name_or_path in shipped_configs():
        name, content = name_or_path, (resources.files(__package__) / "configs" / f"{name_or_path}.toml").read_text()
    else:
        path = Path(name_or_path)
        if not path.is_file():
            raise FileNotFoundError(
                f"there is no configuration {name_or_path!r}: neither a file nor one of {', '.join(shipped_configs())}"
            )
        name, content = path.stem, read_utf8(path)
    try:
        sections = tomllib.loads(content)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"configuration {name_or_path} is not TOML: {error}") from error
    try:
        return _from_sections(name, sections)
    except (ValueError, RecursionError) as error:
        if name == name_or_path:
            raise
        raise ValueError(f"{name_or_path}: {error}") from error


def _from_sections(name: str, sections: dict[str, Any]) -> LraConfig:
    wanted = ("data", "model", "training", "attention")
    if sorted(sections) != sorted(wanted):
        raise ValueError(f"configuration {name} must have the sections {', '.join(wanted)}, got {', '.join(sections)}")
    for section in wanted:
        if not isinstance(sections[section], dict):
            raise ValueError(f"{section} of configuration {name} must be a section, got {sections[section]!r:.60}")
    data = dict(sections["data"])
    task = data.pop("task", None)
    if not isinstance(task, str) or task not in TASKS:
        raise ValueError(f"task of configuration {name} must be one of {', '.join(TASKS)}, got {task!r}")
    _check_names(f"data of configuration {name}", data, [f.name for f in fields(TASKS[task]) if f.name != "source"])
    _check_types(f"data of configuration {name}", TASKS[task], data)
    TASKS[task](**data | ({"source": ""} if "source" in {f.name for f in fields(TASKS[task])} else {}))
    attention = sections["attention"]
    words = f"attention of configuration {name}"
    _check_names(words, attention, ["k", "num_features"], all_needed=True, optional=list(_USUAL))
    for option in ("k", "num_features"):
        number = attention[option]
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"{option} of configuration {name} must be a whole number from 1, got {number!r:.60}")
    sigma = attention.get("sigma", _USUAL["sigma"])
    if not (isinstance(sigma, int | float) and 0 < sigma < math.inf):
        raise ValueError(f"sigma of configuration {name} must be a number above 0, got {sigma!r}")
    return LraConfig(
        name=name,
        task=task,
        settings=data,
        model=_section(name, "model", ModelConfig, sections),
        training=_section(name, "training", TrainingConfig, sections),
        **attention,
    )


def _section(name: str, section: str, kind: type[Section], sections: dict[str, Any]) -> Section:
    known = fields(cast(Any, kind))
    words = f"{section} of configuration {name}"
    _check_names(words, sections[section], [field.name for field in known])
    missing = [
        field.name for field in known if field.default is dataclasses.MISSING and field.name not in sections[section]
    ]
    if missing:
        raise ValueError(f"{words} must have {', '.join(missing)}")
    _check_types(words, kind, sections[section])
    return kind(**sections[section])


def _check_types(words: str, kind: type, given: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: a setting is of another type than the field of its name.
    """
    types = get_type_hints(kind)
    for name, value in given.items():
        wanted = types[name]
        fits = isinstance(value, bool) if wanted is bool else not isinstance(value, bool) and isinstance(value, wanted)
        if wanted is float:
            fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not fits:
            raise ValueError(f"{name} in {words} must be {_TYPES[wanted]}, got {value!r:.60}")


def _check_names(
    words: str, given: dict[str, Any], known: list[str], *, all_needed: bool = False, optional: Sequence[str] = ()
) -> None:
    """Check the names of a section.

    all_needed  whether every known name must be given
    optional    names that may be left out even then
    """
    others = [name for name in given if name not in optional]
    if any(name not in known for name in others) or (all_needed and sorted(others) != sorted(known)):
        may = f" and may have {', '.join(optional)}" if optional else ""
        raise ValueError(f"{words} must have {', '.join(known)}{may}, got {', '.join(given)}")


def _source_words(kind: type) -> str:
    """What the docstring of a task says about its source, on one line."""
    described = (kind.__doc__ or "").partition("    source ")[2].split("\n    num_")[0].split("\n    short")[0]
    return " ".join(described.split())
