"""Other versions of a package, each in a folder of its own that goes in front of what is installed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from topk_attention.environment import package_version

from .without_cuda import stand_in_for_cuda

# What only a GPU needs. Without it PyPI's torch is a fifth of its size.
_OF_GPUS = re.compile(r"nvidia-|cuda-|triton")
_LAST_LINES = 3


class InstallationError(ValueError):
    """pip could not install a version."""


def folder_of(name: str, version: str, packages: Path) -> Path | None:
    """A folder with this version of a package; None where it is the one that is installed.

    It is made if it is missing, and appears whole or not at all.

    packages  the folder that holds these folders

    Raises:
        InstallationError: pip does not have it, or it is too large for the disk.
    """
    if _public(package_version(name)) == version:
        return None
    folder = packages / f"{name}-{version}"
    if folder.exists():
        return folder
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of an interrupted run
    _install(f"{name}=={version}", part)
    for requirement in missing_requirements(name, part):
        _install(requirement, part)
    if name == "torch":
        stand_in_for_cuda(part / "torch")
    part.rename(folder)
    return folder


def missing_requirements(name: str, folder: Path) -> list[str]:
    """What a package in a folder requires, and neither the folder nor the environment has; extras do not count."""
    (package,) = (one for one in metadata.distributions(path=[str(folder)]) if one.metadata["Name"] == name)
    missing = []
    for line in package.requires or ():
        requirement = Requirement(line)
        if _OF_GPUS.match(requirement.name) or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        there = package_version(requirement.name)
        if there is None or not requirement.specifier.contains(there, prereleases=True):
            missing.append(f"{requirement.name}{requirement.specifier}")
    return missing


def _public(version: str | None) -> str | None:
    """2.13.0 of 2.13.0+cpu."""
    return version and version.partition("+")[0]


def _install(requirement: str, folder: Path) -> None:
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-compile", "--target", str(folder)]
    pip = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, requirement], capture_output=True, text=True, check=False
    )
    if pip.returncode:
        last = [line for line in pip.stderr.splitlines() if line.startswith("ERROR")] or pip.stderr.splitlines()
        raise InstallationError(f"{requirement} cannot be installed: {'; '.join(last[-_LAST_LINES:])}")
