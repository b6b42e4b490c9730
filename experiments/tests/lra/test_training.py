import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

from topk_experiments.lra import training as loop
from topk_experiments.lra.configuration import read_config
from topk_experiments.lra.runs import LraPlan, evaluate_run, run_plan
from topk_experiments.lra.tasks import prepare
from topk_experiments.lra.training import alike_batch_numbers, batch_numbers
from topk_experiments.runs.records import read_json_lines


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
        assert found["test_accuracy"] * 33 == pytest.approx(round(found["test_accuracy"] * 33), abs=1e-9)
    assert record["options"] == {"k": 4}
    assert record["num_parameters"] > 1000
    assert 0 < record["median_step_s"] < record["elapsed_s"]
    assert record["processor_s"] > 0
    assert record["peak_mib"] >= 0
    assert str(plan.out) not in json.dumps(record)
    assert "test accuracy" in console.export_text()


def test_a_k_that_leaves_no_token_out_is_named(plan, console):
    train(replace(plan, config=replace(plan.config, k=24)), console)
    assert "tiny: k = 24 is full attention here: no query has more than 24 keys" in console.export_text()


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


def test_a_resumed_run_reports_the_largest_peak_of_its_parts(plan, steps, monkeypatch):
    monkeypatch.setattr(loop, "_peak_mib", lambda *_: 500.0)
    steps.interrupt_before = 6
    with pytest.raises(KeyboardInterrupt):
        train(plan)
    steps.interrupt_before = None
    monkeypatch.setattr(loop, "_peak_mib", lambda *_: 100.0)
    assert train(plan)[0]["peak_mib"] == 500.0


def test_a_run_that_could_not_be_recorded_is_not_trained_again(plan, steps, monkeypatch):
    def full_disk(path, record):
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr("topk_experiments.runs.ledger.append_json_line", full_disk)
        with pytest.raises(OSError, match="no space left"):
            train(plan)
    steps.clear()
    (record,) = train(plan)
    assert steps == []
    assert record["steps"] == 8
    assert not plan.run("topk", 0).checkpoint.exists()


def test_runs_of_another_k_have_files_of_their_own(plan):
    other = replace(plan, config=replace(plan.config, k=5))
    assert plan.run("topk", 0).checkpoint != other.run("topk", 0).checkpoint
    assert plan.run("topk", 0).model != other.run("topk", 0).model
    assert plan.run("vanilla", 0) == replace(other.run("vanilla", 0), config=plan.config)


def test_a_checkpoint_of_another_configuration_is_not_used(plan, steps, console):
    steps.interrupt_before = 6
    with pytest.raises(KeyboardInterrupt):
        train(plan)
    steps.clear()
    steps.interrupt_before = None
    changed = replace(plan.config, training=replace(plan.config.training, learning_rate=0.001))
    train(replace(plan, config=changed), console)
    assert steps == list(range(1, 9))
    assert (
        "checkpoint of an unfinished run is not used, and will be overwritten: config differ" in console.export_text()
    )


def test_finished_runs_are_not_trained_again(plan, steps, console):
    plan = replace(plan, methods=["vanilla", "topk"], seeds=[0, 1])
    records = train(plan)
    assert len(steps) == 4 * 8
    assert len({json.dumps(curve(record)) for record in records}) == 4
    again = train(replace(plan, methods=["topk", "vanilla"]), console)
    assert len(steps) == 4 * 8
    assert [answers(record) for record in again] == [answers(records[n]) for n in (2, 3, 0, 1)]
    assert "tiny, topk, seed 1 is on file, of " in console.export_text()
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


def test_alike_batches_have_the_same_examples_over_a_stretch_and_those_of_a_step_differ_little_in_length():
    lengths = np.random.default_rng(0).integers(10, 500, 200)
    for stretch in range(12):  # 5 steps of 8 in each, five stretches an epoch
        steps = range(5 * stretch + 1, 5 * stretch + 6)
        alike = [alike_batch_numbers(lengths, 8, 3, step, 5) for step in steps]
        plain = [batch_numbers(200, 8, 3, step) for step in steps]
        assert sorted(itertools.chain(*alike)) == sorted(itertools.chain(*plain))
        ranges = sorted((lengths[batch].min(), lengths[batch].max()) for batch in alike)
        assert all(longest <= shortest for (_, longest), (shortest, _) in itertools.pairwise(ranges))
    orders = {
        tuple(np.argsort([max(lengths[alike_batch_numbers(lengths, 8, 3, 5 * s + n, 5)]) for n in range(1, 6)]))
        for s in range(12)
    }
    assert len(orders) > 6
    assert alike_batch_numbers(lengths, 8, 3, 1, 5) != alike_batch_numbers(lengths, 8, 4, 1, 5)


def test_alike_batches_are_trained_on_and_resumed_to_the_same_losses(plan, steps, tmp_path):
    alike = replace(plan.config, training=replace(plan.config.training, alike_over=4))
    plan = replace(plan, config=alike)
    seen = []

    def batch(self, numbers):
        seen.append(list(numbers))
        return plain_batch(self, numbers)

    plain_batch = loop.Examples.batch
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loop.Examples, "batch", batch)
        (whole,) = train(replace(plan, out=tmp_path / "whole"))
    lengths = prepare(plan.config.new_task(None), plan.data).splits["train"].lengths()
    assert seen[0] == alike_batch_numbers(lengths, 8, 0, 1, 4)
    steps.interrupt_before = 6
    with pytest.raises(KeyboardInterrupt):
        train(plan)
    steps.interrupt_before = None
    (resumed,) = train(plan)
    assert answers(resumed) == answers(whole)


def test_the_examples_tested_are_all_of_them_sorted_by_length(plan, monkeypatch):
    train(plan)
    examples = prepare(plan.config.new_task(None), plan.data).splits["test"]
    lengths = []
    plain_batch = loop.Examples.batch

    def batch(self, numbers):
        lengths.extend(self.lengths()[numbers].tolist())
        return plain_batch(self, numbers)

    monkeypatch.setattr(loop.Examples, "batch", batch)
    found = evaluate_run(plan, "topk", 0, "test", Console(quiet=True))
    assert lengths == sorted(examples.lengths().tolist())
    assert len(lengths) == 33
    monkeypatch.undo()
    shuffled = examples.take(np.random.default_rng(0).permutation(33))
    accelerator = loop.new_accelerator("cpu", plan.config.training)
    classifier = loop.new_model(plan.config, plan.config.new_task(None), "topk", 0)
    classifier.load_state_dict(torch.load(plan.run("topk", 0).model)["weights"])
    again = loop.evaluate(accelerator.prepare(classifier), shuffled, accelerator, 8)
    assert again == pytest.approx((found["loss"], found["accuracy"]), rel=1e-6)


@pytest.mark.parametrize(
    "launcher",
    [
        ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"],
        # What tells it that the processes are to run on CPUs would have it look for MPI.
        [
            "accelerate.commands.launch",
            "--multi_gpu",
            "--num_processes",
            "2",
            "--main_process_port",
            "0",
            "--no_python",
        ],
    ],
    ids=["torchrun", "accelerate launch"],
)
def test_two_processes_train_to_what_one_trains_to(plan, tiny_file, tmp_path, launcher):
    """Of the 33 test examples the first process tests 17, in five batches, and the second 16, in four."""
    (alone,) = train(plan)
    out = tmp_path / "two"
    command = [sys.executable, "-m", *launcher, sys.executable, "-c", "from topk_experiments.cli import app; app()"]
    command += ["lra", "train", str(tiny_file)]
    command += ["--methods", "topk", "--device", "cpu", "--threads", "1"]
    command += ["--data", str(tmp_path / "data"), "--out", str(out)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300
    )
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


def reviews(folder):
    for split, word in (("train", "seen"), ("test", "new")):
        lines = [json.dumps({"text": f"{word} {n} " * 30, "label": n % 2}) for n in range(4)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    return folder


def pairs_of_papers(folder):
    lines = [f"{n % 2}\tP{n}\tQ{n}\t{'one paper ' * 20}{n}\t{'another ' * 30}{n}" for n in range(4)]
    for name in ("train", "eval", "test"):
        (folder / f"new_aan_pairs.{name}.tsv").write_text("\n".join(lines) + "\n")
    return folder


def grey_images(folder):
    random = np.random.default_rng(0)
    arrays = {f"x_{split}": random.integers(256, size=(6, 32, 32), dtype=np.uint8) for split in ("train", "test")}
    np.savez(folder / "grey.npz", **arrays, **{f"y_{split}": np.arange(6) for split in ("train", "test")})
    return folder / "grey.npz"


@pytest.mark.parametrize("name", ["listops", "text", "retrieval", "image", "pathfinder32", "pathfinder128"])
def test_published_configurations_train_a_step(name, tmp_path):
    """The model in its published size, on a handful of examples."""
    config = read_config(name)
    sources = {"text": reviews, "retrieval": pairs_of_papers, "image": grey_images}
    source = str(sources[name](tmp_path)) if name in sources else None
    few = {} if name == "retrieval" else {"num_validation": 2}
    few |= {} if name in sources else {"num_train": 4, "num_test": 2}
    training = replace(config.training, batch=2, steps=1)
    config = replace(config, settings={**config.settings, **few}, training=training)
    (record,) = train(LraPlan(config, ["topk"], source=source, data=tmp_path, out=tmp_path, threads=1, device="cpu"))
    assert record["steps"] == 1
    assert torch.isfinite(torch.tensor(record["curve"][0]["training_loss"]))
