from dataclasses import replace

import pytest
import torch

from topk_experiments.benchmarks.attention.methods import OPERATION, Method, is_clear, new_method
from topk_experiments.benchmarks.attention.works import Work
from topk_experiments.runs.checks import CheckFailedError
from topk_experiments.runs.turns import check

WORK = Work(num_heads=2, length=40, k=5, head_dim=4)
OPTIONS = [{}, {"is_causal": True}, {"bias": "learned"}, {"dropout_p": 0.1}, {"k": 40}]


@pytest.mark.parametrize("change", OPTIONS)
@pytest.mark.parametrize("method", ["topk-chunked", "query-chunks", "sdpa"])
def test_exact_methods_pass(method, change):
    assert check(OPERATION, method, replace(WORK, **change)) < 1e-5


@pytest.mark.parametrize("method", ["topk-chunked", "query-chunks", "sdpa"])
def test_methods_pass_in_bfloat16_to_its_rounding(method):
    assert check(OPERATION, method, replace(WORK, dtype="bfloat16")) < 2e-2


def test_the_check_notices_one_key_too_few_in_bfloat16():
    wrong = OPERATION._replace(new_method=lambda method, work: new_method(method, replace(work, k=work.k - 1)))
    with pytest.raises(CheckFailedError, match="the output differs from the float64 reference by"):
        check(wrong, "topk-chunked", replace(WORK, dtype="bfloat16"))


def test_compiled_kernels_are_checked_where_they_screen_keys():
    small = OPERATION.small("topk-cpu", replace(WORK, length=8192, k=2048))
    assert small.length > 1024  # the fewest keys that are screened
    assert 8 * small.k <= small.length


def test_an_approximation_is_not_checked():
    assert check(OPERATION, "performer", WORK) is None


@pytest.mark.parametrize("change", OPTIONS[:4])
def test_the_check_notices_one_key_too_few(monkeypatch, change):
    wrong = OPERATION._replace(new_method=lambda method, work: new_method(method, replace(work, k=work.k - 1)))
    with pytest.raises(CheckFailedError, match="the output differs from the float64 reference by"):
        check(wrong, "topk-chunked", replace(WORK, **change))


@pytest.mark.parametrize(("position", "name"), list(enumerate(["query", "key", "value", "bias"])))
def test_the_check_notices_each_gradient_that_is_wrong(monkeypatch, position, name):
    def doubled_gradient(method, work):
        def run(*inputs):
            changed = list(inputs)
            changed[position] = 2 * inputs[position] - inputs[position].detach()
            return new_method(method, work).run(*changed)

        return Method(run)

    wrong = OPERATION._replace(new_method=doubled_gradient)
    with pytest.raises(CheckFailedError, match=f"the gradient of {name} differs"):
        check(wrong, "topk-chunked", replace(WORK, bias="learned"))


def test_the_check_notices_nan(monkeypatch):
    def broken(method, work):
        return Method(lambda *inputs: new_method(method, work).run(*inputs) * torch.nan)

    wrong = OPERATION._replace(new_method=broken)
    with pytest.raises(CheckFailedError, match="differs from the float64 reference by nan"):
        check(wrong, "topk-chunked", WORK)


def test_rows_that_hang_on_a_near_tie_are_left_out():
    query = torch.ones(1, 1, 3, 1, dtype=torch.float64)
    scores = torch.tensor([3.0, 2.0, 2.0 + 1e-9], dtype=torch.float64).view(1, 1, 3, 1)
    work = Work(num_heads=1, length=3, k=1, head_dim=1)
    tensors = query, scores, scores
    assert is_clear("topk-chunked", work, tensors).all()
    assert not is_clear("topk-chunked", replace(work, k=2), tensors).any()
