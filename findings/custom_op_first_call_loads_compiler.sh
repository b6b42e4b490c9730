#!/usr/bin/env bash
# torch 2.13.0: the first eager call of an operator made with torch.library.custom_op imports torch._dynamo.
#
# Nothing is compiled and no gradient is asked for. Seen on Linux, Python 3.11: before the call torch._dynamo is not among
# the loaded modules; after it it is, with some 800 modules more, about 70 MiB more resident memory and about a second
# of time. Later calls cost nothing of this. An operator registered from C++ does not do it.
#
# Fails if the call loads no compiler any more, or if importing torch or defining the operator loads it already.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.2
"$folder/venv/bin/python" - <<'PYTHON'
import sys
import time

import torch


@torch.library.custom_op("example::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


x = torch.ones(3)
assert "torch._dynamo" not in sys.modules, "loaded before the first call"
modules, start = len(sys.modules), time.perf_counter()
twice(x)
seconds = time.perf_counter() - start
assert "torch._dynamo" in sys.modules, "the first call loads no compiler any more"
print(f"torch {torch.__version__}: first call {seconds:.2f} s, {len(sys.modules) - modules} modules more")
start = time.perf_counter()
twice(x)
print(f"second call {time.perf_counter() - start:.5f} s")
PYTHON
