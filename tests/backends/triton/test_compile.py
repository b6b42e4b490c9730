"""The Triton kernels compile for GPUs that are not here, and what the compilers say of them stays within bounds."""

import json
import os
import subprocess
import sys
from pathlib import Path

SUPPORT = Path(__file__).parents[2] / "support"
CODE = """
import json, sys
from compile_triton import Case, compiled, distinct, launches
noted = launches(Case())
first = [x for x in distinct(noted) if x.kernel == "score_tiles_kernel"]
rows = [compiled(x, "sm_90") for x in first]
forward = len(launches(Case(), backward=False))
json.dump({"rows": rows, "forward": forward, "all": len(noted)}, sys.stdout)
"""


def test_both_passes_over_scores_compile_without_spills_and_few_instructions(tmp_path):
    """In a process without the interpreter, on tensors without memory. `make compile-triton` compiles all."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join([str(SUPPORT), *sys.path])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CODE], env=environment, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    most = {"maxima": 6.5, "bits": 8.0}
    assert {row["pass"] for row in found["rows"]} == set(most)
    for row in found["rows"]:
        assert row["spilled_bytes"] == 0
        assert row["shared_bytes"] <= 227 * 1024
        assert row["tensor_core"] == "wgmma"
        assert not row["tf32"]
        assert not row["float_atomics"]
        assert row["instructions_per_score"][0] <= most[row["pass"]]
    assert found["forward"] <= 400
