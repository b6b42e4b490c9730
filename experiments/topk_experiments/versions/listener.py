"""A plugin of pytest: writes what became of each test, and the versions that the tests really ran with."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

VARIABLE = "TOPK_VERSIONS_ANSWER"
_LONGEST = 300

_outcomes: dict[str, str] = {}
_reasons: dict[str, str] = {}


def pytest_runtest_logreport(report: Any) -> None:
    """A test has passed if all its phases have; a failure in any of them counts, and so does a skip."""
    if report.failed or report.skipped or report.when == "call":
        worse = _outcomes.get(report.nodeid) == "failed"
        _outcomes[report.nodeid] = "failed" if worse else report.outcome
    if report.failed:
        _reasons.setdefault(report.nodeid, _reason(report.longrepr))
    elif report.skipped and isinstance(report.longrepr, tuple):
        _reasons.setdefault(report.nodeid, str(report.longrepr[2])[:_LONGEST])


def pytest_collectreport(report: Any) -> None:
    """A file that cannot be imported is a failure of its own."""
    if report.failed:
        _outcomes[report.nodeid] = "failed"
        _reasons[report.nodeid] = _reason(report.longrepr)


def pytest_sessionfinish() -> None:
    """Write the answer as JSON into the file that the environment names."""
    versions = {name: getattr(sys.modules.get(name), "__version__", None) for name in ("torch", "transformers")}
    library = sys.modules.get("topk_attention.backends.cpu")
    problem = library.problem() if library is not None else "the library was not imported"
    answer = {"versions": versions, "kernels": problem, "outcomes": _outcomes, "reasons": _reasons}
    Path(os.environ[VARIABLE]).write_text(json.dumps(answer), encoding="utf-8")


def _reason(shown: Any) -> str:
    """The line with the error, of a traceback or a text."""
    crash = getattr(shown, "reprcrash", None)
    lines = str(crash.message if crash is not None else shown).strip().splitlines()
    return lines[0 if crash is not None else -1][:_LONGEST] if lines else ""
