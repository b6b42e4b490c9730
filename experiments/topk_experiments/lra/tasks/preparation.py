"""The data of a task, made once: generated data in shards, data from files in one step."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, Protocol

import numpy as np

from topk_attention.files import check_writable, write_whole

from ...runs.files import damage_named
from .examples import SPLITS, Examples, ExamplesWriter

Splits = dict[str, Examples]
# Examples of a shard; generating them takes about ten seconds.
_SHARD = 500


class Progress:
    """Where `make` keeps finished shards, and a function that it reports progress to.

    folder  for shards of generated data
    report  called with the examples finished and the examples wanted; None: no reports
    """

    def __init__(self, folder: Path, report: Callable[[int, int], None] | None = None) -> None:
        self.folder = folder
        self._report = report

    def tell(self, done: int, total: int) -> None:
        """Report the examples finished and the examples wanted."""
        if self._report is not None:
            self._report(done, total)


class Task(Protocol):
    """The interface of a task.

    name         one word
    num_classes  labels are 0 to num_classes - 1
    vocabulary   values are 0 to vocabulary - 1
    parts        number of sequences of an example
    max_length   of a sequence
    """

    @property
    def name(self) -> str: ...
    @property
    def num_classes(self) -> int: ...
    @property
    def vocabulary(self) -> int: ...
    @property
    def parts(self) -> int: ...
    @property
    def max_length(self) -> int: ...
    def make(self, progress: Progress) -> Splits: ...


class PreparedData(NamedTuple):
    """A task's examples and their description for records, which names no folder."""

    splits: Splits
    description: dict[str, Any]


def prepare(task: Task, cache: Path, report: Callable[[int, int], None] | None = None) -> PreparedData:
    """A task's data, read from `cache` if it holds data of the same settings and source files, and made otherwise.

    report  called with the examples finished and the examples wanted

    Raises:
        ValueError: the source lacks something that the task needs, or a file of the cache was changed.
        FileNotFoundError: the source does not exist.
    """
    settings = _settings(task)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    folder = cache / f"{task.name}-{digest[:12]}"
    summary = folder / "data.json"
    if not summary.exists():
        check_writable("data", summary)
        splits = task.make(Progress(folder / "shards", report))
        assert tuple(splits) == SPLITS
        description = _describe(task, splits)
        for name, examples in splits.items():
            write_whole(folder / f"{name}.npz", examples.to_bytes())
        write_whole(summary, json.dumps(description, indent=2).encode())  # last: without it the folder is unfinished
        for shard in (folder / "shards").glob("*.npz"):
            shard.unlink()
    with damage_named(folder, "delete it to make it again", "is not as it was written"):
        description = json.loads(summary.read_text(encoding="utf-8"))
        splits = {name: Examples.from_bytes((folder / f"{name}.npz").read_bytes()) for name in SPLITS}
        written = {name: description["splits"][name]["sha256"] for name in SPLITS}
    for name, examples in splits.items():
        if examples.sha256() != written[name]:
            raise ValueError(f"{folder / name}.npz was changed after it was written; delete {folder} to make it again")
    if description != json.loads(json.dumps(_describe(task, splits))):
        raise ValueError(f"{summary} was changed after it was written; delete {folder} to make it again")
    # Computed at every call and not stored, so that data from before baselines existed has them too.
    baselines = getattr(task, "baselines", None)
    return PreparedData(splits, description | {"baselines": {} if baselines is None else baselines(splits)})


def make_in_shards(
    add_shard: Callable[[Random, int, ExamplesWriter], None],
    counts: dict[str, int],
    seed: int,
    progress: Progress,
) -> Splits:
    """Generate splits shard by shard, each shard from a random state of its own.

    add_shard  draws a number of examples into a writer
    counts     split -> number of examples

    Raises:
        ValueError: an example was drawn twice, so that a test example could also be a training example.
    """
    total = sum(counts.values())
    done = 0
    splits = {}
    for split, count in counts.items():
        shards = []
        for number, first in enumerate(range(0, count, _SHARD)):
            size = min(_SHARD, count - first)
            path = progress.folder / f"{split}-{number:05}.npz"
            if not path.exists():
                writer = ExamplesWriter()
                add_shard(Random(f"{seed} {split} {number}"), size, writer)
                write_whole(path, writer.examples().to_bytes())
            with damage_named(path, "delete it to make it again", "is not as it was written"):
                shards.append(Examples.from_bytes(path.read_bytes()))
            done += size
            progress.tell(done, total)
        splits[split] = Examples.concatenated(shards)
    different = {split.sequence(number).tobytes() for split in splits.values() for number in range(split.num_examples)}
    if len(different) < total:
        raise ValueError(
            f"{total - len(different)} of {total} generated examples were drawn twice; ask for longer or fewer examples"
        )
    return splits


def describe_source(path: Path) -> list[Any]:
    """Name, size and time of a file, or of all files at any depth of a folder: they differ after a change."""
    files = {path.name: path}
    if path.is_dir():
        files = {file.relative_to(path).as_posix(): file for file in sorted(path.rglob("*")) if file.is_file()}
    return [[name, file.stat().st_size, file.stat().st_mtime_ns] for name, file in files.items()]


def hold_out(examples: Examples, count: int, seed: int) -> tuple[Examples, Examples]:
    """(the rest, `count` examples drawn at random); the seed alone decides which.

    Raises:
        ValueError: there are no more than `count` examples.
    """
    if count >= examples.num_examples:
        raise ValueError(f"num_validation must be below the {examples.num_examples} training examples, got {count}")
    numbers = list(range(examples.num_examples))
    Random(f"{seed} hold out").shuffle(numbers)
    return examples.take(sorted(numbers[count:])), examples.take(sorted(numbers[:count]))


def shares_right_by(
    seen: Callable[[Examples], np.ndarray], num_values: int, num_classes: int, splits: Splits
) -> dict[str, float]:
    """Split -> accuracy of guessing, for each value, the label that is most frequent with it in training.

    seen  N examples -> the value seen in each, one of `num_values`, int [N]
    """
    values = {name: seen(examples) for name, examples in splits.items()}
    counts = np.zeros((num_values, num_classes), dtype=np.int64)
    np.add.at(counts, (values["train"], splits["train"].labels), 1)
    guesses = counts.argmax(1)
    return {name: float((guesses[values[name]] == splits[name].labels).mean()) for name in splits}


def _settings(task: Task) -> dict[str, Any]:
    settings: dict[str, Any] = {"task": task.name} | dataclasses.asdict(task)  # type: ignore[call-overload]
    # Data that an earlier version of the generator drew from the same settings does not count.
    if hasattr(task, "version"):
        settings["version"] = task.version
    source = settings.get("source")
    if source is not None and (place := Path(source).expanduser()).exists():
        settings["source"] = [str(place.resolve()), describe_source(place)]
    return settings


def _describe(task: Task, splits: Splits) -> dict[str, Any]:
    settings = {
        name: value
        for name, value in dataclasses.asdict(task).items()  # type: ignore[call-overload]
        if name != "source"
    }
    return {
        "task": task.name,
        "settings": settings,
        "splits": {
            name: {
                "num_examples": examples.num_examples,
                "majority_share": examples.majority_share(task.num_classes),
                "sha256": examples.sha256(),
            }
            for name, examples in splits.items()
        },
    }
