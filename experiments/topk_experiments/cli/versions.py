"""The command that tries other versions of torch and transformers."""

from __future__ import annotations

from ..runs.records import Json
from ..runs.steps import Limits
from ..versions.matrix import VersionMatrix, run_matrix
from .application import app
from .options import new_console, taking


@app.command()
@taking(VersionMatrix, (Limits, "time_s"), time_s=600.0)
def versions(how: Json, limits: Json) -> None:
    """Run a part of the tests with other versions of torch and transformers, in pairs.

    Versions that are not installed are installed beside each other by pip, without what only a GPU needs. Records are
    appended to versions.jsonl; interrupted, the same command continues with the pairs that are missing. The table of
    the documentation is written from all records.
    """
    run_matrix(VersionMatrix(limits=Limits(**limits), **how), new_console())
