"""The command `topk-attention`."""

from __future__ import annotations

try:
    from . import commands  # noqa: F401 - its commands
    from .application import app
except ModuleNotFoundError as error:
    if error.name not in ("typer", "rich"):
        raise
    _missing = error.name

    def app() -> None:  # type: ignore[misc]
        """Stands in for the command line where the packages it needs are missing."""
        raise SystemExit(
            f"error: {_missing} is not installed; in the folder of the clone: pip install --no-build-isolation '.[cli]'"
        )


__all__ = ["app"]
