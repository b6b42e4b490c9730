"""One sequence over two and four processes: outputs, gradients and errors of one process, and bytes as counted."""

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
from topk_attention import convert, topk_attention
from topk_attention.distributed import sequence_parallel, sequence_parallel_cost
from topk_attention.distributed.spans import spans_of

SCRIPT = Path(__file__).parents[1] / "support" / "sequence_processes.py"
NUMBERS = (2, 4)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each process of each number of processes found."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo, with which processes without a GPU talk to each other")
    if not hasattr(os, "fork"):
        pytest.skip("this system cannot fork processes")
    folder = tmp_path_factory.mktemp("processes")
    command = [sys.executable, "-W", "error::FutureWarning:torch", SCRIPT, folder, *map(str, NUMBERS)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=400, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {n: [json.loads((folder / f"{n}-{rank}.json").read_text()) for rank in range(n)] for n in NUMBERS}


@pytest.fixture(params=NUMBERS, ids=lambda n: f"{n} processes")
def processes(request, found):
    return found[request.param]


def test_outputs_and_gradients_are_those_of_one_process(processes):
    errors = processes[0]["attention"]
    assert len(errors) > 60
    assert {name: error for name, error in errors.items() if not error < 1e-12} == {}


def test_dropout_drops_the_weights_that_one_process_drops(processes):
    errors = processes[0]["attention"]
    assert all(error < 1e-12 for name, error in errors.items() if name.startswith("dropout"))
    assert processes[0]["seed"] < 1e-12


def test_shards_join_to_the_whole_in_both_orders(processes):
    for found_by_rank in processes:
        assert found_by_rank["shards"]["zigzag"] == found_by_rank["shards"]["contiguous"] == [True, True, True]


def test_zigzag_gives_all_ranks_as_many_visible_keys(processes):
    assert len({found_by_rank["shards"]["visible keys of all queries"] for found_by_rank in processes}) == 1


def test_under_autocast_outputs_are_off_by_one_rounding_at_most(processes):
    for found_by_rank in processes:
        for dtype, error in found_by_rank["low precision"].values():
            assert dtype == "torch.bfloat16"
            assert error <= 2**-8


def test_bytes_and_memory_are_as_counted_on_paper(processes):
    for found_by_rank in processes:
        assert len(found_by_rank["cost"]) == 18
        for name, (counted, on_paper) in found_by_rank["cost"].items():
            assert counted == on_paper, name


ERRORS = {
    "k that one rank alone has wrong": "ValueError: k must be at least 1 and below 2^31, got 0 (rank {last} of {n})",
    "another k": "ValueError: k must be the same on every rank, got 2 on rank 0 and 3 on rank 1",
    "another order": "ValueError: order must be the same on every rank, got zigzag on rank 0 and contiguous on rank 1",
    "unknown order": 'ValueError: order must be "zigzag" or "contiguous", got \'spiral\'',
    "unknown method": 'ValueError: method must be "auto", "heads" or "keys", got \'ring\'',
    "heads that ranks do not divide": 'ValueError: method="heads" needs a number of heads that the {n} ranks divide',
    "lengths": "ValueError: query must have [",
    "key lengths": "ValueError: key must have [",
    "dtype": "ValueError: query must be the same on every rank, got torch.float32 [1, 4, tokens, 8] on rank 0 and",
    "three axes": "ValueError: query must have shape [batch, heads, tokens, size], got [4, 8, 8]",
    "key heads": "ValueError: key must have shape [1, 4, M, 8] to match query, got [1, 2, 8, 8]; fewer key heads need",
    "mask of all queries": "ValueError: attn_mask must have shape [1, 1, 1, 8], one number for each key of this rank",
    "mask of ints": "TypeError: attn_mask must be bool (True = may attend) or float (added to the scores), got",
    "masks of two kinds": "ValueError: attn_mask must have one dtype and number of sequences on all ranks, got",
    "dense bias": "TypeError: bias must be RelativeBias, BucketedBias, ALiBi or None where several processes share a",
    "bias of other heads": "ValueError: bias must be for 1 head or 4 heads to match query, got 3",
    "k of other heads": "ValueError: k must hold one number for each of the 4 query heads, got 2",
    "sinks of other heads": "ValueError: sinks must have shape [4], one number for each head, got [2]",
    "completion of other heads": "ValueError: completion must hold one mass_scale for each of the 4 query",
    "another seed": "ValueError: dropout_seed must be the same on every rank, got [0, 1",
    "no seed": "TypeError: dropout_seed must be an int, a tensor or None, got float",
    "dropout": "ValueError: dropout_p must be at least 0 and below 1, got 1.5",
    "gradients": "ValueError: requires_grad of query, key and value must be the same on every rank, got",
    "mesh": "TypeError: mesh must be a DeviceMesh or a process group, got str 'cp'",
    "axis": "ValueError: dim must be an axis of the tensor [1, 4, 8, 8], got 7",
    "order of shards": 'ValueError: order must be "zigzag" or "contiguous", got \'spiral\'',
    "lengths of shards": "ValueError: tensor must have [",
    "batch": "ValueError: batch must hold tensors [batch, tokens, ...] of one number of tokens, got {{",
    "batch without labels": "ValueError: shift_labels=True needs labels in the batch, got input_ids",
    "afterwards": "no error",
}


def test_every_rank_raises_the_same_error_and_none_waits(processes):
    for found_by_rank in processes:
        assert found_by_rank["errors"] == processes[0]["errors"]
    assert processes[0]["errors"].keys() == ERRORS.keys()
    for name, expected in ERRORS.items():
        assert processes[0]["errors"][name].startswith(expected.format(n=len(processes), last=len(processes) - 1)), name


@pytest.mark.parametrize("how", ["zigzag", "contiguous", "gradient checkpointing"])
@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_a_model_has_the_loss_and_the_gradients_of_one_process(processes, family, how):
    of_model = processes[0]["models"][f"{family}, {how}"]
    assert of_model["loss"] < 2e-6  # transformers computes it in float32
    assert of_model["gradients"] < 1e-6 if family == "bert" else 1e-12


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_the_context_leaves_nothing_behind(processes, family):
    assert processes[0]["models"][f"{family}, afterwards"] == 0
    assert processes[0]["other models"]["another forward pass after it"] == "no error"


def test_steps_under_distributed_data_parallel_are_those_of_one_process(processes):
    assert processes[0]["other models"]["steps with DistributedDataParallel"] < 2e-6


def test_attention_of_a_model_drops_the_weights_that_one_process_drops(processes):
    assert processes[0]["other models"]["dropout of attention"] < 2e-6


REFUSED = {
    "not converted": 'ValueError: model must run top-k attention, but LlamaForCausalLM has attn_implementation="sdpa"',
    "without positions": "ValueError: position_ids must be given within sequence_parallel",
    "unknown order": 'ValueError: order must be "zigzag" or "contiguous"',
    "unknown method": 'ValueError: method must be "auto", "heads" or "keys"',
    "twice": "RuntimeError: model is within sequence_parallel already",
    "wrapped": "ValueError: model must be a model of transformers, whose forward takes input_ids or inputs_embeds",
    "mask of numbers": "ValueError: LlamaAttention cannot share a sequence with other processes",
    "a cache that goes on": "ValueError: LlamaAttention cannot share a sequence with other processes",
    "windows": "ValueError: model must attend to whole sequences, but LlamaForCausalLM has layers of type sliding",
    "convolution": "ValueError: model must pass nothing from token to token but by attention of its layers, but",
    "backward pass after the context": "RuntimeError: this layer is computed again for its backward pass",
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_would_be_wrong_in_shards_is_refused(processes, what):
    for found_by_rank in processes:
        assert found_by_rank["other models"][what].startswith(REFUSED[what])


def test_a_step_with_accelerate_has_the_gradients_of_one_process(processes):
    of_accelerate = processes[0]["accelerate"]
    if "missing" in of_accelerate:
        pytest.skip(f"accelerate is not installed: {of_accelerate['missing']}")
    assert of_accelerate["gradients"] < 1e-12


def test_steps_of_the_trainer_give_the_weights_of_one_process(found):
    of_accelerate = found[2][0]["accelerate"]
    if "missing" in of_accelerate:
        pytest.skip(f"accelerate is not installed: {of_accelerate['missing']}")
    assert of_accelerate["trainer"] < 1e-12


def test_zigzag_parts_cover_a_sequence_once_and_differ_by_at_most_two_tokens():
    for length in (0, 1, 5, 16, 37):
        for num_ranks in (1, 2, 3, 4):
            for order in ("zigzag", "contiguous"):
                spans = [spans_of(length, rank, num_ranks, order) for rank in range(num_ranks)]
                assert sorted(i for of_rank in spans for span in of_rank for i in span) == list(range(length))
                lengths = [sum(map(len, of_rank)) for of_rank in spans]
                assert max(lengths) - min(lengths) <= (2 if order == "zigzag" else 1)


def test_fewer_bytes_decide_between_the_methods():
    llama = {"num_heads": 32, "num_key_heads": 8, "head_dim": 128, "k": 64, "dtype": torch.bfloat16}
    for num_ranks in (2, 4, 8, 16, 32, 64):
        costs = {}
        for method in ("heads", "keys", "auto"):
            if num_ranks == 64 and method == "heads":  # 64 does not divide 32 heads
                with pytest.raises(ValueError, match='method must be "auto", "keys" or'):
                    sequence_parallel_cost(1_000_000, num_ranks=num_ranks, method="heads", **llama)
                continue
            costs[method] = sequence_parallel_cost(1_000_000, num_ranks=num_ranks, method=method, **llama)
        sent = {method: cost.forward_bytes + cost.backward_bytes for method, cost in costs.items()}
        assert sent["auto"] == min(sent.values())
    assert sequence_parallel_cost(1_000_000, num_ranks=2, **llama).method == "keys"  # few key heads
    assert sequence_parallel_cost(1_000_000, num_ranks=8, **llama).method == "heads"
    assert sequence_parallel_cost(1_000_000, num_ranks=64, **llama).method == "keys"


def test_cost_names_a_number_that_cannot_be():
    with pytest.raises(ValueError, match="rank must be from 0 to 7, got 8"):
        sequence_parallel_cost(100, num_ranks=8, num_heads=8, k=4, head_dim=16, rank=8)
    with pytest.raises(ValueError, match="length must be at least 1"):
        sequence_parallel_cost(0, num_ranks=8, num_heads=8, k=4, head_dim=16)
    with pytest.raises(ValueError, match="order must be"):
        sequence_parallel_cost(100, num_ranks=8, num_heads=8, k=4, head_dim=16, order="spiral")


def test_a_seed_repeats_the_draw_of_a_call(dropout_inputs):
    query, seed = dropout_inputs
    first = topk_attention(query, query, query, k=4, dropout_p=0.5, dropout_seed=seed)
    again = topk_attention(query, query, query, k=4, dropout_p=0.5, dropout_seed=torch.tensor([seed]))
    other = topk_attention(query, query, query, k=4, dropout_p=0.5, dropout_seed=seed + 1)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.fixture
def dropout_inputs():
    torch.manual_seed(0)
    return torch.randn(1, 2, 16, 8), 123456789


@pytest.mark.parametrize(
    ("seed", "kind", "words"),
    [
        (-1, ValueError, "dropout_seed must be at least 0 and below 2\\^63, got -1"),
        (True, TypeError, "dropout_seed must be an int, a tensor or None, got bool"),
        (
            torch.tensor([1, 2]),
            TypeError,
            "dropout_seed must be an int64 tensor of one number, got torch.int64 \\[2\\]",
        ),
    ],
)
def test_a_seed_that_is_none_is_an_error(dropout_inputs, seed, kind, words):
    query, _ = dropout_inputs
    with pytest.raises(kind, match=words):
        topk_attention(query, query, query, k=4, dropout_seed=seed)


def test_without_a_mesh_the_context_says_what_it_needs():
    model = tiny_llama()
    convert(model, attention_k=4)
    with (
        pytest.raises(TypeError, match="mesh must be a DeviceMesh or a process group, got str 'cp'"),
        sequence_parallel(model, "cp"),
    ):
        pass
