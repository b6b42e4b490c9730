"""Reading files as they circulate: what cannot be read is said in words that name the file."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path


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
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is a damaged .gz file: {error}") from error


def visible_files(folder: Path, pattern: str) -> Iterator[Path]:
    """Files that match, in the order of their names, without hidden ones such as the ._* that macOS leaves."""
    return (path for path in sorted(folder.glob(pattern)) if path.is_file() and not path.name.startswith("."))


def folder_with(source: Path, holds: Callable[[Path], bool]) -> Path:
    """The folder itself, or the one folder in it that holds the data, as archives unpack."""
    if not source.is_dir() or holds(source):
        return source
    inner = [folder for folder in sorted(source.iterdir()) if folder.is_dir() and holds(folder)]
    return inner[0] if len(inner) == 1 else source
