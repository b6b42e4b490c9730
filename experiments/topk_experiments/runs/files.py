"""Reading files as they circulate: what cannot be read is said in words that name the file."""

from __future__ import annotations

import gzip
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


@contextmanager
def damage_named(
    path: Path | str, way_out: str, what: str = "is damaged, or no such file as is needed here"
) -> Iterator[None]:
    """Whatever is raised within, because a file does not hold what it should, becomes an error that names the file.

    way_out  what a user can do, the end of the message
    what     is wrong with the file

    >>> with damage_named(Path("k.json"), "move it away"):
    ...     {}["k"]
    Traceback (most recent call last):
    ValueError: k.json is damaged, or no such file as is needed here: the field 'k' is missing; move it away
    """
    try:
        yield
    except Exception as error:  # readers of damaged content raise anything
        if str(path) in str(error):  # said already, and better
            raise
        if isinstance(error, OSError) and error.strerror and Path(path).exists() and not Path(path).is_file():
            raise type(error)(f"{path} must be a file, and is none ({error.strerror}); {way_out}") from error
        raise ValueError(f"{path} {what}: {reason_of(error)}; {way_out}") from error


def reason_of(error: BaseException) -> str:
    """The first line of an error, for a message of ours."""
    if isinstance(error, KeyError):
        return f"the field {error} is missing"
    lines = str(error).strip().splitlines()
    # Errors of types are about Python's own: with their name it is clear that they are.
    kind = "" if isinstance(error, ValueError | OSError) and lines else f"{type(error).__name__} "
    return f"{kind}{lines[0] if lines else ''}".strip()


def load_tensors(path: Path, **options: Any) -> Any:
    """What `torch.save` wrote, its checksums checked; the options are those of `torch.load`.

    Raises:
        Exception: any, where it holds something else or was damaged; call it within `damage_named`.
    """
    with zipfile.ZipFile(path) as archive:
        if (name := archive.testzip()) is not None:
            raise ValueError(f"the checksum of its part {name} is wrong")
    return torch.load(path, weights_only=True, **options)


def read_utf8(path: Path) -> str:
    """The text of a UTF-8 file, plain or .gz, without a byte order mark.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not UTF-8, or its compressed content is damaged; the message names file and line.
    """
    content = read_bytes(path)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{path} is not UTF-8 (line {line}, byte {error.start}); convert it, for example with iconv -f LATIN1 -t "
            "UTF-8"
        ) from error


def read_bytes(path: Path) -> bytes:
    """The content of a file, unpacked where it was packed by gzip."""
    content = path.read_bytes()
    if content[:2] != b"\x1f\x8b":
        return content
    try:
        return gzip.decompress(content)
    except Exception as error:  # zlib.error, EOFError, OSError, struct.error
        raise ValueError(f"{path} is a damaged .gz file: {error}; fetch it again, or unpack it yourself") from error


def visible_files(folder: Path, pattern: str) -> Iterator[Path]:
    """Files that match, in the order of their names, without hidden ones such as the ._* that macOS leaves."""
    return (path for path in sorted(folder.glob(pattern)) if path.is_file() and not path.name.startswith("."))


def folder_with(source: Path, holds: Callable[[Path], bool]) -> Path:
    """The folder itself, or the one folder in it that holds the data, as archives unpack."""
    if not source.is_dir() or holds(source):
        return source
    inner = [folder for folder in sorted(source.iterdir()) if folder.is_dir() and holds(folder)]
    return inner[0] if len(inner) == 1 else source
