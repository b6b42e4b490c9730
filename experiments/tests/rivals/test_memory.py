"""Neither random features nor chunks of queries form a matrix of queries x keys."""

import itertools

import pytest
import torch

from topk_experiments.rivals import new_attention


def peak_bytes(function):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def peak_of_a_step(name, length, is_causal, with_gradient):
    attention = new_attention(name, head_dim=8, num_features=16, query_chunk_size=64)
    tensors = [torch.randn(1, 1, length, 8, requires_grad=with_gradient) for _ in range(3)]

    def step():
        with torch.set_grad_enabled(with_gradient):
            output = attention(*tensors, is_causal=is_causal)
        if with_gradient:
            output.sum().backward()

    step()
    return peak_bytes(step)


@pytest.mark.parametrize("with_gradient", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", ["performer", "rfa", "vanilla-chunks"])
def test_memory_is_linear_in_length(name, is_causal, with_gradient):
    short, long = (peak_of_a_step(name, length, is_causal, with_gradient) for length in (2048, 8192))
    assert long < 4.4 * short
    assert long < 8192 * 8192 * 4 / 16


@pytest.mark.parametrize("name", ["performer", "rfa"])
def test_without_gradients_a_few_chunks_are_held_beside_the_output(name):
    output_bytes = 8192 * 8 * 4
    assert peak_of_a_step(name, 8192, is_causal=True, with_gradient=False) < 1.5 * output_bytes
