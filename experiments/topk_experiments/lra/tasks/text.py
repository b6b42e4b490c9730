"""Byte-level sentiment of IMDb reviews (Maas et al. 2011), from any of three forms of the data."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...runs.files import folder_with, read_utf8, visible_files
from .examples import Examples, ExamplesWriter
from .preparation import Progress, Splits, hold_out

_FOLDER_LABELS = {"neg": 0, "pos": 1}
_Review = tuple[Any, Any, str]  # text, label, and where it stands


@dataclass(frozen=True)
class ReviewSentiment:
    """Is a review for (1) or against (0) a film? The model reads its UTF-8 bytes, cut off at max_length.

    source          the folder of the full data set (train/pos/*.txt and so on); a folder with train.jsonl and
                    test.jsonl, plain or .gz, whose lines have text and label; or the id of a Hugging Face data set with
                    these two columns, which needs the package datasets
    num_validation  training reviews held out for validation; with 0 the test reviews are also the validation
                    reviews, as published
    """

    source: str
    max_length: int = 1_000
    num_validation: int = 0
    seed: int = 0

    name = "text"
    num_classes = 2
    vocabulary = 256
    parts = 1

    def __post_init__(self) -> None:
        if self.max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {self.max_length}")

    def make(self, progress: Progress) -> Splits:
        """All three splits."""
        train, test = self._read("train", progress), self._read("test", progress)
        if not self.num_validation:
            return {"train": train, "validation": test, "test": test}
        rest, validation = hold_out(train, self.num_validation, self.seed)
        return {"train": rest, "validation": validation, "test": test}

    def _read(self, split: str, progress: Progress) -> Examples:
        writer = ExamplesWriter()
        for number, (text, label, place) in enumerate(self._reviews(split), 1):
            if not isinstance(label, int | float) or label not in (0, 1):
                raise ValueError(f"label must be 0 or 1, got {label!r} in a {split} review: {place}")
            if not isinstance(text, str):
                raise ValueError(f"text must be a string, got {text!r} in {place}")
            try:
                content = text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"text of {place} is no UTF-8: {error.reason}") from error
            writer.add([content[: self.max_length]], int(label))
            if number % 500 == 0:
                progress.tell(number, number)
        examples = writer.examples()
        if not examples.num_examples:
            raise ValueError(f"no {split} reviews in {self.source}")
        return examples

    def _reviews(self, split: str) -> Iterable[_Review]:
        source = Path(self.source).expanduser()
        if not source.is_dir():
            return _from_hugging_face(self.source, split)
        folder = folder_with(source, lambda folder: _form_of(folder, split) is not None)
        form = _form_of(folder, split)
        if form is None:
            raise ValueError(
                f"source {self.source} must hold {split}/pos and {split}/neg with .txt files, or {split}.jsonl "
                f"or {split}.jsonl.gz"
            )
        return _from_full_folder(form) if form.is_dir() else _from_json_lines(form)


def _form_of(folder: Path, split: str) -> Path | None:
    """The folder of the full data set's split, or its file of JSON lines."""
    if any((folder / split / name).is_dir() for name in _FOLDER_LABELS):
        return folder / split
    files = (folder / f"{split}.jsonl.gz", folder / f"{split}.jsonl")
    return next((file for file in files if file.is_file()), None)


def _from_full_folder(folder: Path) -> Iterator[_Review]:
    for name, label in _FOLDER_LABELS.items():
        paths = list(visible_files(folder / name, "*.txt"))
        if not paths:
            raise ValueError(f"{folder.name}/{name} must hold .txt files, and holds none: {folder / name}")
        for path in paths:
            yield read_utf8(path), label, str(path)


def _from_json_lines(path: Path) -> Iterator[_Review]:
    for number, line in enumerate(read_utf8(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            review = json.loads(line)
            text, label = review["text"], review["label"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"line {number} of {path} is not a JSON object with text and label") from error
        yield text, label, f"line {number} of {path}"


def _from_hugging_face(name: str, split: str) -> Iterator[_Review]:
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"source folder not found: {name}")
    try:
        datasets = importlib.import_module("datasets")  # an optional package
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"source {name!r} is no folder; to read it as a Hugging Face data set the package datasets is needed: "
            "pip install datasets",
            name="datasets",
        ) from error
    for number, review in enumerate(datasets.load_dataset(name, split=split), 1):
        yield review["text"], review["label"], f"row {number}"
