"""Whether the wheel of build/wheels works in fresh environments, of several versions of Python and torch.

    python tests/support/check_wheel.py [PYTHON==TORCH ...]    as in python3.13==2.14.1; by default this Python's

For each pair an environment in build/wheel-check/, with torch and the wheel with its extra `cli` from the package
index. There `topk-attention info` has to name the kernels, and `try_installed.py` to find every result as specified. An
environment that is there is used again. `--source` tries the other way, `pip install .` in isolation: with torch in the
environment it must have kernels, and where torch comes after the build it must warn and say the way out. What was found
is added to results/wheel/, from which the page on releases takes its table.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "results/wheel"
ENVIRONMENTS = ROOT / "build/wheel-check"
TRY = ROOT / "tests/support/try_installed.py"


def run(*command: str | Path, **options: Any) -> str:
    """What a command prints. Its environment has nothing of this one's Python."""
    ours = ("PYTHON", "TOPK_", "VIRTUAL_ENV")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    print("  " + " ".join(map(str, command)), flush=True)
    # From a folder that holds no package of this name.
    done = subprocess.run(command, cwd=ENVIRONMENTS, env=kept, capture_output=True, text=True, **options)
    if done.returncode:
        raise SystemExit(f"{done.stdout}{done.stderr}\ncheck_wheel: this command failed: {' '.join(map(str, command))}")
    return done.stdout + done.stderr


def environment_of(python: str, torch_version: str | None) -> Path:
    """The Python of an environment that holds this torch and none of our package; None is no torch."""
    folder = ENVIRONMENTS / f"{Path(python).name}-torch{torch_version}"
    ENVIRONMENTS.mkdir(parents=True, exist_ok=True)
    inside = folder / "bin/python"
    if not inside.exists():
        run(python, "-m", "venv", folder)
    wanted = ["numpy", *([f"torch=={torch_version}"] if torch_version else ["setuptools>=77"])]
    run(inside, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted)
    run(inside, "-m", "pip", "uninstall", "--quiet", "--yes", "topk-attention")
    return inside


def newest_wheel() -> Path:
    wheels = sorted((ROOT / "build/wheels").glob("topk_attention-*.whl"), key=lambda file: file.stat().st_mtime)
    if not wheels:
        raise SystemExit("there is no wheel in build/wheels: make wheel builds it")
    return wheels[-1]


def try_wheel(wheel: Path, python: str, torch_version: str) -> dict[str, Any]:
    inside = environment_of(python, torch_version)
    run(inside, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", f"{wheel}[cli]")
    kernels = kernels_in(run(inside.parent / "topk-attention", "info"))
    found = json.loads(run(inside, "-I", TRY).splitlines()[-1])
    return {"installed": "wheel", "wheel": wheel.name, "bytes": wheel.stat().st_size, "info": kernels, **found}


def try_source(python: str, torch_version: str) -> dict[str, Any]:
    """`pip install .` as pip does it by default, with torch there."""
    inside = environment_of(python, torch_version)
    run(inside, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", ROOT)
    return {"installed": "source, isolated", **json.loads(run(inside, "-I", TRY).splitlines()[-1])}


def try_source_before_torch(python: str, torch_version: str) -> dict[str, Any]:
    """Likewise where torch comes only after the build, as in an empty environment."""
    inside = environment_of(python, None)
    run(inside, "-m", "pip", "uninstall", "--quiet", "--yes", "torch")
    run(inside, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", ROOT)
    run(inside, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", f"torch=={torch_version}")
    versions = "import topk_attention, torch, platform; print(platform.python_version(), torch.__version__)"
    said = run(inside, "-c", versions)
    warning = re.search(r"UserWarning: (topk_attention runs without its compiled kernels.*)", said)
    if warning is None or "pip install --force-reinstall --no-deps --no-build-isolation ." not in warning[1]:
        raise SystemExit(f"the import does not warn of the missing kernels with the way out: {said}")
    version, of_torch = next(line.split() for line in said.splitlines() if re.fullmatch(r"[\d.]+ \S+", line))
    return {"installed": "source, isolated, before torch", "python": version, "torch": of_torch, "warning": warning[1]}


def kernels_in(info: str) -> str:
    found = re.search(r"^ *kernels: (\w+) in use", info, re.MULTILINE)
    if found is None:
        raise SystemExit(f"topk-attention info names no kernels:\n{info}")
    return found[1]


def write(record: dict[str, Any]) -> None:
    """The record joins those on file and takes the place of one of the same Python, torch and way of installing."""
    RECORDS.mkdir(parents=True, exist_ok=True)
    file = RECORDS / "environments.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    same = ("installed", "python", "torch")
    records = [other for other in records if any(other[name] != record[name] for name in same)] + [record]
    records.sort(key=lambda one: [one[name] for name in same], reverse=True)
    file.write_text("".join(json.dumps(one) + "\n" for one in records))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="*", metavar="PYTHON==TORCH")
    parser.add_argument("--source", action="store_true", help="try pip install . instead of the wheel")
    arguments = parser.parse_args()
    for pair in arguments.pairs or [f"{sys.executable}=={torch.__version__}"]:
        python, _, version = pair.partition("==")
        if not version:
            parser.error(f"needed a Python and a version of torch, as in python3.13==2.14.1, got {pair}")
        print(f"{python}, torch {version}")
        tries = [try_source, try_source_before_torch] if arguments.source else [try_wheel]
        for attempt in tries:
            found = attempt(newest_wheel(), python, version) if attempt is try_wheel else attempt(python, version)
            write({"date": time.strftime("%Y-%m-%d"), **found})
            print(json.dumps(found))


if __name__ == "__main__":
    main()
