"""What is the feed-forward benchmark's own; what it shares is tested with the attention kernel's."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from topk_experiments.benchmarks.feed_forward import ROUNDS, methods
from topk_experiments.benchmarks.feed_forward.methods import OPERATION, Method, first_products, new_inputs, new_method
from topk_experiments.benchmarks.feed_forward.works import D_FFS, GOALS, TABLE, Work
from topk_experiments.benchmarks.rounds import RoundBenchmark, run_and_show_rounds
from topk_experiments.runs import steps, turns
from topk_experiments.runs.checks import CheckFailedError
from topk_experiments.runs.turns import check, measure_memory, time_methods

WORK = Work(d_model=12, d_ff=40, k=7, tokens=30)
GATED = replace(WORK, is_gated=True, activation="silu")
WORKS = pytest.mark.parametrize("work", [WORK, GATED, replace(WORK, tokens=2)], ids=str)
METHODS = ["topk-chunked", "dense", "token-chunks"]
REQUEST = {"threads": 1, "seed": 0, "repetitions": 2, "enough_s": 60.0, "operation": methods.__name__}


@pytest.fixture(autouse=True)
def no_memory_limit(monkeypatch):
    monkeypatch.setattr(steps, "limit_memory", lambda *limits: None)  # it would outlive the test


@WORKS
@pytest.mark.parametrize("method", METHODS)
def test_exact_methods_pass(method, work):
    assert check(OPERATION, method, work) < 1e-5


@WORKS
def test_the_check_notices_one_neuron_too_few(monkeypatch, work):
    wrong = OPERATION._replace(new_method=lambda name, work: new_method(name, replace(work, k=work.k - 1)))
    with pytest.raises(CheckFailedError, match="the output differs from the float64 reference by"):
        check(wrong, "topk-chunked", work)


@pytest.mark.parametrize(("position", "name"), list(enumerate(["x", "w_in", "w_out", "w_gate"])))
def test_the_check_notices_each_gradient_that_is_wrong(monkeypatch, position, name):
    def doubled_gradient(method, work):
        right = new_method(method, work)

        def run(*inputs):
            changed = list(inputs)
            changed[position] = 2 * inputs[position] - inputs[position].detach()
            return right.run(*changed)

        return Method(run, right.stored)

    wrong = OPERATION._replace(new_method=doubled_gradient)
    with pytest.raises(CheckFailedError, match=f"the gradient of {name} differs"):
        check(wrong, "topk-chunked", GATED)


def test_tokens_that_hang_on_a_near_tie_are_left_out():
    work = Work(d_model=1, d_ff=3, k=1, tokens=3)
    inputs = torch.ones(3, 1).double(), torch.tensor([[3.0], [2.0], [2.0 + 1e-9]]).double(), torch.ones(1, 3).double()
    assert methods.is_clear("topk-chunked", work, inputs).all()
    assert not methods.is_clear("topk-chunked", replace(work, k=2), inputs).any()


def test_top_k_gets_w_out_neuron_by_neuron_and_the_dense_layer_as_linear_holds_it():
    inputs = new_inputs(GATED)
    ours, dense = (new_method(name, GATED).stored(inputs) for name in ("topk-chunked", "dense"))
    assert ours[2].t().is_contiguous()
    assert dense[2].is_contiguous()
    assert all(torch.equal(a, b) and a.requires_grad and b.requires_grad for a, b in zip(ours, dense, strict=True))


@WORKS
def test_methods_take_turns(work):
    result = time_methods(REQUEST | {"work": asdict(work), "methods": METHODS}, lambda message: None)
    assert result["rounds"] == 2
    assert list(result["methods"]) == METHODS
    assert all(times[mode]["median_s"] > 0 for times in result["methods"].values() for mode in turns.MODES)
    assert result["floor"]["median_s"] > 0


def test_memory_leaves_weights_and_their_gradients_out_and_counts_the_rest():
    # Everything [tokens, size] takes 16 MiB; weights take 4 MiB each, and so do their gradients.
    work = Work(d_model=1024, d_ff=1024, k=8, tokens=4096)
    result = measure_memory(REQUEST | {"work": asdict(work), "method": "dense"}, lambda message: None)
    assert result["gradients_mib"] == 8
    # Output, pre-activations, activations and their gradients; what products take beside differs by machine.
    assert 2 * 16 - 1 < result["peak_mib"] < 8 * 16
    assert result["total_peak_mib"] == pytest.approx(result["baseline_mib"] + 8 + result["peak_mib"])
    assert result["peak_of_second_pass_mib"] > 2 * 16 - 1


@pytest.mark.parametrize("work", [WORK, GATED, Work(d_model=2, d_ff=4100, k=1, tokens=600)], ids=str)
def test_the_floor_computes_every_pre_activation_once(monkeypatch, work):
    inputs, blocks = new_inputs(work), []
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: blocks.append(mm(a, b, out=out).double().sum()))
    first_products(work, inputs)()
    x, w_in, _, *w_gate = inputs
    expected = sum((x @ w.t()).double().sum() for w in (w_in, *w_gate))
    torch.testing.assert_close(sum(blocks), expected, rtol=1e-4, atol=1e-3)


def test_every_row_of_the_table_has_a_goal_and_few_tokens_must_not_be_slower_than_dense():
    assert set(GOALS) == set(TABLE.values())
    assert [name for name, work in TABLE.items() if GOALS[work].peak is not None] == [
        "t5-11b",
        "t5-base",
        "smollm2",
        "phi3-mini",
    ]
    assert {work.tokens for work in TABLE.values() if GOALS[work].forward_backward is None} == {1, 2, 4, 8}


def test_plans():
    name, plan = ROUNDS.plan("reference")
    assert (name, list(plan)) == ("table", list(TABLE.values()))
    assert set(plan.values()) == {("topk-reference", "dense", "topk-chunked")}
    _, plan = ROUNDS.plan("chunked", works=["smollm2-4"], rivals=["dense"])
    assert plan == {TABLE["smollm2-4"]: ("topk-chunked", "dense")}
    name, plan = ROUNDS.plan("chunked", sweep="d_ff")
    assert (name, list(plan)) == ("d_ff", D_FFS)
    assert set(plan.values()) == {("topk-chunked", "dense", "token-chunks")}
    quoted = ROUNDS.sweeps["d_ff"].quoted["top-k, quoted"].numbers
    assert set(quoted) == {work.d_ff for work in D_FFS}


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"sweep": "k"}, "sweep must be among d_ff, got 'k'"),
        ({"works": ["huge"]}, "works must be among t5-11b, .*, got 'huge'"),
        ({"works": ["t5-base"], "sweep": "d_ff"}, "works chooses rows of the table"),
        ({"tokens": 3}, "tokens must go with a sweep"),
        ({"sweep": "d_ff", "tokens": 0}, "tokens must be at least 1, got 0"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(choice, words):
    with pytest.raises(ValueError, match=words):
        ROUNDS.plan("chunked", **choice)


def test_unknown_methods_and_works_are_refused():
    with pytest.raises(ValueError, match=r"methods must be topk-BACKEND or among dense, .*, got 'sdpa'"):
        RoundBenchmark(ROUNDS, "table", {WORK: ("sdpa",)}, out=Path())
    with pytest.raises(ValueError, match=r"activation must be one of .*, got 'tanh'"):
        replace(WORK, activation="tanh")
    with pytest.raises(ValueError, match="k must be at least 1"):
        replace(WORK, k=0)


@pytest.mark.parametrize(("seconds", "verdict"), [(2.5, "reached"), (1.2, "missed")])
def test_goals_stand_beside_our_numbers(measurements, console, tmp_path, seconds, verdict):
    measurements.seconds = {"dense": seconds}
    measurements.more_memory = {"peak_of_second_pass_mib": 600.0}
    plan = {TABLE["t5-11b"]: ("topk-chunked", "dense"), TABLE["smollm2-1"]: ("topk-chunked", "dense")}
    run_and_show_rounds(RoundBenchmark(ROUNDS, "table", plan, out=tmp_path), console)
    page = (tmp_path / "table.md").read_text()
    assert f"| {seconds:.2f}, goal 1.5: {verdict} |" in page
    assert "topk-chunked needs 1.200 of dense's, goal 0.05: missed. Adding to gradients" in page
    assert "600.0 MiB against dense's 600.0; the weights' gradients are 512.0 MiB" in page
    assert "Floor: 0.5 s, 50% of topk-chunked's forward pass." in page
    assert len(measurements.requests) == 6


def test_the_sweep_is_drawn(measurements, console, tmp_path):
    measurements.more_memory = {"peak_of_second_pass_mib": 600.0}
    name, plan = ROUNDS.plan("chunked", sweep="d_ff", tokens=64)
    run_and_show_rounds(RoundBenchmark(ROUNDS, name, plan, out=tmp_path), console)
    assert (tmp_path / "d_ff.png").read_bytes().startswith(b"\x89PNG")
