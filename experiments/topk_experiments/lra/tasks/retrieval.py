"""Do two documents belong together? The published task, from its files, and a substitute for it.

The published pairs are papers of the ACL Anthology Network (Radev et al. 2013), one citing the other or not. The
substitute asks whether two passages come from the same document, and takes any folder of texts.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from ...runs.files import damage_named, visible_files
from .examples import Examples, ExamplesWriter
from .preparation import Progress, Splits

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_AAN_FILES = {"train": "train", "validation": "eval", "test": "test"}


@dataclass(frozen=True)
class CitedPapers:
    """Does one paper cite the other (1), or neither (0)? The model reads the bytes of both, cut off at max_length.

    source  folder with new_aan_pairs.train.tsv, new_aan_pairs.eval.tsv and new_aan_pairs.test.tsv of the published
            data; each line is label, first id, second id, first text and second text, separated by tabs
    """

    source: str
    max_length: int = 4_000

    name = "retrieval"
    num_classes = 2
    vocabulary = 256
    parts = 2

    def make(self, progress: Progress) -> Splits:
        """All three splits; a paper that is part of many pairs is stored once."""
        return {split: self._read(name, progress) for split, name in _AAN_FILES.items()}

    def _read(self, name: str, progress: Progress) -> Examples:
        path = Path(self.source).expanduser() / f"new_aan_pairs.{name}.tsv"
        if not path.is_file():
            raise FileNotFoundError(f"source must hold {path.name}; there is no {path}")
        writer = ExamplesWriter()
        known: dict[bytes, int] = {}
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                fields = line.rstrip(b"\r\n").removeprefix(_BYTE_ORDER_MARK).split(b"\t")
                if len(fields) != 5 or fields[0] not in (b"0", b"1", b"0.0", b"1.0"):
                    raise ValueError(
                        f"line {number} of {path} must have five fields separated by tabs, the first 0 or 1, got "
                        f"{len(fields)} fields, the first {fields[0][:20].decode(errors='replace')!r}"
                    )
                pair = []
                for text in (field[: self.max_length] for field in fields[3:]):
                    if text not in known:
                        known[text] = writer.add_sequence(text)
                    pair.append(known[text])
                writer.add_example(pair, int(float(fields[0])))
                if number % 1_000 == 0:
                    progress.tell(number, number)
        return writer.examples()


@dataclass(frozen=True)
class SameDocument:
    """A substitute for the published pairs: do two passages come from the same document (1) or not (0)?

    No document is part of two splits. All passages are max_length bytes long, so that lengths carry no information
    about the label. Two passages of one document do not overlap.

    source        folder, or .zip file, with UTF-8 .txt files at any depth, each a document
    shortest      documents with fewer bytes are left out; at least 2 x max_length
    """

    source: str
    num_train: int = 4_000
    num_validation: int = 400
    num_test: int = 1_000
    max_length: int = 1_024
    shortest: int = 2_048
    seed: int = 0

    name = "same-document"
    num_classes = 2
    vocabulary = 256
    parts = 2

    def __post_init__(self) -> None:
        if self.max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {self.max_length}")
        if self.shortest < 2 * self.max_length:
            raise ValueError(
                f"shortest must be at least 2 x max_length = {2 * self.max_length}, so that each half of a document "
                f"holds a whole passage, got {self.shortest}"
            )

    def make(self, progress: Progress) -> Splits:
        """All three splits; each gets documents in proportion to its pairs, and at least two."""
        documents = [text for text in _texts(Path(self.source).expanduser()) if len(text) >= self.shortest]
        counts = {"train": self.num_train, "validation": self.num_validation, "test": self.num_test}
        total = sum(counts.values())
        shares = {split: max(2, len(documents) * count // total) for split, count in counts.items() if split != "train"}
        if len(documents) < sum(shares.values()) + 2:
            raise ValueError(
                f"source must hold at least 6 documents of {self.shortest} bytes or more, got {len(documents)}: "
                f"{self.source}"
            )
        Random(f"{self.seed} documents").shuffle(documents)
        splits = {}
        for split, count in counts.items():
            own = documents[: shares[split]] if split in shares else documents[sum(shares.values()) :]
            if split in shares:
                documents = documents[shares[split] :] + documents[: shares[split]]
            splits[split] = self._pairs(own, count, Random(f"{self.seed} {split}"))
            progress.tell(sum(examples.num_examples for examples in splits.values()), total)
        return splits

    def _pairs(self, documents: list[bytes], count: int, random: Random) -> Examples:
        writer = ExamplesWriter()
        for _ in range(count):
            label = random.getrandbits(1)
            first, second = random.sample(documents, 2)
            if label:
                second = first
            middle = len(first) // 2
            if label:  # one passage from each half, in either order
                halves = [first[:middle], first[middle:]]
                random.shuffle(halves)
                first, second = halves
            writer.add([_passage(text, self.max_length, random) for text in (first, second)], label)
        return writer.examples()


def _passage(text: bytes, size: int, random: Random) -> bytes:
    begin = random.randrange(len(text) - size + 1)
    return text[begin : begin + size]


def _texts(source: Path) -> Iterator[bytes]:
    """Contents of all .txt files, in the order of their names."""
    if source.is_dir():
        for path in visible_files(source, "**/*.txt"):
            yield path.read_bytes()
    elif source.suffix == ".zip" and source.is_file():
        with damage_named(source, "pack it again", "cannot be read"), zipfile.ZipFile(source) as archive:
            for name in sorted(archive.namelist()):
                if name.endswith(".txt") and not name.rpartition("/")[2].startswith("."):
                    yield archive.read(name)
    else:
        raise FileNotFoundError(f"source must be a folder or a .zip file with .txt files, got {source}")
