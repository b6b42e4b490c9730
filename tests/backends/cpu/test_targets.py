"""The kernels of each CPU target do what the reference does, at the sizes where their panels, tiles and samples end."""

import pytest
import torch

from comparison import (
    CALL_NAMES,
    Sizes,
    assert_same,
    assert_within_measured_allowance,
    attention_inputs,
    largest_errors,
    named_call,
    output_and_gradients,
)
from large_calls import assert_equals_the_reference, assert_keeps_what_the_reference_keeps, integer_inputs
from topk_attention import topk_attention
from topk_attention.backends import cpu

# Panels hold 4 to 32 keys; up to 512 visible keys the sample is all of them.
NUM_KEYS = pytest.mark.parametrize("num_keys", [1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 511, 512, 513, 1100, 5000])
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def ks_of(num_keys):
    """One, a few, a sample's worth, more than half, all but one, all."""
    return sorted({k for k in (1, 5, 64, num_keys // 2 + 1, num_keys - 1, num_keys) if 1 <= k <= num_keys})


@NUM_KEYS
@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
def test_outputs_and_gradients_are_those_of_the_reference(cpu_targets, is_causal, num_keys):
    inputs = attention_inputs(Sizes(1, 2, 1, 13, num_keys, 5, 4))
    for k in ks_of(num_keys):
        assert_equals_the_reference(*inputs, targets=cpu_targets, k=k, is_causal=is_causal, enable_gqa=True)


@NUM_KEYS
@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
def test_of_many_ties_the_keys_of_the_reference_are_kept(cpu_targets, is_causal, num_keys):
    inputs, tried = integer_inputs(1, 2, 2, 19, num_keys, 6, 1), {"targets": cpu_targets, "dtypes": DTYPES}
    for k in ks_of(num_keys):
        assert_keeps_what_the_reference_keeps(*inputs, **tried, k=k, scale=0.25, is_causal=is_causal)


@pytest.mark.parametrize("num_queries", [1, 2, 4, 5, 6, 7, 8, 9, 11, 12, 13, 25, 49, 97])
def test_any_number_of_queries_fills_its_tiles(cpu_targets, num_queries):
    options = {"targets": cpu_targets, "k": 9, "enable_gqa": True}
    assert_equals_the_reference(*attention_inputs(Sizes(1, 1, 1, num_queries, 600, 4, 4)), **options)
    assert_equals_the_reference(*attention_inputs(Sizes(1, 3, 1, num_queries, 40, 4, 4)), **options)


@pytest.mark.parametrize("head_dim", [1, 3, 7, 8, 9, 16, 24, 33, 40, 64, 80, 96, 127, 128, 256])
def test_any_head_size_is_right(cpu_targets, head_dim):
    for value_dim in (head_dim, 1, 24, 64):
        inputs = attention_inputs(Sizes(1, 2, 2, 7, 70, head_dim, value_dim))
        assert_equals_the_reference(*inputs, targets=cpu_targets, k=9)


@pytest.mark.parametrize("k", [40, 700])
@pytest.mark.parametrize("name", CALL_NAMES)
def test_every_kind_of_call_is_that_of_the_reference_beyond_the_sample(cpu_targets, name, k):
    call = named_call(name, Sizes(1, 4, 4, 20, 700, 6, 5), smallest_gap=0)
    options = {} if k < 700 and "k" in call.options else {"k": k}
    for dropout_p in (0.0, 0.3):
        torch.manual_seed(4)
        expected = call.run(backend="reference", dropout_p=dropout_p, **options)
        for target in cpu_targets:
            torch.manual_seed(4)
            with cpu.forced_cpu_target(target):
                actual = call.run(backend="cpu", dropout_p=dropout_p, **options)
            assert_same(actual, expected, target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("head_dim", "value_dim"), [(16, 16), (40, 24), (64, 64), (80, 128), (128, 128), (33, 17)])
def test_low_precision_is_as_close_to_float64_as_the_reference(cpu_targets, head_dim, value_dim, dtype):
    def attend(backend):
        return lambda *x: topk_attention(*x, k=20, scale=0.125, is_causal=True, backend=backend)

    errors, reference_errors = {target: [] for target in cpu_targets}, []
    for _ in range(3):
        # Queries and keys of whole numbers: rounding cannot reorder scores.
        query, key, _ = integer_inputs(1, 2, 2, 20, 600, head_dim, 1, dtype)
        inputs = (query.clamp(-1, 1), key.clamp(-1, 1), torch.randn(1, 2, 600, value_dim, dtype=dtype))
        truth = output_and_gradients(attend("reference"), *(x.double() for x in inputs))
        reference_errors.append(largest_errors(output_and_gradients(attend("reference"), *inputs), truth))
        for target in cpu_targets:
            with cpu.forced_cpu_target(target):
                errors[target].append(largest_errors(output_and_gradients(attend("cpu"), *inputs), truth))
    for target, of_target in errors.items():
        assert_within_measured_allowance(torch.stack(of_target), torch.stack(reference_errors), dtype, target)


def test_the_largest_and_smallest_numbers_of_float16_survive(cpu_target):
    query, key = torch.zeros(1, 1, 1, 8, dtype=torch.float16), torch.zeros(1, 1, 2, 8, dtype=torch.float16)
    for numbers in ([6e-8, 6e-8], [1e-7, 3e-7], [65504, 65504], [-65504, -65504], [2**-14, 2**-15], [0.0, -0.0]):
        value = torch.tensor(numbers, dtype=torch.float16)[None, None, :, None]
        output = topk_attention(query, key, value, k=2, backend="cpu")
        assert output.item() == value.float().mean().half().item()


def test_a_target_is_forced_within_the_block_alone():
    best = cpu.cpu_target()
    assert best == cpu.cpu_targets()[0]
    for name in cpu.cpu_targets():
        with cpu.forced_cpu_target(name):
            assert cpu.cpu_target() == name
        assert cpu.cpu_target() == best
    with pytest.raises(KeyError), cpu.forced_cpu_target(cpu.cpu_targets()[-1]):
        raise KeyError
    assert cpu.cpu_target() == best


def test_an_unknown_target_is_refused_with_the_known_ones():
    with (
        pytest.raises(ValueError, match=f"name must be one of {', '.join(cpu.cpu_targets())} on this processor, got"),
        cpu.forced_cpu_target("nonsense"),
    ):
        pass


def test_a_target_that_screens_keys_is_better_than_the_one_it_is_compared_with():
    targets = cpu.cpu_targets()
    # Processors that take long for its products prefer avx2 to avx2screen.
    screening = [name for name in targets if name in cpu.SCREENING and name != "avx2screen"]
    assert all(targets.index(name) < targets.index(cpu.SCREENING[name]) for name in screening)


def test_a_target_that_screens_keys_can_be_compared_with_one_that_scores_all():
    targets = cpu.cpu_targets()
    assert all(cpu.SCREENING[name] in targets for name in targets if name in cpu.SCREENING)


def test_the_baseline_is_always_there():
    assert cpu.cpu_targets()[-1] in ("baseline", "neon")
