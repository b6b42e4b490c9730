"""Models that several processes share: as exact as one process, or refused in words."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

SCRIPT = Path(__file__).parents[1] / "support" / "many_processes.py"
FAMILIES = ("llama", "bert", "t5")
WORLDS = ("two", "four")
EVERY_TP = ("k per head, completed", "feed-forward, k = 5", "both", "biases and no gate", "checkpointed")
MORE_TP = ("one k", "k per head", "feed-forward, k = 24", "feed-forward, k = 100", "feed-forward, all")


@pytest.fixture(scope="module")
def found_by(tmp_path_factory):
    """What each process of each world found: a number or words by the name of a claim."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo, with which processes without a GPU talk to each other")
    pytest.importorskip("transformers.distributed.tensor_parallel", reason="transformers cuts models in another way")
    folder = tmp_path_factory.mktemp("shared")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", SCRIPT, folder],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    worlds = {"two": 2, "four": 4, "one": 1}
    return {
        name: [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(count)]
        for name, count in worlds.items()
    }


def of(found_by: dict[str, list[dict[str, Any]]], claim: str, *worlds: str) -> list[Any]:
    """What the processes of these worlds found; each must have looked."""
    return [found[claim] for world in worlds for found in found_by[world]]


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_weights_under_ddp_are_those_of_one_process(found_by, family, order):
    assert max(of(found_by, f"DDP, {family}, converted {order}", "two")) < 1e-4


@pytest.mark.parametrize(
    ("family", "how"),
    [
        *((family, how) for family in FAMILIES for how in ("converted before", "converted after, checkpointed")),
        *(("t5", how) for how in ("converted before, checkpointed", "converted after")),
    ],
)
def test_losses_and_weights_under_fsdp2_are_those_of_one_process(found_by, family, how):
    assert max(of(found_by, f"FSDP2, {family}, {how}", "two")) < 1e-4


def test_the_table_of_t5_serves_later_layers_of_four_processes(found_by):
    assert max(of(found_by, "FSDP2, t5, converted before, checkpointed", "four")) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_four_processes_and_one_take_up_a_distributed_checkpoint_of_two(found_by, family):
    assert max(of(found_by, f"checkpoint of two, {family}", "four", "one")) < 1e-4


@pytest.mark.parametrize("library", ["transformers", "accelerate"])
def test_what_libraries_shard_trains_as_in_one_process(found_by, library):
    found = [found.get(f"FSDP2 of {library}") for found in found_by["two"]]
    if None in found and library == "accelerate":
        pytest.skip("accelerate is not installed")
    assert max(found) < 1e-4


def test_a_frozen_model_is_converted_once_it_is_sharded(found_by):
    assert max(of(found_by, "FSDP2, frozen, converted after", "two")) < 1e-5


@pytest.mark.parametrize("setting", EVERY_TP)
def test_logits_and_gradients_of_a_cut_model_are_those_of_the_whole_one(found_by, setting):
    assert max(of(found_by, f"TP, {setting}", *WORLDS)) < 1e-4


@pytest.mark.parametrize("setting", MORE_TP)
def test_each_setting_of_a_cut_model_is_that_of_the_whole_one(found_by, setting):
    assert max(of(found_by, f"TP, {setting}", "two")) < 1e-4


def test_a_checkpoint_of_a_converted_model_is_cut_when_it_is_loaded(found_by):
    assert max(of(found_by, "TP, checkpoint of a converted model", *WORLDS)) < 1e-4


@pytest.mark.parametrize("way", ["greedy", "beams"])
def test_a_cut_model_writes_the_tokens_of_the_whole_one(found_by, way):
    assert set(of(found_by, f"TP, generate, {way}", *WORLDS)) == {0.0}


def test_of_tied_neurons_the_one_with_the_lower_index_is_kept_whoever_holds_it(found_by):
    assert set(of(found_by, "ties", *WORLDS)) == {0.0}


@pytest.mark.parametrize("what", ["a budget", "a fitted completion"])
def test_processes_that_share_batches_calibrate_as_one(found_by, what):
    assert max(of(found_by, f"calibrated, {what}", *WORLDS)) < 1e-12


def test_processes_that_share_batches_search_as_one(found_by):
    assert max(of(found_by, "calibrated, a search", "two")) < 1e-12


def test_processes_that_share_batches_fit_stand_ins_as_one(found_by):
    assert max(of(found_by, "stand-ins of all processes", *WORLDS)) < 1e-5


def test_a_cut_model_is_calibrated_with_the_heads_of_all_processes(found_by):
    assert max(of(found_by, "TP, calibrated", *WORLDS)) < 1e-3  # squares and differences of float32 gradients


REFUSED = {
    "network sharded by itself": "the network is sharded by itself (fully_shard); convert or restore before that",
    "restored after it was sharded by itself": "model.layers.0.mlp cannot be restored: the network is sharded",
    "gates apart": "is not cut by neurons: some hold gates, others the rest",
    "cut operand": "TypeError: query must be a tensor of this process alone, got DTensor",
    "calibrated neurons": "got model.layers.0.mlp cut over several processes (tensor parallel); load the model without",
    "stand-ins": "got model.layers.0.mlp cut over several processes (tensor parallel); load the model without tp_plan",
    "batches dealt out": "dealt out over processes; leave group out: then they measure all batches together",
    "hook on a cut network": "its first layer has a hook; leave its layers whole, or the network out with where=",
    "context_parallel": "RuntimeError: topk_attention cannot run within torch's context_par",
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_shared_is_refused_in_words(found_by, what):
    for words in of(found_by, what, "two"):
        assert REFUSED[what] in words


def test_context_parallel_leaves_nothing_behind(found_by):
    assert set(of(found_by, "afterwards", "two")) == {"no error"}
