"""Which pairs of versions are missing on file, and the record of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

from topk_attention.environment import package_version

from ..runs.ledger import Ledger, made_when
from ..runs.progress import say
from ..runs.records import Json
from ..runs.steps import Limits
from .packages import folder_of
from .report import FILE, SCHEMA, in_words, report
from .suite import CLAIMS, run_suite

if TYPE_CHECKING:
    from rich.console import Console

# The first is what pyproject.toml promises, the last the newest that was there; the installed version comes on top.
TORCH = ("2.10.0", "2.12.1", "2.14.1")
TRANSFORMERS = ("5.20.0", "5.21.0", "5.22.0", "5.24.0")


class Pair(NamedTuple):
    """Two versions that are used together."""

    torch: str
    transformers: str


@dataclass(frozen=True, kw_only=True)
class VersionMatrix:
    """Which versions to try.

    limits  time of a pair
    """

    torch: Annotated[Sequence[str], "Versions of torch, beside the installed one."] = TORCH
    transformers: Annotated[Sequence[str], "Versions of transformers, beside the installed one."] = TRANSFORMERS
    every_pair: Annotated[
        bool, "Try every pair. Default: those with an installed version, and the oldest and newest with each other."
    ] = False
    out: Annotated[Path, "Folder for the results."] = Path("results/versions")
    packages: Annotated[Path, "Folder for the versions that are not installed, up to 2 GB for a torch."] = Path(
        "build/versions"
    )
    limits: Limits = Limits(600.0)  # noqa: RUF009 - frozen
    fresh: Annotated[bool, "Run again what is on file."] = False


def run_matrix(matrix: VersionMatrix, console: Console) -> list[Json]:
    """Run a part of the suite with every pair that is not on file, append its record to `versions.jsonl`, and write the
    table.

    Raises:
        ValueError: pip does not have a version, or the tests are not in the current folder.
    """
    tests = Path("tests")
    if not (tests / "convert").is_dir():
        raise ValueError(
            f"versions runs the tests of the repository, and there are none in {tests.resolve()}; go there"
        )
    chosen = pairs(matrix)
    ledger = Ledger(matrix.out / FILE, schema=SCHEMA, folder=Path(__file__).parent, also=[tests], fresh=matrix.fresh)
    on_file = {pair: ledger.find(configuration(pair), spares=matrix.limits.spare) for pair in chosen}
    missing = [pair for pair, record in on_file.items() if record is None]
    spared = [record for record in on_file.values() if record is not None]
    say(console, f"{len(chosen)} pairs of versions, {len(spared)} of them on file, {len(missing)} to try")
    if spared:
        say(console, made_when(spared[-1]))
    for pair in missing:
        made = {name: folder_of(name, version, matrix.packages) for name, version in pair._asdict().items()}
        folders = [folder.resolve() for folder in made.values() if folder is not None]
        found = run_suite(folders, CLAIMS, matrix.limits.time_s)
        if found["outcome"] == "finished":
            _check_versions(pair, found["ran_with"])
        stopped = {} if found["outcome"] == "finished" else {"time_limit_s": matrix.limits.time_s}
        ledger.append(ledger.new_record(configuration(pair)) | found | stopped)
        say(console, f"torch {pair.torch}, transformers {pair.transformers}: {in_words(ledger.records[-1])}")
        report(matrix.out)
    for path in report(matrix.out):
        say(console, f"Written: {path}")
    say(console, f"Records: {ledger.path}")
    return [record for pair in chosen if (record := ledger.find(configuration(pair), spares=lambda _: True))]


def configuration(pair: Pair) -> Json:
    """What identifies the record of a pair."""
    return {"versions": pair._asdict()}


def pairs(matrix: VersionMatrix) -> list[Pair]:
    """The pairs to try: the oldest and newest with each other, which tell most, and then the others."""
    torch, here_torch = _with_installed("torch", matrix.torch)
    transformers, here_transformers = _with_installed("transformers", matrix.transformers)
    every = [Pair(one, other) for one in torch for other in transformers]
    of_ends = [
        one
        for one in every
        if one.torch in (torch[0], torch[-1]) and one.transformers in (transformers[0], transformers[-1])
    ]
    others = [
        one for one in every if matrix.every_pair or one.torch == here_torch or one.transformers == here_transformers
    ]
    return list(dict.fromkeys([*of_ends, *others]))


def _with_installed(name: str, versions: Sequence[str]) -> tuple[list[str], str]:
    """All versions in their order, and the installed one."""
    here = (package_version(name) or "").partition("+")[0]
    for version in versions:
        if not all(number.isdecimal() for number in version.split(".")):
            raise ValueError(f"{name} must be versions such as {here}, separated by commas, got {version!r}")
    return sorted({*versions, here}, key=lambda version: [int(number) for number in version.split(".")]), here


def _check_versions(pair: Pair, ran_with: Json) -> None:
    for name, version in pair._asdict().items():
        if str(ran_with[name]).partition("+")[0] != version:
            raise ValueError(f"the tests ran with {name} {ran_with[name]} in place of {version}; look at PYTHONPATH")
