"""Where numbers were made: versions, processor, date and a hash of the code that computes."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from ._version import __version__


def environment() -> dict[str, Any]:
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
    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit = git("rev-parse", "--short", "HEAD")
    return f"{commit}+dirty" if commit and git("status", "--porcelain", "--untracked-files=no") else commit


def source_sha256() -> str:
    """Start of the hash of everything in this package that computes: a commit does not tell uncommitted edits apart."""
    package = Path(__file__).parent
    files = sorted(file for pattern in ("*.py", "*.so", "*.pyd") for file in package.rglob(pattern))
    whole = hashlib.sha256()
    for file in files:
        name = file.relative_to(package).as_posix()
        if not name.startswith("cli/"):
            whole.update(name.encode() + b"\0" + file.read_bytes() + b"\0")
    return whole.hexdigest()[:16]
