from dataclasses import replace

import pytest
import torch

from topk_experiments.language_model import feed_forward_curve as curves
from topk_experiments.language_model.feed_forward_curve import (
    CurveConfig,
    LanguageModel,
    run_feed_forward_curve,
    train_arm,
)
from topk_experiments.runs import training
from topk_experiments.runs.process import WorkerError
from topk_experiments.runs.records import read_json


@pytest.fixture
def config(tmp_path):
    text = tmp_path / "story.txt"
    text.write_text("the keys that score best are kept and all others are left out. " * 20)
    return CurveConfig(
        k=(4,),
        text=text,
        num_layers=1,
        d_model=16,
        num_heads=2,
        d_ff=32,
        context=24,
        batch=3,
        steps=7,
        evaluate_every=3,
        threads=1,
        out=tmp_path / "out",
    )


@pytest.fixture
def in_this_process(monkeypatch):
    """Counts the training steps; arms run where the test runs."""
    steps = []

    def run(function, request, on_message):
        def send(message):
            steps.append((request["k"], message["step"]))
            on_message(message)

        return train_arm(request, send)

    monkeypatch.setattr(training, "run_in_fresh_process", run)
    return steps


def losses(record):
    return [[(p["step"], p["training_loss"], p["validation_loss"]) for p in arm["curve"]] for arm in record["arms"]]


def test_arms_start_with_equal_weights_and_with_every_neuron_stay_equal(config, in_this_process, console):
    models = [LanguageModel(config.as_record(), k) for k in (None, 4)]
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(a, b)
    record = run_feed_forward_curve(replace(config, k=(32,)), console)
    dense, all_neurons = losses(record)
    assert [point[0] for point in dense] == [3, 6, 7]
    for a, b in zip(dense, all_neurons, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_training_lowers_the_loss_and_writes_record_and_picture(config, in_this_process, console):
    record = run_feed_forward_curve(replace(config, steps=60, evaluate_every=30), console)
    assert read_json(config.out / "feed-forward-curve.json") == record
    assert [arm["k"] for arm in record["arms"]] == [None, 4]
    for arm in record["arms"]:
        assert arm["curve"][-1]["validation_loss"] < arm["curve"][0]["training_loss"]
        assert 0 < arm["curve"][0]["elapsed_s"] < arm["elapsed_s"] + 1e-9
    assert (config.out / "feed-forward-curve.png").read_bytes().startswith(b"\x89PNG")
    assert str(config.out) not in (config.out / "feed-forward-curve.json").read_text()
    assert not list((config.out / "work").iterdir())
    assert "validation loss" in console.export_text()


def test_finished_arms_are_kept_and_others_train_again(config, in_this_process, console):
    record = run_feed_forward_curve(config, console)
    assert run_feed_forward_curve(config, console) == record
    assert len(in_this_process) == 2 * 7
    assert run_feed_forward_curve(replace(config, seed=1), console)["config"]["seed"] == 1
    assert len(in_this_process) == 4 * 7
    assert "made with another configuration" in console.export_text()
    run_feed_forward_curve(replace(config, seed=1, fresh=True), console)
    assert len(in_this_process) == 6 * 7


def test_an_interrupted_arm_goes_on_from_its_checkpoint_to_the_same_curve(
    config, in_this_process, console, monkeypatch, tmp_path
):
    expected = run_feed_forward_curve(replace(config, out=tmp_path / "whole"), console)
    validation_loss, evaluations = curves._validation_loss, []

    def interrupted(*arguments):
        evaluations.append(1)
        if len(evaluations) == 3 + 2:
            raise KeyboardInterrupt
        return validation_loss(*arguments)

    monkeypatch.setattr(curves, "_validation_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_feed_forward_curve(config, console)
    in_this_process.clear()
    assert losses(run_feed_forward_curve(config, console)) == losses(expected)
    assert in_this_process == [(4, step) for step in (4, 5, 6, 7)]


def test_an_arm_that_fails_is_named(config, console, monkeypatch):
    def failing(*arguments, **options):
        raise WorkerError("out of memory", "cannot allocate memory")

    monkeypatch.setattr(training, "run_in_fresh_process", failing)
    with pytest.raises(WorkerError, match=r"dense failed \(out of memory\): cannot allocate memory"):
        run_feed_forward_curve(config, console)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"d_model": 15}, "d_model must be a multiple of its 2 heads, got 15"),
        ({"k": (0,)}, "k must be at least 1"),
        ({"backend": "gpu"}, "backend must be one of"),
    ],
)
def test_a_configuration_that_cannot_run_is_refused(config, change, words):
    with pytest.raises(ValueError, match=words):
        replace(config, **change)


def test_a_text_that_is_too_short_is_refused(config, console):
    config.text.write_text("short")
    with pytest.raises(ValueError, match=r"story.txt is too short: at least 500 bytes needed, it has 5"):
        run_feed_forward_curve(config, console)
