"""Tasks that read files: reviews, pairs of documents and images."""

import gzip
import json
import shutil
import sys
import types
import zipfile
from pathlib import Path

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
    with pytest.raises(ValueError, match=r"line 2 of .*train.jsonl is not a JSON object with text and label"):
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
        ValueError, match=r"line 3 of .*new_aan_pairs.train.tsv must have five fields .* the first 0 or 1"
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


def test_reviews_lie_among_files_that_are_none(tmp_path, progress):
    expected = ReviewSentiment(full_folder(tmp_path / "plain")).make(progress)
    for folder in (full_folder(tmp_path / "other"), full_folder(tmp_path / "above" / "aclImdb")):
        pos = Path(folder) / "train" / "pos"
        (pos / "._0_7.txt").write_bytes(b"\x00\x05\x16\x07Mac OS X\xb0\xff")
        (pos / "folder.txt").mkdir()
    for source in (tmp_path / "other", tmp_path / "above"):
        made = ReviewSentiment(str(source)).make(progress)
        assert {name: part.sha256() for name, part in made.items()} == {
            name: part.sha256() for name, part in expected.items()
        }


def test_a_review_that_is_not_utf8_and_a_class_without_reviews_are_named(tmp_path, progress):
    folder = Path(full_folder(tmp_path / "plain"))
    (folder / "train" / "pos" / "9_9.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(ValueError, match=r"9_9\.txt is not UTF-8 \(line 1, byte 3\); convert it"):
        ReviewSentiment(str(folder)).make(progress)
    shutil.rmtree(folder / "train" / "neg")
    with pytest.raises(ValueError, match=r"train/neg must hold \.txt files, and holds none"):
        ReviewSentiment(str(folder)).make(progress)


def test_lines_of_json_may_begin_with_a_byte_order_mark_and_end_blank(tmp_path, progress):
    lines = [json.dumps({"text": "a\u2028b\x85c", "label": True}, ensure_ascii=False), "", ""]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    made = ReviewSentiment(str(tmp_path)).make(progress)
    assert contents(made["train"]) == [(["a\u2028b\x85c".encode()], 1)]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": null, "label": 1}', "text must be a string, got None in line 1 of .*train.jsonl"),
        ('{"text": "a\\ud83d", "label": 1}', "text of line 1 of .*train.jsonl is no UTF-8: surrogates not allowed"),
        (
            '{"text": "a", "label": "1"}',
            r"label must be 0 or 1, got '1' in a train review: line 1 of .*train.jsonl",
        ),
        ('{"text": "a", "label": [1]}', r"label must be 0 or 1, got \[1\]"),
    ],
)
def test_a_line_that_is_no_review_is_named(line, words, tmp_path, progress):
    (tmp_path / "train.jsonl").write_text(line)
    with pytest.raises(ValueError, match=words):
        ReviewSentiment(str(tmp_path)).make(progress)


def test_a_damaged_gz_file_is_named(tmp_path, progress):
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a", "label": 1}')[:-9])
    with pytest.raises(ValueError, match=r"train\.jsonl\.gz is a damaged \.gz file"):
        ReviewSentiment(str(tmp_path)).make(progress)


def test_pairs_may_begin_with_a_byte_order_mark_and_end_blank(tmp_path, progress):
    expected = contents(CitedPapers(aan_folder(tmp_path)).make(progress)["train"])
    for path in tmp_path.glob("*.tsv"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b"\n\r\n")
    assert contents(CitedPapers(str(tmp_path)).make(progress)["train"]) == expected


def test_a_damaged_zip_file_is_named_and_hidden_files_in_one_are_left_out(tmp_path, progress):
    (tmp_path / "bad.zip").write_bytes(b"PK\x03\x04garbage")
    with pytest.raises(ValueError, match=r"bad\.zip cannot be read: BadZipFile File is not a zip file; pack it again"):
        SameDocument(str(tmp_path / "bad.zip")).make(progress)
    with zipfile.ZipFile(tmp_path / "good.zip", "w") as archive:
        archive.writestr("__MACOSX/._a.txt", "hidden" * 50)
        archive.writestr("a.txt", "seen" * 50)
    with pytest.raises(ValueError, match="must hold at least 6 documents of 40 bytes or more, got 1"):
        SameDocument(str(tmp_path / "good.zip"), max_length=20, shortest=40).make(progress)


def keras(tmp_path, **changes):
    (x_train, y_train), (x_test, y_test) = images(0, 12), images(1, 3)
    arrays = {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}
    np.savez(tmp_path / "keras.npz", **arrays | changes)
    return GreyImages(str(tmp_path / "keras.npz"), num_validation=4)


@pytest.mark.parametrize("kind", [np.uint8, np.int64, np.float32])
def test_labels_may_be_a_column_of_any_kind_of_number(kind, tmp_path, progress):
    column = images(0, 12)[1][:, None].astype(kind)
    made, expected = keras(tmp_path, y_train=column).make(progress), keras(tmp_path).make(progress)
    assert made["train"].sha256() == expected["train"].sha256()


def test_arrays_of_colours_become_grey_as_the_binary_version_does(tmp_path, progress):
    colours = np.zeros((3, 32, 32, 3), dtype=np.uint8)
    for channel in range(3):
        colours[channel, :, :, channel] = 255
    assert {pixels[0][0] for pixels, _ in contents(keras(tmp_path, x_test=colours).make(progress)["test"])} == {
        76,
        149,
        29,
    }


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.full(12, -1), r"keras.npz must hold labels, all of them 0 to 9, got \[-1\]"),
        (np.eye(12), r"labels of .*keras.npz must be whole numbers \[N\] or \[N, 1\], got float64 \[12, 12\]"),
        (np.full(12, 0.5), "labels of .*keras.npz must be whole numbers"),
        (np.full(12, np.nan), "labels of .*keras.npz must be whole numbers"),
        (np.zeros(11, int), "keras.npz must hold a label for each of 12 images, got 11"),
        (np.array(["cat"] * 12), "labels of .*keras.npz must be whole numbers"),
        (np.array([{}] * 12, dtype=object), r"keras.npz cannot be read: Object arrays"),
    ],
)
def test_labels_that_are_none_are_refused(labels, words, tmp_path, progress):
    with pytest.raises(ValueError, match=words):
        keras(tmp_path, y_train=labels).make(progress)


@pytest.mark.parametrize("content", [b"PK\x03\x04garbage", b"hello", b""])
def test_a_file_that_is_no_npz_is_named(content, tmp_path, progress):
    (tmp_path / "bad.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.npz is no \.npz file, or a damaged one"):
        GreyImages(str(tmp_path / "bad.npz")).make(progress)


def test_the_python_version_of_cifar_is_never_unpickled(tmp_path, progress):
    (tmp_path / "data_batch_1").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(ValueError, match="a pickle, which could run any code and is not opened"):
        GreyImages(str(tmp_path)).make(progress)


def test_the_folder_above_the_images_is_as_good(tmp_path, progress):
    inner = tmp_path / "above" / "cifar-10-batches-bin"
    inner.mkdir(parents=True)
    for name in [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]:
        (inner / name).write_bytes(bytes(3073) * 2)
    assert GreyImages(str(tmp_path / "above"), num_validation=5).make(progress)["test"].num_examples == 2
