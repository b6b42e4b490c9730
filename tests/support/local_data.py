"""Texts, sounds and questions that are not part of this repository."""

import os
from pathlib import Path

import pytest

_DEFAULT = Path(__file__).parents[3] / "shared" / "data"


def shared_data(name: str) -> Path:
    """A file or folder in $TOPK_ATTENTION_DATA or ../shared/data; skips the test where it is absent."""
    path = Path(os.environ.get("TOPK_ATTENTION_DATA", _DEFAULT)) / name
    if not path.exists():
        pytest.skip(f"{name} is not in $TOPK_ATTENTION_DATA or ../shared/data")
    return path
