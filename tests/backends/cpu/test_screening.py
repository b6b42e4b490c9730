"""Keys that are screened by 8-bit products are those that float32 scores choose, to the bit."""

import pytest
import torch

from adversarial import FAMILIES, differing_rows, screening_targets
from topk_attention import Completion, topk_attention
from topk_attention.backends import cpu

pytestmark = pytest.mark.skipif(
    not screening_targets(), reason="this processor or build has no kernels that screen keys"
)


@pytest.fixture(params=screening_targets())
def screening_target(request):
    return request.param


@pytest.mark.parametrize("family", FAMILIES)
def test_screening_misses_no_key_whatever_misleads_it(family, screening_target):
    for seed in range(2):
        number = seed + 2 * list(FAMILIES).index(family)  # other shapes, masks and biases for each
        rows, differing = differing_rows(screening_target, number, [family])
        assert rows > 0
        assert differing == []


def test_screened_rows_do_not_depend_on_the_number_of_threads(several_threads, screening_target):
    query, key, value = torch.randn(2, 4, 200, 64), torch.randn(2, 2, 2100, 64), torch.randn(2, 2, 2100, 64)
    options = {"k": 40, "is_causal": True, "enable_gqa": True, "backend": "cpu"}
    with cpu.forced_cpu_target(screening_target):
        first, *others = several_threads(lambda: topk_attention(query, key, value, **options))
    assert all(torch.equal(first, other) for other in others)


def test_gradients_and_completion_are_those_of_all_scores(screening_target):
    results = []
    for target in (cpu.SCREENING[screening_target], screening_target):
        torch.manual_seed(0)
        tensors = [torch.randn(1, 2, 1100, 32, requires_grad=True) for _ in range(3)]
        with cpu.forced_cpu_target(target):
            options = {"is_causal": True, "completion": Completion(), "dropout_p": 0.2, "backend": "cpu"}
            output = topk_attention(*tensors, k=20, **options)
            output.sum().backward()
        results.append([output, *(x.grad for x in tensors)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
