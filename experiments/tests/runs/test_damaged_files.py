"""One valid file of every kind is damaged again and again: it is read rightly, or an error in words names it."""

import functools
import gzip
import json
import random
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from tiny_models import write_tiny_llama
from topk_attention.calibrate import Calibration
from topk_attention.files import read_utf8
from topk_experiments.benchmarks.error.capture import load_layers
from topk_experiments.lra.configuration import read_config
from topk_experiments.lra.tasks import CitedPapers, GreyImages, ListOps, ReviewSentiment, SameDocument, prepare
from topk_experiments.lra.tasks.preparation import Progress
from topk_experiments.models.pretrained import find_model, load_config, load_model, load_tokenizer
from topk_experiments.models.speech import read_recording
from topk_experiments.models.text import read_text
from topk_experiments.qa.tasks.reading import read_questions
from topk_experiments.runs.records import read_json, read_json_lines
from topk_experiments.runs.training import load_whole, save_whole

# The only kinds of error that commands put into words.
OURS = (ValueError, OSError, RuntimeError)
LISTOPS = ListOps(num_train=4, num_validation=2, num_test=2, max_depth=2, max_args=3, min_length=4, max_length=9)
ROW = {"id": "1", "question": "Who ate it?", "context": "Bob ate.", "answers": {"text": ["Bob"], "answer_start": [0]}}
CHOICES = [{"text": "hot", "label": "A"}, {"text": "cold", "label": "B"}]
SQUAD = {"paragraphs": [{"context": "Bob ate.", "qas": [{"question": "Who?", "answers": [{"text": "Bob"}]}]}]}
RECORD = {
    "schema": "a/1",
    "point": {"k": 4},
    "runs": [{"k": 4}],
    "environment": {"date": "2026-01-01", "commit": "abc"},
    "outcome": "finished",
}
CONFIGURATION = """
[data]
task = "listops"
num_train = 4
[model]
num_layers = 1
d_model = 8
num_heads = 2
d_attention = 8
d_ff = 8
[training]
batch = 2
steps = 3
learning_rate = 0.1
warmup = 1
evaluate_every = 1
[attention]
k = 4
num_features = 8
"""


def written(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def _calibration(folder):
    path = folder / "k.json"
    curves = {"k": [1, 2], "lost_mass": [[0.5, 0.1]], "loss_error": [[1, 0.2]], "loss_change": [[[1, 2]]] * 2}
    content = {"version": 2, "about": {"loss": 1.5}, "attention_k": {"layer.0": [2]}, "feed_forward_k": {"layer.0": 3}}
    content |= {name: {"layer.0": curves | {"rows": 9}} for name in ("attention_curves", "feed_forward_curves")}
    written(path, json.dumps(content))
    return path, lambda: dict(Calibration.load(path))


def _questions(name, content):
    def new(folder):
        path = written(folder / name, content)
        return path, lambda: [asdict(question) for question in read_questions(path).questions]

    return new


def _reviews(folder):
    for name in ("train", "test"):
        path = written(folder / f"{name}.jsonl", '{"text": "good", "label": 1}\n{"text": "bad", "label": 0}\n')
    return path, lambda: ReviewSentiment(str(folder)).make(Progress(folder))


def _compressed_reviews(folder):
    for name in ("train", "test"):
        path = written(folder / f"{name}.jsonl.gz", gzip.compress(b'{"text": "good", "label": 1}\n' * 2))
    return path, lambda: ReviewSentiment(str(folder)).make(Progress(folder))


def _papers(folder):
    for name in ("train", "eval", "test"):
        path = written(folder / f"new_aan_pairs.{name}.tsv", "1.0\tP1\tP2\tone\ttwo\n0.0\tP1\tP3\tx\ty\n")
    return path, lambda: CitedPapers(str(folder)).make(Progress(folder))


def _documents(folder):
    with zipfile.ZipFile(folder / "texts.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(8):
            archive.writestr(f"{number}.txt", f"{number} words " * 9)
    task = SameDocument(str(folder / "texts.zip"), 4, 2, 2, max_length=8, shortest=16)
    return folder / "texts.zip", lambda: task.make(Progress(folder))


def _images(folder):
    path, images = folder / "images.npz", np.zeros((12, 32, 32), np.uint8)
    np.savez(path, x_train=images, y_train=np.arange(12) % 10, x_test=images, y_test=np.arange(12) % 10)
    return path, lambda: GreyImages(str(path), num_validation=2).make(Progress(folder))


def _binary_images(folder):
    for name in [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]:
        path = written(folder / f"{name}.bin", bytes(3073) * 2)
    return path, lambda: GreyImages(str(folder), num_validation=2).make(Progress(folder))


def _prepared(name):
    def new(folder):
        prepare(LISTOPS, folder)
        (path,) = folder.rglob(name)
        return path, lambda: prepare(LISTOPS, folder)

    return new


def _capture(folder):
    names = ("query", "key", "value", "output")
    torch.save({"0": {name: torch.ones(1, 2, 3, 4) for name in names}}, folder / "layers.pt")
    return folder / "layers.pt", lambda: list(load_layers(folder / "layers.pt"))


def _checkpoint(folder):
    save_whole(folder / "a.pt", {"identity": {"seed": 0}, "weights": {"w": torch.ones(3)}})
    return folder / "a.pt", lambda: load_whole(folder / "a.pt")


def _model(name, load):
    def new(folder):
        write_tiny_llama(folder, ["one", "two"])
        return folder / name, lambda: load(find_model(str(folder)))

    return new


def _sound(folder):
    soundfile = pytest.importorskip("soundfile")
    soundfile.write(folder / "a.flac", np.sin(np.arange(400) / 9), 8000)
    return folder / "a.flac", lambda: read_recording(folder / "a.flac", 16000)


def _read(name, content, read):
    def new(folder):
        path = written(folder / name, content)
        return path, functools.partial(read, path)

    return new


KINDS = {
    "calibration": _calibration,
    "record": _read("record.json", json.dumps(RECORD), read_json),
    "records": _read("records.jsonl", f"{json.dumps(RECORD)}\n" * 2, read_json_lines),
    "text": _read("a.txt", "déjà vu\n", read_utf8),
    "text of an experiment": _read("a.txt", "déjà vu\n", read_text),
    "configuration": _read("tiny.toml", CONFIGURATION, lambda path: read_config(str(path))),
    "capture": _capture,
    "checkpoint": _checkpoint,
    "sound": _sound,
    "SQuAD": _questions("a.json", json.dumps({"data": [SQUAD]})),
    "rows of SQuAD": _questions("a.json", json.dumps([ROW])),
    "labelled rows": _questions(
        "a.jsonl", json.dumps({"question": {"stem": "The sun is", "choices": CHOICES}, "answerKey": "A"})
    ),
    "BoolQ": _questions("a.jsonl", json.dumps({"question": "is it", "passage": "p", "answer": True})),
    "own rows": _questions("a.jsonl", json.dumps({"text": "q", "answers": ["a"], "choices": ["a", "b"]})),
    "UnifiedQA": _questions("a.tsv", "which? \\n (a) red (b) blue\tred\nwho? \\n bob ate.\tbob\n"),
    "reviews": _reviews,
    "compressed reviews": _compressed_reviews,
    "papers": _papers,
    "documents": _documents,
    "images": _images,
    "binary images": _binary_images,
    "prepared examples": _prepared("train.npz"),
    "prepared description": _prepared("data.json"),
    "model's configuration": _model("config.json", load_config),
    "model's weights": _model("model.safetensors", load_model),
    "model's tokenizer": _model("tokenizer.json", load_tokenizer),
}


def type_changes(value, random):
    """The JSON value with one part of it, drawn at random, put in the place of a part of another type."""
    others = [None, True, 0, -1, 10**30, 1.5, float("nan"), "", "text", [], [1], {}, {"a": 1}]
    if isinstance(value, dict | list) and value and random.random() < 0.8:
        key = random.choice(list(value) if isinstance(value, dict) else range(len(value)))
        changed = value.copy()
        if isinstance(value, dict) and random.random() < 0.15:
            del changed[key]
        else:
            changed[key] = type_changes(value[key], random)
        return changed
    return random.choice(others)


def damaged(content: bytes, random: random.Random) -> bytes:
    way = random.choice(["cut", "flip", "flip", "type", "type", "other"])
    if way == "type":
        lines = content.decode("utf-8", "replace").strip().split("\n")
        number = random.randrange(len(lines))
        try:
            lines[number] = json.dumps(type_changes(json.loads(lines[number]), random))
            return "\n".join(lines).encode()
        except ValueError:
            way = "flip"
    if way == "cut":
        return content[: random.randrange(len(content))]
    if way == "other":
        wholes = [b"", b"\x00" * 40, b"\xff\xfe" + "text".encode("utf-16-le"), b"PK\x03\x04rest", b"\x1f\x8brest"]
        return random.choice([*wholes, b"[" * 100_000, b"9" * 5000, b"{}", b"[]", b"null", b"caf\xe9"])
    changed = bytearray(content)
    for _ in range(random.choice([1, 1, 3])):
        changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def said_by(read):
    """What a reader says of a file that it refuses; None where it reads it."""
    try:
        read()
    except OURS as error:
        return str(error)
    except Exception as error:  # a user would see a traceback
        pytest.fail(repr(error))
    return None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_read_or_refused_with_its_name(kind, tmp_path):
    path, read = KINDS[kind](tmp_path)
    content = path.read_bytes()
    assert said_by(read) is None
    refusals = 0
    for seed in range(25 if kind.startswith("model") else 120):
        path.write_bytes(damaged(content, random.Random(f"{kind} {seed}")))
        said = said_by(read)
        refusals += said is not None
        assert said is None or str(path) in said or str(path.parent) in said, (seed, said)
    assert refusals > 0
    path.unlink()
    path.mkdir()  # a folder in place of a file
    said = said_by(read)
    assert said is None or str(path) in said or str(path.parent) in said


@pytest.mark.parametrize("kind", ["capture", "checkpoint", "prepared examples", "compressed reviews"])
def test_files_with_checksums_never_give_another_value(kind, tmp_path):
    path, read = KINDS[kind](tmp_path)
    content, right = path.read_bytes(), repr(read())
    for seed in range(60):
        path.write_bytes(damaged(content, random.Random(f"{kind} {seed}")))
        try:
            assert repr(read()) == right, seed
        except OURS:
            continue
