"""Reads text, and writes files so that a reader never sees half of one."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any


def read_utf8(path: Path) -> str:
    """The content of a text file, without a byte order mark.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not UTF-8.
    """
    if path.is_dir():
        raise IsADirectoryError(f"text file {path} is a folder; name a file in it")
    if not path.is_file():
        raise FileNotFoundError(f"text file not found: {path}")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"text file {path} is not UTF-8 (byte {error.start}); convert it, for example with iconv -t UTF-8"
        ) from error


def write_whole(path: Path, content: str | bytes) -> None:
    """Replace a file in one step. A reader never sees half of it, and an interrupted run never leaves half of it.

    Raises:
        OSError: the file cannot be written; nothing of it is left behind.
    """
    if path.is_dir():
        raise IsADirectoryError(f"a file cannot be written in place of the folder {path}; name a file in it")
    if (in_the_way := next((folder for folder in path.parents if folder.exists()), path.parent)).is_file():
        raise NotADirectoryError(f"{path} cannot be written because {in_the_way} is a file; give a path in a folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def notes_as_json(about: object) -> str:
    """The notes that a user keeps in a file, as JSON.

    Raises:
        ValueError: they are no dict, or hold what JSON cannot.
    """
    if not isinstance(about, dict):
        raise ValueError(f"about must be a dict, got {type(about).__name__}")
    try:
        return json.dumps(about)
    except (RecursionError, TypeError, ValueError) as error:
        raise ValueError(
            f"about must hold what JSON can: words, numbers, lists and dicts of them; {error}; give a tensor or an "
            "array as a list"
        ) from error


def check_writable(name: str, path: Path, *, is_folder: bool = False) -> None:
    """Raise unless a file can be written there, before the work whose result it will hold. Nothing is left behind.

    is_folder  whether files are to be written into `path`, instead of it

    Raises:
        OSError: the file, or a folder above it, cannot be written; the message has the option's `name`.
    """
    if not is_folder and path.is_dir():
        raise IsADirectoryError(f"{name} must be a file, got the folder {path}")
    try:
        if not is_folder and path.exists():
            path.open("ab").close()
            return
        folder = path if is_folder else path.parent
        while not folder.exists():
            folder = folder.parent
        # Permissions do not tell: a file system may be read-only, and root passes every check of them.
        Path(tempfile.mkdtemp(prefix=".writable-", dir=folder)).rmdir()
    except OSError as error:
        raise type(error)(f"{name} cannot be written: {path} ({error.strerror}); give another --{name}") from error


def append_json_line(path: Path, record: dict[str, Any]) -> None:
    """Append one record to a file, as one line of JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The last line may be incomplete, after a full disk or a crash. Start a new line, so that this one stays readable.
    start = "" if not path.exists() or path.read_bytes()[-1:] in (b"", b"\n") else "\n"
    with path.open("a", encoding="utf-8") as file:
        file.write(start + json.dumps(record, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
