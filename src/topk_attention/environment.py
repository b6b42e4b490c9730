"""The environment in which numbers were computed: versions, processor, date and a hash of the code."""

from __future__ import annotations

import ast
import hashlib
import os
import platform
import subprocess
from collections.abc import Iterable
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
        "product_sha256": product_sha256(),
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

    # Another project's repository may contain the installed package, but does not track it.
    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit = git("rev-parse", "--short", "HEAD")
    return f"{commit}+dirty" if commit and git("status", "--porcelain", "--untracked-files=no") else commit


def product_sha256() -> str:
    """Start of the hash of all code in this package that computes. A commit does not tell uncommitted edits apart."""
    package = Path(__file__).parent
    files = [file for pattern in ("*.py", "*.so", "*.pyd") for file in package.rglob(pattern)]
    return code_sha256(package, (file for file in files if file.relative_to(package).parts[0] != "cli"))


def code_sha256(folder: Path, files: Iterable[Path]) -> str:
    """Start of the hash of code. Comments, docstrings and layout of Python files do not count.

    files  below the folder; those that are not Python count in full
    """
    whole = hashlib.sha256()
    for file in sorted(files):
        content = _code_of(file.read_text(encoding="utf-8")).encode() if file.suffix == ".py" else file.read_bytes()
        whole.update(file.relative_to(folder).as_posix().encode() + b"\0" + content + b"\0")
    return whole.hexdigest()[:16]


def _code_of(source: str) -> str:
    """A text that is the same for sources that differ only in comments, docstrings and layout."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node, clean=False
        ):
            del node.body[0]
    return ast.dump(tree)
