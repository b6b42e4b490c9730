"""Timing benchmarks."""

from __future__ import annotations

from pathlib import Path

from . import attention_layer_report, chunk_size_report, feed_forward_layer_report
from .error import report as attention_error_report


def redraw(results: Path) -> list[Path]:
    """Draw tables and pictures again from the records below the folder of all results."""
    reports = {
        "attention": attention_layer_report.report,
        "feed-forward": feed_forward_layer_report.report,
        "chunk-size": chunk_size_report.report,
        "attention-error": attention_error_report.report,
    }
    return [path for folder, report in reports.items() for path in report(results / folder)]
