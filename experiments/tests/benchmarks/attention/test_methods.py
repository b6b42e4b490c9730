from dataclasses import replace
from pathlib import Path

import pytest
import torch

from topk_experiments.benchmarks.attention import ROUNDS, methods
from topk_experiments.benchmarks.attention.methods import new_inputs, new_method, why_not
from topk_experiments.benchmarks.attention.works import Work
from topk_experiments.benchmarks.rounds import RoundBenchmark

WORK = Work(num_heads=2, length=24, k=5, head_dim=4)
DENSE = ("sdpa", "query-chunks")


def not_installed():
    raise ImportError("No module named 'performer_pytorch'")


@pytest.mark.parametrize(
    "change", [{}, {"is_causal": True}, {"bias": "learned"}, {"bias": "learned", "is_causal": True}]
)
def test_methods_that_keep_every_key_agree(change):
    work = replace(WORK, **change)
    inputs = new_inputs(work)
    outputs = [new_method(method, work).run(*inputs) for method in DENSE]
    topk = new_method("topk-chunked", replace(work, k=24)).run(*inputs)
    torch.testing.assert_close(outputs[0], outputs[1])
    torch.testing.assert_close(outputs[0], topk)


@pytest.mark.parametrize("method", [*DENSE, "topk-chunked"])
def test_dropout_reaches_every_method(method):
    inputs = new_inputs(WORK)
    whole = new_method(method, WORK).run(*inputs)
    dropped = new_method(method, replace(WORK, dropout_p=0.5)).run(*inputs)
    assert not torch.allclose(whole, dropped)


def test_performer_is_left_out_with_the_reason_where_it_cannot_be_imported(monkeypatch):
    monkeypatch.setattr(methods, "_fast_attention_class", not_installed)
    assert "requirements-benchmark.txt" in why_not("performer", WORK)


@pytest.mark.parametrize("change", [{"is_causal": True}, {"bias": "learned"}, {"dropout_p": 0.1}])
def test_performer_is_left_out_where_it_does_not_apply(monkeypatch, change):
    monkeypatch.setattr(methods, "_fast_attention_class", lambda: None)
    assert why_not("performer", WORK) is None
    assert "erformer" in why_not("performer", replace(WORK, **change))


def test_performer_gets_256_features(monkeypatch):
    monkeypatch.setattr(methods, "_fast_attention_class", lambda: lambda head_dim, nb_features: (head_dim, nb_features))
    assert new_method("performer", WORK).run == (4, 256)


def test_unknown_methods_and_backends_are_refused():
    with pytest.raises(ValueError, match=r"methods must be topk-BACKEND or among sdpa, .*, got 'flash'"):
        RoundBenchmark(ROUNDS, "table", {WORK: ("flash",)}, out=Path())
    with pytest.raises(ValueError, match="backend must be one of"):
        RoundBenchmark(ROUNDS, "table", {WORK: ("topk-gpu",)}, out=Path())
