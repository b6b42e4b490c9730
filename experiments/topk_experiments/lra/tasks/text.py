"""Byte-level sentiment of IMDb reviews (Maas et al. 2011), from any of three forms of the data."""

from __future__ import annotations

import gzip
import importlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .examples import Examples, ExamplesWriter
from .preparation import Progress, Splits, hold_out

_FOLDER_LABELS = {"neg": 0, "pos": 1}


@dataclass(frozen=True)
class ReviewSentiment:
    """Is a review for (1) or against (0) a film? The model reads its UTF-8 bytes, cut off at max_length.

    source          the folder of the full data set (train/pos/*.txt and so on); a folder with train.jsonl and
                    test.jsonl, plain or .gz, whose lines have text and label; or the id of a Hugging Face data set with
                    these two columns, which needs the package datasets
    num_validation  training reviews held out for validation; with 0 the test reviews serve for validation too, as
                    published
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
        for number, (text, label) in enumerate(self._reviews(split), 1):
            if label not in (0, 1):
                raise ValueError(f"label must be 0 or 1, got {label!r} in a {split} review of {self._source_name}")
            writer.add([text.encode()[: self.max_length]], label)
            if number % 500 == 0:
                progress.tell(number, number)
        examples = writer.examples()
        if not examples.num_examples:
            raise ValueError(f"no {split} reviews in {self._source_name}")
        return examples

    @property
    def _source_name(self) -> str:
        return Path(self.source).name or self.source

    def _reviews(self, split: str) -> Iterable[tuple[str, Any]]:
        folder = Path(self.source).expanduser()
        if not folder.is_dir():
            return _from_hugging_face(self.source, split)
        if (folder / split / "pos").is_dir():
            return _from_full_folder(folder / split)
        for name in (f"{split}.jsonl.gz", f"{split}.jsonl"):
            if (folder / name).is_file():
                return _from_json_lines(folder / name)
        raise ValueError(
            f"source {self._source_name} must hold {split}/pos and {split}/neg with .txt files, or {split}.jsonl or "
            f"{split}.jsonl.gz"
        )


def _from_full_folder(folder: Path) -> Iterator[tuple[str, int]]:
    for name, label in _FOLDER_LABELS.items():
        for path in sorted((folder / name).glob("*.txt")):
            yield path.read_text(encoding="utf-8"), label


def _from_json_lines(path: Path) -> Iterator[tuple[str, int]]:
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    for number, line in enumerate(content.splitlines(), 1):
        try:
            review = json.loads(line)
            yield review["text"], review["label"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"line {number} of {path.name} is not a JSON object with text and label") from error


def _from_hugging_face(name: str, split: str) -> Iterator[tuple[str, int]]:
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"source folder not found: {name}")
    try:
        datasets = importlib.import_module("datasets")  # an optional package
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"source {name!r} is no folder; to read it as a Hugging Face data set the package datasets is needed: "
            "make install, in the folder of the clone",
            name="datasets",
        ) from error
    for review in datasets.load_dataset(name, split=split):
        yield review["text"], review["label"]
