"""The kernels of every CPU target this processor can run, and several numbers of threads."""

import pytest
import torch

from topk_attention.backends import cpu

TARGETS = () if cpu.problem() else cpu.cpu_targets()


@pytest.fixture(params=TARGETS)
def cpu_target(request):
    """Run the test with the kernels of each target."""
    with cpu.forced_cpu_target(request.param):
        yield request.param


@pytest.fixture
def cpu_targets():
    """All of these, for tests whose truth takes longer than the kernels and is computed once for all."""
    return TARGETS


@pytest.fixture
def several_threads():
    """Calls a function with one, two and three threads."""
    before = torch.get_num_threads()

    def run(function):
        results = []
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            results.append(function())
        return results

    yield run
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _needs_kernels(kernels):
    pass
