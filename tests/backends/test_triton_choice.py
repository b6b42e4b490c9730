"""When "auto" takes the Triton kernels, what it says otherwise, and how calls are cut for them, all without Triton."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from topk_attention import Completion, backends, topk_attention
from topk_attention.backends import choose_backend, triton
from topk_attention.backends.calls import AttentionCall, FeedForwardCall
from topk_attention.backends.triton import plan

NEEDS_NO_INTERPRETER = pytest.mark.skipif(triton.IS_INTERPRETED, reason="in the interpreter CPU tensors are taken")


def attention_call(dtype=torch.bfloat16, head_dim=8, **options):
    query, key, value = (torch.randn(1, 2, length, head_dim).to(dtype) for length in (5, 9, 9))
    call = AttentionCall(query, key, value, (3, 3), None, None, None, False, 0.5, 0.0, None, None, False)
    return replace(call, **options)


@pytest.fixture
def a_gpu(monkeypatch):
    """A machine with a GPU, Triton, and tensors that say they are on it."""
    monkeypatch.setattr(backends, "_device", lambda call: "cuda")
    monkeypatch.setattr(triton, "_IS_INSTALLED", True)
    monkeypatch.setattr(triton, "IS_INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton, "_capability_of", lambda device: (9, 0))
    return monkeypatch


@pytest.mark.usefixtures("a_gpu")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_auto_takes_it_on_a_gpu_within_the_tested_range(dtype):
    choice = choose_backend("auto", attention_call(dtype))
    assert choice.name == "triton"
    assert "within the range that the Triton kernels are tested for" in choice.reason


OUTSIDE = {
    "float64": (attention_call(torch.float64), "take float16, bfloat16 and float32, got torch.float64"),
    "head size": (attention_call(head_dim=257), "head sizes up to 256, got 257"),
    "k": (attention_call(head_k=(1025, 3)), "k up to 1024, got 1025"),
    "completion": (attention_call(mass_scale=torch.ones(2)), "complete nothing"),
    "cap and mask": (attention_call(softcap=2.0, attn_mask=torch.zeros(1, 1, 1, 9)), "every score is capped"),
    "no k": (attention_call(head_k=None), "full attention"),
}


@pytest.mark.usefixtures("a_gpu")
@pytest.mark.parametrize("name", OUTSIDE)
def test_auto_says_why_it_takes_another_on_a_gpu(name):
    call, words = OUTSIDE[name]
    choice = choose_backend("auto", call)
    assert choice.name == ("sdpa" if name == "no k" else "chunked")
    assert words in choice.reason


@pytest.mark.usefixtures("a_gpu")
@pytest.mark.parametrize("name", [name for name in OUTSIDE if name != "no k"])
def test_by_name_what_the_kernels_do_not_have_is_chunked_with_the_reason(name):
    call, words = OUTSIDE[name]
    choice = choose_backend("triton", call)
    assert choice.name == "chunked"
    assert words in choice.reason


def test_without_triton_or_on_an_old_gpu_it_is_chunked(a_gpu):
    a_gpu.setattr(triton, "_capability_of", lambda device: (7, 5))
    choice = choose_backend("auto", attention_call())
    assert choice == ("chunked", "the Triton kernels need compute capability 8.0, got 7.5")
    a_gpu.setattr(triton, "_IS_INSTALLED", False)
    choice = choose_backend("auto", attention_call())
    assert choice.name == "chunked"
    assert "the package triton is not installed" in choice.reason
    with pytest.raises(RuntimeError, match='backend="triton" cannot run here: the package triton is not installed'):
        choose_backend("triton", attention_call())


@pytest.mark.usefixtures("a_gpu")
def test_feed_forward_layers_are_chunked_on_a_gpu():
    tensors = [torch.randn(shape) for shape in ((5, 3), (7, 3), (2, 7))]
    call = FeedForwardCall(*tensors, None, None, None, None, 3, "relu", 0.0, None, None)
    for requested in ("auto", "triton"):
        choice = choose_backend(requested, call)
        assert choice.name == "chunked"
        assert "for attention alone" in choice.reason


@NEEDS_NO_INTERPRETER
def test_by_name_it_wants_tensors_on_a_gpu(monkeypatch):
    monkeypatch.setattr(triton, "problem", lambda: None)
    with pytest.raises(ValueError, match='backend="triton" needs tensors on a GPU, got cpu; move them or use'):
        topk_attention(*(torch.randn(1, 2, 5, 4) for _ in range(3)), k=2, backend="triton")


@NEEDS_NO_INTERPRETER
def test_without_a_gpu_the_error_names_the_interpreter(monkeypatch):
    monkeypatch.setattr(triton, "_IS_INSTALLED", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="there is no GPU, and Triton's interpreter is off"):
        choose_backend("triton")


def test_completion_by_name_is_that_of_chunked(monkeypatch):
    monkeypatch.setattr(triton, "problem", lambda: None)
    monkeypatch.setattr(triton, "IS_INTERPRETED", True)
    inputs = [torch.randn(1, 2, 9, 4) for _ in range(3)]
    expected = topk_attention(*inputs, k=2, completion=Completion(), backend="chunked")
    assert torch.equal(topk_attention(*inputs, k=2, completion=Completion(), backend="triton"), expected)


@NEEDS_NO_INTERPRETER
def test_the_library_imports_no_triton():
    code = (
        "import sys, torch, topk_attention;"
        "topk_attention.topk_attention(*(torch.randn(1, 2, 5, 4) for _ in range(3)), k=2);"
        "assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def planned(length, heads=32, key_heads=8, k=64, queries=None, **options):
    given = {"itemsize": 2, "adds": False, "saves": True, "processors": 132, **options}
    return plan.make_plan(1, heads, key_heads, queries or length, length, 128, k, **given)


def test_scratch_memory_is_linear_in_length():
    at = {length: planned(length).scratch_bytes for length in (2**n for n in range(10, 21))}
    assert max(at.values()) <= plan.SLAB_BYTES + 128 * planned(2**20).bytes_of_row
    for length in (2**18, 2**19):  # one tile's rows grow with the keys alone
        ratio = planned(2 * length).bytes_of_row / planned(length).bytes_of_row
        assert 1 < ratio < 2.01
    assert planned(2**16).bytes_of_row < 2**16  # a byte a score would be more


@pytest.mark.parametrize("k", [1, 16, 64, 256, 1024])
@pytest.mark.parametrize("length", [1, 31, 1000, 8192, 100_000])
def test_there_is_room_for_every_candidate_but_ties(length, k):
    """k groups reach a threshold, and others only with a maximum equal to it."""
    k = min(k, length)
    made = planned(length, k=k)
    assert made.capacity >= min(length, k * made.group_keys)
    assert made.num_groups * made.group_keys >= length
    assert made.num_words * 32 >= length
    assert made.splits * made.keys_of_split >= length
    assert made.few <= made.capacity
    assert made.few >= min(made.capacity, k)


def test_a_few_queries_of_a_long_text_keep_all_processors_busy():
    made = planned(131_072, queries=1)
    assert made.tile_rows == 16
    assert made.num_tiles == 8
    assert made.num_tiles * made.splits >= 132


def test_parts_of_the_backward_pass_have_each_key_head_once(monkeypatch):
    monkeypatch.setattr(plan, "SORTED_ENTRIES", 100)
    parts = plan.parts_of_backward([3, 1, 2, 2], 3, 2, 9)
    assert [x for part in parts for x in part.key_heads] == list(range(6))
    assert [x for part in parts for x in part.entries] == list(range(3 * 9 * 8))
    assert all(len(part.entries) <= 100 for part in parts)
    assert len(parts) > 1
