"""Records of experiments: where they were made, and files that are whole whenever one looks."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from .._version import __version__

Json = dict[str, Any]

# What of `environment()` has to agree: runs on another processor, or of other code, do not belong in one table.
SAME_ENVIRONMENT = ("topk_attention", "source_sha256", "torch", "transformers", "python", "cpu")
# The same where transformers takes no part. Not the commit: that changes as soon as the records are committed.
SAME_NUMBERS = ("topk_attention", "source_sha256", "torch", "cpu")


def environment() -> Json:
    """Versions, processor and date; nothing that names a person, a machine or a folder."""
    return {
        "topk_attention": __version__,
        "torch": package_version("torch"),
        "transformers": package_version("transformers"),
        "numpy": package_version("numpy"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "num_cpus": os.cpu_count(),
        "commit": git_commit(),
        "source_sha256": source_sha256(),
        "date": now(),
    }


def days_and_commits(records: Sequence[Json]) -> str:
    """The days on which records were made, first to last, and the commits they are of, for the head of a table.

    >>> made = [{"date": "2026-11-29T10:00:00", "commit": "abc1234"}, {"date": "2026-11-24T10:00:00", "commit": None}]
    >>> days_and_commits([{"environment": environment} for environment in made])
    '2026-11-24 to 2026-11-29, commit abc1234, unknown'
    """
    dates = sorted({record["environment"]["date"][:10] for record in records})
    days = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    commits = dict.fromkeys(record["environment"]["commit"] or "unknown" for record in records)
    return f"{days}, commit {', '.join(commits)}"


def differences(old: Json, new: Json) -> list[str]:
    """What differs between two descriptions, in words."""
    names = [*old, *(name for name in new if name not in old)]
    return [f"{name}: {old.get(name)} -> {new.get(name)}" for name in names if old.get(name) != new.get(name)]


def now() -> str:
    """The time in UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def package_version(name: str) -> str | None:
    """The version of an installed package without importing it; None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def git_commit() -> str | None:
    """Short commit of the library's own repository, with "+dirty" where files differ; None outside one."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    # A package installed inside somebody else's repository is not tracked by it.
    if git("ls-files", "--error-unmatch", "../__init__.py") is None:
        return None
    commit = git("rev-parse", "--short", "HEAD")
    return f"{commit}+dirty" if commit and git("status", "--porcelain", "--untracked-files=no") else commit


def source_sha256() -> str:
    """Start of the hash of everything in this package that computes: a commit does not tell uncommitted edits apart."""
    package = Path(__file__).parents[1]
    files = sorted(file for pattern in ("*.py", "*.so", "*.pyd") for file in package.rglob(pattern))
    whole = hashlib.sha256()
    for file in files:
        name = file.relative_to(package).as_posix()
        if not name.startswith("cli/"):
            whole.update(name.encode() + b"\0" + file.read_bytes() + b"\0")
    return whole.hexdigest()[:16]


def write_whole(path: Path, content: str | bytes) -> None:
    """Replace a file in one step: a reader, or a run cut short, never leaves or sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    partial.replace(path)


def write_json(path: Path, record: Json) -> None:
    """Write a record for people and programs to read."""
    write_whole(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Json | None:
    """The record in a file; None where there is no file.

    Raises:
        ValueError: the file holds something else.
    """
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); move it away or give another --out") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path} is not a record; move it away or give another --out")
    return record


def append_json_line(path: Path, record: Json) -> None:
    """Add one line to a file of records."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A line that was cut short by a full disk or a lost machine must not swallow this one.
    start = "" if not path.exists() or path.read_bytes()[-1:] in (b"", b"\n") else "\n"
    with path.open("a", encoding="utf-8") as file:
        file.write(start + json.dumps(record, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_json_lines(path: Path) -> list[Json]:
    """All whole records of a file, oldest first; none where there is no file."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # cut short
        if isinstance(record, dict):
            records.append(record)
    return records
