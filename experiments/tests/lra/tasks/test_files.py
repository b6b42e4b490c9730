"""Tasks that read files: reviews, pairs of documents and images."""

import gzip
import json
import sys
import types
import zipfile

import numpy as np
import pytest

from local_data import shared_data
from topk_experiments.lra.tasks import CitedPapers, GreyImages, ReviewSentiment, SameDocument
from topk_experiments.lra.tasks.preparation import Progress

REVIEWS = {
    "train": [("Fine, très fine.", 1), ("Poor.", 0), ("Grand!", 1), ("Dull", 0)],
    "test": [("Bad and long, so long", 0), ("Good", 1)],
}


@pytest.fixture
def progress(tmp_path):
    return Progress(tmp_path / "shards")


def contents(examples):
    return sorted(
        (
            [bytes(examples.sequence(number)) for number in parts],
            int(label),
        )
        for parts, label in zip(examples.sequences, examples.labels, strict=True)
    )


def full_folder(folder):
    for split, reviews in REVIEWS.items():
        for number, (text, label) in enumerate(reviews):
            path = folder / split / ("pos" if label else "neg") / f"{number}_7.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    return str(folder)


def json_lines(folder, suffix):
    for split, reviews in REVIEWS.items():
        lines = "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in reviews).encode()
        (folder / f"{split}.jsonl{suffix}").write_bytes(gzip.compress(lines) if suffix else lines)
    return str(folder)


def hugging_face(monkeypatch):
    def load_dataset(name, split):
        assert name == "somebody/reviews"
        return [{"text": text, "label": label} for text, label in REVIEWS[split]]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return "somebody/reviews"


@pytest.mark.parametrize("form", ["full folder", "json lines", "json lines, packed", "hugging face"])
def test_all_forms_of_the_reviews_give_the_same_bytes(form, tmp_path, progress, monkeypatch):
    source = {
        "full folder": lambda: full_folder(tmp_path),
        "json lines": lambda: json_lines(tmp_path, ""),
        "json lines, packed": lambda: json_lines(tmp_path, ".gz"),
        "hugging face": lambda: hugging_face(monkeypatch),
    }[form]()
    splits = ReviewSentiment(source, max_length=10).make(progress)
    for split, expected in (("train", "train"), ("validation", "test"), ("test", "test")):
        wanted = sorted(([text.encode()[:10]], label) for text, label in REVIEWS[expected])
        assert contents(splits[split]) == wanted


def test_without_the_package_datasets_the_way_out_is_said(progress, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"source 'somebody/reviews' is no folder; .* the package datasets"):
        ReviewSentiment("somebody/reviews").make(progress)


def test_held_out_reviews_are_not_trained_on(tmp_path, progress):
    source = json_lines(tmp_path, "")
    splits = ReviewSentiment(source, num_validation=1, seed=3).make(progress)
    together = contents(splits["train"]) + contents(splits["validation"])
    assert sorted(together) == sorted(([text.encode()], label) for text, label in REVIEWS["train"])
    assert splits["validation"].num_examples == 1
    with pytest.raises(ValueError, match="num_validation must be below the 4 training examples, got 4"):
        ReviewSentiment(source, num_validation=4).make(progress)


def test_what_is_not_reviews_is_refused(tmp_path, progress):
    with pytest.raises(ValueError, match=r"must hold train/pos and train/neg with .txt files, or train.jsonl"):
        ReviewSentiment(str(tmp_path)).make(progress)
    with pytest.raises(FileNotFoundError, match=r"source folder not found: ./nowhere"):
        ReviewSentiment("./nowhere").make(progress)
    (tmp_path / "train.jsonl").write_text('{"text": "so", "label": 1}\n{"text": "no label"}\n')
    with pytest.raises(ValueError, match=r"line 2 of train.jsonl is not a JSON object with text and label"):
        ReviewSentiment(str(tmp_path)).make(progress)
    (tmp_path / "train.jsonl").write_text('{"text": "so", "label": 4}\n')
    with pytest.raises(ValueError, match="label must be 0 or 1, got 4 in a train review"):
        ReviewSentiment(str(tmp_path)).make(progress)
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(ValueError, match="no train reviews in"):
        ReviewSentiment(str(tmp_path)).make(progress)


def aan_folder(folder, last="1.0\tP1\tP3\tone paper\tthird"):
    lines = ["1\tP1\tP2\tone paper\tanother paper", "0\tP2\tP3\tanother paper\tthird", last]
    for name in ("train", "eval", "test"):
        (folder / f"new_aan_pairs.{name}.tsv").write_text("\n".join(lines) + "\n")
    return str(folder)


def test_cited_papers_are_read_from_their_files_and_kept_once(tmp_path, progress):
    splits = CitedPapers(aan_folder(tmp_path), max_length=7).make(progress)
    for examples in splits.values():
        assert contents(examples) == [
            ([b"another", b"third"], 0),
            ([b"one pap", b"another"], 1),
            ([b"one pap", b"third"], 1),
        ]
        assert len(examples.starts) - 1 == 3


@pytest.mark.parametrize("line", ["1\tP1\tP2\tonly four", "yes\tP1\tP2\ta\tb"])
def test_a_line_that_is_no_pair_is_named(line, tmp_path, progress):
    with pytest.raises(
        ValueError, match=r"line 3 of new_aan_pairs.train.tsv must have five fields .* the first 0 or 1"
    ):
        CitedPapers(aan_folder(tmp_path, last=line)).make(progress)
    (tmp_path / "new_aan_pairs.train.tsv").unlink()
    with pytest.raises(FileNotFoundError, match=r"source must hold new_aan_pairs.train.tsv; there is no"):
        CitedPapers(str(tmp_path)).make(progress)


def documents(folder, number=12):
    """Texts in which every letter says which document and which half it comes from."""
    for n in range(number):
        path = folder / ("deep" if n % 2 else ".") / f"{n:02}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([2 * n]) * 20 + bytes([2 * n + 1]) * (20 + n))
    return folder


def test_passages_of_one_document_do_not_overlap_and_splits_share_no_document(tmp_path, progress):
    task = SameDocument(
        str(documents(tmp_path)), num_train=80, num_validation=20, num_test=20, max_length=16, shortest=40
    )
    splits = task.make(progress)
    seen = {}
    for split, examples in splits.items():
        assert 0.2 < examples.labels.mean() < 0.8
        seen[split] = set()
        for parts, label in zip(examples.sequences, examples.labels, strict=True):
            first, second = (examples.sequence(number) for number in parts)
            assert (len(first), len(second)) == (16, 16)
            origins = [{int(value) // 2 for value in passage} for passage in (first, second)]
            assert [len(origin) for origin in origins] == [1, 1]
            assert (origins[0] == origins[1]) == bool(label)
            seen[split] |= origins[0] | origins[1]
    assert not (seen["train"] & seen["validation"] | seen["train"] & seen["test"] | seen["validation"] & seen["test"])


def test_the_two_passages_of_a_document_come_from_different_halves(tmp_path, progress):
    for n in range(8):
        (tmp_path / f"{n}.txt").write_bytes(bytes([2 * n]) * 20 + bytes([2 * n + 1]) * 20)
    task = SameDocument(str(tmp_path), num_train=60, num_validation=10, num_test=10, max_length=20, shortest=40)
    train = task.make(progress)["train"]
    orders = set()
    for parts, label in zip(train.sequences, train.labels, strict=True):
        if label:
            halves = [train.sequence(number) for number in parts]
            assert [len(half) for half in halves] == [20, 20]
            assert sorted(int(half[0]) % 2 for half in halves) == [0, 1]
            orders.add(int(halves[0][0]) % 2)
    assert orders == {0, 1}


def test_lengths_of_passages_say_nothing_about_the_label(tmp_path, progress):
    for n in range(12):
        (tmp_path / f"{n}.txt").write_bytes(bytes([n]) * (40 + 7 * n))
    task = SameDocument(str(tmp_path), num_train=60, num_validation=10, num_test=10, max_length=20, shortest=40)
    for examples in task.make(progress).values():
        assert set(examples.labels.tolist()) == {0, 1}
        assert {len(examples.sequence(number)) for number in examples.sequences.ravel()} == {20}
    with pytest.raises(ValueError, match=r"shortest must be at least 2 x max_length = 42, .* got 41"):
        SameDocument(str(tmp_path), max_length=21, shortest=41)
    assert SameDocument("defaults").shortest >= 2 * SameDocument("defaults").max_length


def test_a_zip_file_of_texts_is_as_good_as_their_folder(tmp_path, progress):
    folder = documents(tmp_path / "texts")
    with zipfile.ZipFile(tmp_path / "texts.zip", "w") as archive:
        for path in folder.rglob("*.txt"):
            archive.write(path, path.relative_to(folder))
    sizes = {"num_train": 10, "num_validation": 5, "num_test": 5, "max_length": 20, "shortest": 40}
    both = [SameDocument(str(source), **sizes).make(progress) for source in (folder, tmp_path / "texts.zip")]
    assert [s.sha256() for s in both[0].values()] == [s.sha256() for s in both[1].values()]


def test_too_few_documents_are_refused(tmp_path, progress):
    folder = documents(tmp_path, number=5)
    with pytest.raises(ValueError, match="source must hold at least 6 documents of 40 bytes or more, got 5"):
        SameDocument(str(folder), max_length=20, shortest=40).make(progress)
    with pytest.raises(FileNotFoundError, match=r"source must be a folder or a .zip file with .txt files, got .*gone"):
        SameDocument(str(tmp_path / "gone")).make(progress)


def images(seed, count):
    random = np.random.default_rng(seed)
    return random.integers(256, size=(count, 32, 32), dtype=np.uint8), np.arange(count, dtype=np.uint8) % 10


def test_grey_images_are_read_from_arrays(tmp_path, progress):
    x_train, y_train = images(0, 12)
    x_test, y_test = images(1, 3)
    np.savez(tmp_path / "grey.npz", x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    splits = GreyImages(str(tmp_path / "grey.npz"), num_validation=4).make(progress)
    assert {name: examples.num_examples for name, examples in splits.items()} == {
        "train": 8,
        "validation": 4,
        "test": 3,
    }
    together = contents(splits["train"]) + contents(splits["validation"])
    assert sorted(together) == sorted(([x.tobytes()], int(y)) for x, y in zip(x_train, y_train, strict=True))
    assert contents(splits["test"]) == sorted(([x.tobytes()], int(y)) for x, y in zip(x_test, y_test, strict=True))


def test_colours_become_as_bright_as_they_look(tmp_path, progress):
    colours = {"red": 76, "green": 149, "blue": 29, "white": 254}  # 255 x 0.2989, 0.5870, 0.1140, cut off
    records = b""
    for label, name in enumerate(colours):
        channels = [255 if name in (channel, "white") else 0 for channel in ("red", "green", "blue")]
        records += bytes([label]) + b"".join(bytes([value]) * 1024 for value in channels)
    for name in [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]:
        (tmp_path / name).write_bytes(records)
    splits = GreyImages(str(tmp_path), num_validation=5).make(progress)
    assert splits["train"].num_examples == 15
    assert contents(splits["test"]) == sorted(
        ([bytes([grey]) * 1024], label) for label, grey in enumerate(colours.values())
    )
    (tmp_path / "data_batch_3.bin").write_bytes(records[:-1])
    with pytest.raises(ValueError, match=r"data_batch_3.bin must hold records of 3073 bytes, got 12291 bytes"):
        GreyImages(str(tmp_path)).make(progress)
    (tmp_path / "test_batch.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"source must hold test_batch.bin"):
        GreyImages(str(tmp_path))._read("test")


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"x_test": images(0, 2)[0]}, "must hold x_train and y_train, got x_test"),
        ({"x_train": np.zeros((2, 32, 32)), "y_train": np.zeros(2, int)}, r"must be uint8 \[N, 32, 32\], got float64"),
        (
            {"x_train": images(0, 2)[0], "y_train": np.array([0, 12])},
            r"labels, all of them 0 to 9, got \[0, 12\]",
        ),
    ],
)
def test_arrays_that_are_no_images_are_refused(arrays, words, tmp_path, progress):
    np.savez(tmp_path / "grey.npz", **arrays)
    with pytest.raises(ValueError, match=words):
        GreyImages(str(tmp_path / "grey.npz")).make(progress)


def test_images_that_are_nowhere_are_refused(progress):
    with pytest.raises(FileNotFoundError, match=r"source must be the folder .* or an .npz file, got nowhere"):
        GreyImages("nowhere").make(progress)


def test_the_real_subsets_are_balanced(progress):
    reviews = ReviewSentiment(str(shared_data("imdb_subset")), max_length=64, num_validation=400).make(progress)
    assert {name: examples.num_examples for name, examples in reviews.items()} == {
        "train": 3600,
        "validation": 400,
        "test": 2000,
    }
    assert reviews["test"].majority_share(2) == 0.5
    pictures = GreyImages(str(shared_data("cifar10_gray") / "cifar10_gray_subset.npz"), num_validation=1000).make(
        progress
    )
    assert pictures["test"].num_examples == 2000
    assert pictures["test"].majority_share(10) == 0.1
