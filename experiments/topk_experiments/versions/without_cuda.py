"""Lets a torch that was built for CUDA run on the processor alone, without the gigabytes of CUDA's libraries.

On Linux, PyPI's torch is such a build. Its code for the processor is whole, but the loader wants every library that the
code for GPUs asks for. Small libraries stand in for them: they have the names and the versions of the functions that
torch asks for, and each function answers that there is no GPU. PyTorch then finds no device, as on any machine without.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import defaultdict
from pathlib import Path

# What every Linux with a C++ compiler has.
_OF_THE_SYSTEM = re.compile(r"(lib(c|m|dl|rt|pthread|util|gcc_s|stdc\+\+|gomp)|ld-linux[\w-]*)\.so")
# Of the driver: torch loads what needs it when a GPU is first used.
_OF_THE_DRIVER = "libcuda.so.1"
# cudaErrorNoDevice: to torch a machine without a GPU.
_NO_DEVICE = "long {}(void) {{ return 100; }}\n"
# Of the functions that say in words what a number means torch reads the answer.
_GIVES_WORDS = re.compile(r"String$|Name$|ncclGetLastError$")
_IN_WORDS = 'const char *{}(void) {{ return "no GPU"; }}\n'


def stand_in_for_cuda(torch_folder: Path) -> list[str]:
    """Put a stand-in beside torch's libraries for each one that they need and that is not there.

    torch_folder  the package `torch` as it was unpacked

    Returns the names of the libraries: none for a build for processors alone.

    Raises:
        FileNotFoundError: readelf or cc is missing.
    """
    folder = torch_folder / "lib"
    libraries = sorted(folder.glob("*.so*"))
    there = {library.name for library in libraries}
    needed = {name for library in libraries for name in _needed(library)}
    missing = sorted(name for name in needed - there if not _OF_THE_SYSTEM.match(name) and name != _OF_THE_DRIVER)
    if not missing:
        return []
    asked_for: dict[str, dict[str, set[str]]] = {name: defaultdict(set) for name in missing}
    without_version: set[str] = set()
    defined: set[str] = set()
    for library in libraries:
        has_version = _versions(library)
        for name, version, is_defined in _functions(library):
            if is_defined:
                defined.add(name)
            elif not version:
                without_version.add(name)
            elif has_version.get(version) in asked_for:
                asked_for[has_version[version]][version].add(name)
    # The loader does not care which library has a function without a version. Names in C++ are torch's own.
    others = {name for name in without_version - defined if not name.startswith("_Z")}
    for number, (name, versions) in enumerate(asked_for.items()):
        _write(folder / name, versions, others if number == 0 else set())
    return missing


def _needed(library: Path) -> list[str]:
    return re.findall(r"\(NEEDED\).*\[(.*)\]", _readelf("--dynamic", library))


def _versions(library: Path) -> dict[str, str]:
    """Version of functions -> the library that a library expects it of."""
    found, of = {}, ""
    for line in _readelf("--version-info", library).splitlines():
        if file := re.search(r" File: (\S+) +Cnt:", line):
            of = file[1]
        elif name := re.search(r" Name: (\S+) +Flags:.* Version: \d+$", line):
            found[name[1]] = of
    return found


def _functions(library: Path) -> list[tuple[str, str, bool]]:
    """Of each function that a library shares: its name, its version, and whether the library itself has it."""
    found = []
    for line in _readelf("--dyn-syms", library).splitlines():
        fields = line.split()
        if len(fields) >= 8 and fields[0].rstrip(":").isdigit():
            name, _, version = fields[7].partition("@")
            found.append((name, version.lstrip("@"), fields[6] != "UND"))
    return found


def _readelf(what: str, library: Path) -> str:
    return subprocess.run(["readelf", "--wide", what, library], capture_output=True, text=True, check=True).stdout


def _write(library: Path, versions: dict[str, set[str]], others: set[str]) -> None:
    names = sorted(others.union(*versions.values()))
    with tempfile.TemporaryDirectory() as folder:
        source, script = Path(folder) / "stand_in.c", Path(folder) / "versions"
        source.write_text(
            "".join((_IN_WORDS if _GIVES_WORDS.search(name) else _NO_DEVICE).format(name) for name in names)
        )
        script.write_text("".join(f"{one} {{ {'; '.join(sorted(of))}; }};\n" for one, of in versions.items()))
        options = ["-shared", "-fPIC", "-w", f"-Wl,-soname,{library.name}"]
        options += [f"-Wl,--version-script={script}"] if versions else []
        subprocess.run(["cc", *options, "-o", library, source], check=True)
