import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from topk_attention.experiments.lra import training as loop
from topk_attention.experiments.lra.configuration import read_config
from topk_attention.experiments.lra.runs import LraPlan, evaluate_run, run_plan
from topk_attention.experiments.lra.training import batch_numbers
from topk_attention.experiments.records import read_json_lines


@pytest.fixture
def console():
    return Console(width=160, record=True)


@pytest.fixture
def plan(tiny, tmp_path):
    return LraPlan(tiny, methods=["topk"], data=tmp_path / "data", out=tmp_path / "out", threads=1, device="cpu")


@pytest.fixture
def steps(monkeypatch):
    """The steps that are trained, one list for all runs; interrupts before one of them when told to."""

    class Steps(list):
        interrupt_before = None

    trained, step = Steps(), loop._Trainer._step

    def counted(self, number):
        if number == trained.interrupt_before:
            raise KeyboardInterrupt
        trained.append(number)
        return step(self, number)

    monkeypatch.setattr(loop._Trainer, "_step", counted)
    return trained


def train(plan, console=None):
    return run_plan(plan, console or Console(quiet=True), tensorboard=False)


def curve(record):
    return [{name: value for name, value in point.items() if name != "elapsed_s"} for point in record["curve"]]


def answers(record):
    return curve(record), record["best"], record["last"]


def test_a_run_is_recorded_with_its_curve_and_both_accuracies(plan, console):
    (record,) = train(plan, console)
    assert read_json_lines(plan.out / "runs.jsonl") == [json.loads(json.dumps(record))]
    assert [point["step"] for point in record["curve"]] == [3, 6, 8]
    assert record["steps"] == record["last"]["step"] == 8
    best = max(point["validation_accuracy"] for point in record["curve"])
    assert record["best"]["validation_accuracy"] == best
    for found in (record["best"], record["last"]):
        assert 0 <= found["test_accuracy"] <= 1
        assert (found["test_accuracy"] * 30) % 1 == pytest.approx(0, abs=1e-9)
    assert record["options"] == {"k": 4}
    assert record["num_parameters"] > 1000
    assert 0 < record["median_step_s"] < record["elapsed_s"]
    assert record["processor_s"] > 0
    assert record["peak_mib"] >= 0
    assert str(plan.out) not in json.dumps(record)
    assert "test accuracy" in console.export_text()


def test_training_lowers_the_loss(plan):
    longer = replace(plan.config.training, steps=120, evaluate_every=40, learning_rate=0.01)
    (record,) = train(replace(plan, config=replace(plan.config, training=longer)))
    assert record["curve"][-1]["training_loss"] < record["curve"][0]["training_loss"] - 0.1


def test_an_interrupted_run_goes_on_from_its_checkpoint_to_the_same_losses(plan, steps, tmp_path):
    with_dropout = replace(plan.config.model, dropout=0.2, attention_dropout=0.2)
    plan = replace(plan, config=replace(plan.config, model=with_dropout))
    (whole,) = train(replace(plan, out=tmp_path / "whole"))
    steps.clear()
    steps.interrupt_before = 6
    with pytest.raises(KeyboardInterrupt):
        train(plan)
    assert read_json_lines(plan.out / "runs.jsonl") == []
    assert steps == [1, 2, 3, 4, 5]
    steps.clear()
    steps.interrupt_before = None
    (resumed,) = train(plan)
    assert steps == [4, 5, 6, 7, 8]
    assert answers(resumed) == answers(whole)
    assert not list(plan.out.rglob("*.checkpoint.pt"))


def test_a_checkpoint_of_another_configuration_is_not_used(plan, steps):
    steps.interrupt_before = 6
    with pytest.raises(KeyboardInterrupt):
        train(plan)
    steps.clear()
    steps.interrupt_before = None
    changed = replace(plan.config, training=replace(plan.config.training, learning_rate=0.001))
    train(replace(plan, config=changed))
    assert steps == list(range(1, 9))


def test_finished_runs_are_not_trained_again(plan, steps, console):
    plan = replace(plan, methods=["vanilla", "topk"], seeds=[0, 1])
    records = train(plan)
    assert len(steps) == 4 * 8
    assert len({json.dumps(curve(record)) for record in records}) == 4
    again = train(replace(plan, methods=["topk", "vanilla"]), console)
    assert len(steps) == 4 * 8
    assert [answers(record) for record in again] == [answers(records[n]) for n in (2, 3, 0, 1)]
    assert "tiny, topk, seed 1 is recorded already." in console.export_text()
    train(replace(plan, methods=["vanilla"], seeds=[0], config=replace(plan.config, k=5)))
    assert len(steps) == 4 * 8  # k is no matter of vanilla attention
    train(replace(plan, methods=["topk"], seeds=[0], config=replace(plan.config, k=5)))
    assert len(steps) == 5 * 8


def test_chunks_of_queries_train_to_vanillas_losses(plan):
    vanilla, chunks = train(replace(plan, methods=["vanilla", "query-chunks"]))
    for expected, found in zip(curve(vanilla), curve(chunks), strict=True):
        assert found == pytest.approx(expected, rel=1e-4)


def test_training_stops_early_when_validation_gets_no_better(plan, steps, monkeypatch):
    accuracies = iter([0.2, 0.5, 0.4, 0.5, 0.3])
    monkeypatch.setattr(
        loop._Trainer,
        "_point",
        lambda self, step, *_: {
            "step": step,
            "training_loss": 1.0,
            "validation_loss": 1.0,
            "validation_accuracy": next(accuracies),
            "elapsed_s": 0.0,
        },
    )
    training = replace(plan.config.training, steps=50, evaluate_every=2, patience=2)
    (record,) = train(replace(plan, config=replace(plan.config, training=training)))
    assert len(steps) == record["steps"] == 8
    assert record["best"]["step"] == 4


def test_the_weights_of_the_best_validation_are_kept_and_can_be_tested(plan, console, tmp_path):
    (record,) = train(plan)
    found = evaluate_run(plan, "topk", 0, "test", console)
    assert found["accuracy"] == record["best"]["test_accuracy"]
    assert found["loss"] == pytest.approx(record["best"]["test_loss"], rel=1e-6)
    weights = plan.run("topk", 0).model.rename(tmp_path / "moved.pt")
    assert evaluate_run(plan, "topk", 0, "test", console, weights=weights) == found
    assert evaluate_run(plan, "topk", 0, "validation", console, weights=weights)["accuracy"] == pytest.approx(
        record["best"]["validation_accuracy"]
    )
    with pytest.raises(ValueError, match="tiny, topk, seed 0 has left no weights at"):
        evaluate_run(plan, "topk", 0, "test", console)
    with pytest.raises(ValueError, match="are of another run: seed differ from tiny, topk, seed 1"):
        evaluate_run(plan, "topk", 1, "test", console, weights=weights)
    with pytest.raises(ValueError, match="split must be one of train, validation, test, got 'dev'"):
        evaluate_run(plan, "topk", 0, "dev", console)


def test_every_example_is_seen_once_an_epoch_and_orders_differ():
    epochs = [
        [number for step in steps for number in batch_numbers(10, 4, 1, step)] for steps in (range(1, 6), range(6, 11))
    ]
    for epoch in epochs:
        assert sorted(epoch[:10]) == sorted(epoch[10:]) == list(range(10))
        assert epoch[:10] != epoch[10:]
    assert batch_numbers(10, 4, 1, 3) != batch_numbers(10, 4, 2, 3)


def test_two_processes_train_to_what_one_trains_to(plan, tiny_file, tmp_path):
    (alone,) = train(plan)
    out = tmp_path / "two"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    command += [sys.executable, "-c", "from topk_attention.cli import app; app()", "lra", "train", str(tiny_file)]
    command += ["--methods", "topk", "--device", "cpu", "--threads", "1"]
    command += ["--data", str(tmp_path / "data"), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    (together,) = read_json_lines(out / "runs.jsonl")
    assert (alone["num_processes"], together["num_processes"]) == (1, 2)
    for expected, found in zip(curve(alone), curve(together), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
    assert together["last"] == pytest.approx(alone["last"], rel=1e-5)
    assert together["best"] == pytest.approx(alone["best"], rel=1e-5)


def test_a_batch_that_cannot_be_shared_is_refused(plan):
    class Three:
        num_processes = 3

    with pytest.raises(ValueError, match="batch must be a multiple of the 3 processes, got 8"):
        loop.train(plan.run("topk", 0), plan.config.new_task(None), None, Three())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"methods": ["magic"]}, "method must be one of vanilla, .* got 'magic'"),
        ({"device": "tpu"}, 'device must be "auto" or "cpu", got \'tpu\''),
    ],
)
def test_a_plan_that_cannot_run_is_refused(plan, change, words):
    with pytest.raises(ValueError, match=words):
        train(replace(plan, **change))


def test_tensorboard_gets_every_point(plan, console):
    pytest.importorskip("tensorboard")
    run_plan(plan, console)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(plan.run("topk", 0).model.with_suffix("")))
    events.Reload()
    assert [event.step for event in events.Scalars("validation_accuracy")] == [3, 6, 8]


def test_without_tensorboard_training_says_so_and_goes_on(plan, console, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    run_plan(plan, console)
    assert "TensorBoard is not installed; its files are not written." in console.export_text()


def test_shipped_configurations_train_a_step(tmp_path):
    """The smallest of them, from the published sizes of the model down to a handful of examples."""
    config = read_config("pathfinder32")
    settings = {"num_train": 4, "num_validation": 2, "num_test": 2}
    training = replace(config.training, batch=2, steps=1)
    config = replace(config, settings=settings, training=training)
    (record,) = train(LraPlan(config, ["topk"], data=tmp_path, out=tmp_path, threads=1, device="cpu"))
    assert record["steps"] == 1
    assert torch.isfinite(torch.tensor(record["curve"][0]["training_loss"]))
