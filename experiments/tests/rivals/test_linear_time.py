"""Tensors are split and joined once: no chunk allocates a tensor of the full length."""

import itertools

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from topk_experiments.rivals import new_attention

HEADS, HEAD_DIM, CHUNK = 2, 8, 16


def bytes_of_a_step(name, length, is_causal):
    """All that a forward and backward pass allocates, one after the other."""
    torch.manual_seed(0)
    attention = new_attention(name, head_dim=HEAD_DIM, num_features=16, query_chunk_size=CHUNK)
    tensors = [torch.randn(1, HEADS, length, HEAD_DIM, requires_grad=True) for _ in range(3)]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        attention(*tensors, is_causal=is_causal).sum().backward()
    return sum(max(event.self_cpu_memory_usage, 0) for event in profiler.events())


@pytest.mark.parametrize(("name", "is_causal"), list(itertools.product(["performer", "rfa"], [False, True])))
def test_what_random_features_allocate_is_linear_in_length(name, is_causal):
    short, long = (bytes_of_a_step(name, length, is_causal) for length in (512, 2048))
    assert long < 4.4 * short
