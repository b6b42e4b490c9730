"""These tests run in a process of their own, with Triton's interpreter on from its beginning: `make test-triton`."""

import pytest

from topk_attention.backends import triton


@pytest.fixture(autouse=True)
def _needs_the_interpreter():
    if not triton.IS_INTERPRETED:
        pytest.skip("Triton's interpreter is off: make test-triton")
    if triton.problem() is not None:
        pytest.fail(triton.problem())
