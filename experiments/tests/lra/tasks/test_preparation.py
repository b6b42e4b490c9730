from dataclasses import replace
from random import Random

import pytest

from topk_experiments.lra.configuration import read_config
from topk_experiments.lra.tasks import ListOps, SameDocument, prepare
from topk_experiments.lra.tasks import preparation as making

TASK = ListOps(num_train=7, num_validation=3, num_test=3, min_length=12, max_length=40)


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(making, "_SHARD", 3)


class Shards:
    """Counts the shards that are drawn, and interrupts before one of them when told to."""

    def __init__(self):
        self.sizes = []
        self.interrupt_before = None

    def about_to_draw(self, size):
        if len(self.sizes) == self.interrupt_before:
            raise KeyboardInterrupt
        self.sizes.append(size)


@pytest.fixture
def shards(monkeypatch):
    shards, add_shard = Shards(), ListOps._add_shard

    def counted(task, random, count, writer):
        shards.about_to_draw(count)
        add_shard(task, random, count, writer)

    monkeypatch.setattr(ListOps, "_add_shard", counted)
    return shards


def hashes(data):
    return {name: split["sha256"] for name, split in data.description["splits"].items()}


def test_data_is_made_once_and_then_read(tmp_path, shards):
    steps = []
    data = prepare(TASK, tmp_path, lambda done, total: steps.append((done, total)))
    assert shards.sizes == [3, 3, 1, 3, 3]
    assert steps == [(3, 13), (6, 13), (7, 13), (10, 13), (13, 13)]
    again = prepare(TASK, tmp_path)
    assert len(shards.sizes) == 5
    assert hashes(again) == hashes(data)
    assert {name: split.num_examples for name, split in again.splits.items()} == {
        "train": 7,
        "validation": 3,
        "test": 3,
    }
    assert data.description["settings"]["max_length"] == 40
    assert str(tmp_path) not in str(data.description)


def test_an_interrupted_generator_goes_on_to_the_same_data(tmp_path, shards):
    whole = prepare(TASK, tmp_path / "whole")
    shards.sizes.clear()
    shards.interrupt_before = 2
    with pytest.raises(KeyboardInterrupt):
        prepare(TASK, tmp_path / "cut")
    shards.interrupt_before = None
    assert hashes(prepare(TASK, tmp_path / "cut")) == hashes(whole)
    assert shards.sizes == [3, 3, 1, 3, 3]
    assert not list((tmp_path / "cut").rglob("*/shards/*.npz"))


def test_other_settings_and_other_seeds_are_other_data(tmp_path):
    first = hashes(prepare(TASK, tmp_path))
    for changed in (replace(TASK, seed=1), replace(TASK, max_length=39)):
        others = hashes(prepare(changed, tmp_path))
        assert all(others[name] != first[name] for name in first)


def test_data_that_another_version_drew_is_not_taken(tmp_path, monkeypatch, shards):
    prepare(TASK, tmp_path)
    monkeypatch.setattr(type(TASK), "version", 2, raising=False)
    shards.sizes.clear()
    prepare(TASK, tmp_path)
    assert sum(shards.sizes) == TASK.num_train + TASK.num_validation + TASK.num_test


def test_a_changed_file_deep_in_the_source_is_noticed(tmp_path, monkeypatch):
    folder = tmp_path / "texts" / "deep" / "deeper"
    folder.mkdir(parents=True)
    for number in range(6):
        (folder / f"{number}.txt").write_bytes(bytes([number]) * 40)
    monkeypatch.setenv("HOME", str(tmp_path))
    task = SameDocument("~/texts", num_train=6, num_validation=4, num_test=4, max_length=8, shortest=16)
    first = hashes(prepare(task, tmp_path / "cache"))
    assert hashes(prepare(task, tmp_path / "cache")) == first
    for number in range(6):
        (folder / f"{number}.txt").write_bytes(bytes([100 + number]) * 41)
    assert hashes(prepare(task, tmp_path / "cache")) != first


def test_guessing_by_the_first_operator_is_learnt_from_training_and_tested(tmp_path):
    data = prepare(replace(TASK, num_train=40), tmp_path)
    train, test = data.splits["train"], data.splits["test"]
    seen = {}
    for number in range(train.num_examples):
        seen.setdefault(int(train.sequence(number)[0]), []).append(int(train.labels[number]))
    guesses = {symbol: min(labels, key=lambda value: (-labels.count(value), value)) for symbol, labels in seen.items()}
    hits = [guesses.get(int(test.sequence(number)[0]), 0) == test.labels[number] for number in range(test.num_examples)]
    assert data.description["baselines"]["by first operator"]["test"] == sum(hits) / 3
    assert data.description["baselines"]["by first operator"]["train"] > data.splits["train"].majority_share(10)


def test_guessing_by_where_circles_lie_sees_nothing_but_circles(tmp_path):
    task = replace(read_config("pathfinder-small").new_task(None), num_train=300, num_validation=20, num_test=100)
    shares = prepare(task, tmp_path).description["baselines"]["by where the circles lie"]
    assert 0.55 < shares["train"] < 0.8
    assert 0.5 < shares["test"] < 0.8
    drawing = task.draw_one(Random(1))
    assert task.render(drawing, circles=False).max() == 170
    assert task.render(drawing).max() == 255
    for change in ({"contrast": 1.5}, {"contrast": 0.9}, {"circle_radius": 1.0}):  # 0.9 of four shades rounds to white
        assert replace(task, **change).baselines({}) == {}


def test_a_changed_file_is_noticed(tmp_path):
    data = prepare(TASK, tmp_path)
    (path,) = tmp_path.glob("*/test.npz")
    path.write_bytes(data.splits["validation"].to_bytes())
    with pytest.raises(ValueError, match=r"test.npz was changed after it was written; delete .* to make it again"):
        prepare(TASK, tmp_path)


def test_examples_that_come_twice_are_refused(tmp_path):
    task = replace(TASK, num_train=2000, min_length=4, max_length=4)
    with pytest.raises(ValueError, match=r"\d+ of 2006 generated examples were drawn twice; ask for longer or fewer"):
        prepare(task, tmp_path)
