import os
from dataclasses import asdict, replace

import pytest
import torch

from support_folder import SUPPORT
from topk_experiments.benchmarks.attention import methods
from topk_experiments.benchmarks.attention.methods import Method, new_inputs, new_method, score_product
from topk_experiments.benchmarks.attention.works import Work
from topk_experiments.runs import steps
from topk_experiments.runs import turns as turn_taking
from topk_experiments.runs.process import run_in_fresh_process
from topk_experiments.runs.turns import time_methods

WORK = Work(num_heads=2, length=40, k=5, head_dim=4)
METHODS = ["topk-chunked", "sdpa"]
REQUEST = {"work": asdict(WORK), "threads": 1, "seed": 0, "repetitions": 2, "enough_s": 60.0}
REQUEST |= {"operation": methods.__name__}


def use(monkeypatch, new_method):
    """These methods in place of the operation's. They are not checked: some are wrong, and all count calls."""
    monkeypatch.setattr(turn_taking, "check", lambda *_: 0.0)
    monkeypatch.setattr(methods, "OPERATION", methods.OPERATION._replace(new_method=new_method))


@pytest.fixture(autouse=True)
def no_memory_limit(monkeypatch):
    monkeypatch.setattr(steps, "limit_memory", lambda *limits: None)  # it would outlive the test


@pytest.fixture
def turns(monkeypatch):
    """Which method ran, call by call."""
    calls = []

    def recorded(method, work):
        operation = new_method(method, work).run

        def run(*inputs):
            calls.append(method)
            return operation(*inputs)

        return Method(run)

    use(monkeypatch, recorded)
    return calls


def test_methods_take_turns_after_a_warm_up(turns):
    result = time_methods(REQUEST | {"methods": METHODS}, lambda message: None)
    calls = [result["methods"][method][mode]["calls_per_round"] for mode in turn_taking.MODES for method in METHODS]
    one_round = [method for method, n in zip(METHODS * 2, calls, strict=True) for _ in range(n)]
    assert turns == METHODS * 2 + one_round * 2  # two modes; a warm-up and two rounds
    assert result["rounds"] == 2
    for method in ("topk-chunked", "sdpa"):
        assert result["methods"][method]["outcome"] == "finished"
        for mode in turn_taking.MODES:
            times = result["methods"][method][mode]
            assert 0 < times["fastest_s"] <= times["median_s"] <= times["slowest_s"]
    assert result["floor"]["median_s"] > 0


def test_long_works_get_three_rounds(turns):
    request = REQUEST | {"methods": ["sdpa"], "repetitions": 50, "enough_s": 0.0}
    messages = []
    assert time_methods(request, messages.append)["rounds"] == 3
    assert messages == [{"doing": f"round {number} of 3"} for number in (1, 2, 3)]


def test_a_method_that_runs_out_of_memory_leaves_the_others_their_turns(monkeypatch):
    def greedy(method, work):
        if method != "sdpa":
            return new_method(method, work)

        def run(*inputs):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

        return Method(run)

    use(monkeypatch, greedy)
    result = time_methods(REQUEST | {"methods": ["topk-chunked", "sdpa"]}, lambda message: None)
    assert result["methods"]["sdpa"]["outcome"] == "out of memory"
    assert result["methods"]["topk-chunked"]["outcome"] == "finished"


def test_any_other_error_stops_the_measurement(monkeypatch):
    def broken(method, work):
        def run(*inputs):
            raise RuntimeError("our own mistake")

        return Method(run)

    use(monkeypatch, broken)
    with pytest.raises(RuntimeError, match="our own mistake"):
        time_methods(REQUEST | {"methods": ["sdpa"]}, lambda message: None)


def test_memory_counts_what_the_operation_makes_and_not_its_inputs(monkeypatch):
    """In a fresh process, as when it is measured: what other tests left in the heap moves the peak by a few pages."""
    monkeypatch.setenv("PYTHONPATH", SUPPORT, prepend=os.pathsep)
    work = replace(WORK, head_dim=2**15)  # each tensor has 10 MiB
    request = REQUEST | {"operation": "hungry_operation", "work": asdict(work), "method": "any"}
    result = run_in_fresh_process(f"{turn_taking.__name__}:measure_memory", request)
    # 64, then freed; the output and two sums on the way to it.
    assert 64 < result["peak_mib"] < 110


@pytest.fixture
def num_scores(monkeypatch):
    """How many scores the floor's tiles hold together."""

    def count(work):
        sizes = []
        monkeypatch.setattr(torch, "bmm", lambda queries, keys, out: sizes.append(out.numel()))
        score_product(work, new_inputs(work))()
        return sum(sizes)

    return count


def test_the_floor_computes_every_score_once(num_scores):
    assert num_scores(Work(num_heads=2, length=3000, k=5, head_dim=1)) == 2 * 3000 * 3000


def test_the_causal_floor_computes_little_more_than_the_visible_scores(num_scores):
    visible = 2 * 3000 * 3001 / 2
    causal = Work(num_heads=2, length=3000, k=5, head_dim=1, is_causal=True)
    assert visible <= num_scores(causal) < 1.1 * visible


def test_the_floors_tiles_hold_scores():
    work = replace(WORK, length=5)
    inputs = new_inputs(work)
    tiles = []
    bmm = torch.bmm

    def recorded(queries, keys, out):
        tiles.append(bmm(queries, keys, out=out).clone())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "bmm", recorded)
        score_product(work, inputs)()
    torch.testing.assert_close(torch.cat(tiles, -1)[None], (inputs[0] @ inputs[1].mT).detach())
