from dataclasses import replace

import pytest

from topk_attention.tasks.lra import ListOps, prepare
from topk_attention.tasks.lra import preparation as making

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


def test_a_changed_file_is_noticed(tmp_path):
    data = prepare(TASK, tmp_path)
    (path,) = tmp_path.glob("*/test.npz")
    path.write_bytes(data.splits["validation"].to_bytes())
    with pytest.raises(ValueError, match=r"test.npz is not as it was written; delete .* to make it again"):
        prepare(TASK, tmp_path)


def test_examples_that_come_twice_are_refused(tmp_path):
    task = replace(TASK, num_train=2000, min_length=4, max_length=4)
    with pytest.raises(ValueError, match=r"\d+ of 2006 generated examples came twice; longer ones, or fewer"):
        prepare(task, tmp_path)
