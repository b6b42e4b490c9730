"""The kernels of every CPU target this processor can run."""

import pytest

from topk_attention.backends import cpu

TARGETS = () if cpu.problem() else cpu.cpu_targets()


@pytest.fixture(params=TARGETS)
def cpu_target(request):
    """Run the test with the kernels of each target."""
    with cpu.forced_cpu_target(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _needs_kernels(kernels):
    pass
