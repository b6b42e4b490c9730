"""Models that several processes share: exact, or refused in words."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from convert_models import tiny_llama

SCRIPT = Path(__file__).parents[1] / "support" / "two_processes.py"


@pytest.fixture(scope="module")
def found_by_each_process(tmp_path_factory):
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo, with which processes without a GPU talk to each other")
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    tiny_llama(num_attention_heads=4).save_pretrained(folder)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", SCRIPT, folder],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    lines = [line.split(" ", 1) for line in done.stdout.splitlines() if line[:3] in ("0 {", "1 {")]
    assert len(lines) == 2, done.stderr[-3000:]
    return [json.loads(found) for _, found in sorted(lines)]


def test_k_per_head_is_cut_with_the_heads_of_each_process(found_by_each_process):
    for found in found_by_each_process:
        assert found["difference"] < 1e-4


def test_scales_per_head_are_cut_with_the_heads_of_each_process(found_by_each_process):
    for found in found_by_each_process:
        assert found["difference when completed"] < 1e-4


def test_a_network_that_is_cut_over_processes_is_left_alone_with_the_reason(found_by_each_process):
    for found in found_by_each_process:
        for problem in (found["network"], found["network by path"]):
            assert problem.startswith("ValueError")
            assert "is cut over several processes (tensor parallel)" in problem


def test_operands_that_are_cut_over_processes_are_refused(found_by_each_process):
    for found in found_by_each_process:
        assert found["cut operand"].startswith("TypeError: query must be a tensor of this process alone, got DTensor")


def test_context_parallel_is_refused_and_leaves_nothing_behind(found_by_each_process):
    for found in found_by_each_process:
        assert found["context_parallel"].startswith(
            "RuntimeError: topk_attention cannot run within torch's context_par"
        )
        assert found["afterwards"] == "no error"
