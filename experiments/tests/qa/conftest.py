"""A model of each kind that fits in a few kilobytes, questions for them, and workers that run where the test runs."""

import json

import pytest

from tiny_models import write_tiny_llama
from topk_experiments.qa import evaluation, finetuning, small_reader
from topk_experiments.runs import training

WORDS = ["Question", "Answer", "red", "blue", "green", "hat", "coat", "is", "the", "what", "colour", "of", "has", "Ann"]


@pytest.fixture(scope="session")
def decoder(tmp_path_factory):
    """Folder of a random Llama that knows a dozen words."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    sizes = {"num_hidden_layers": 1, "max_position_embeddings": 70, "initializer_range": 0.5}
    return write_tiny_llama(folder, ["?", ":", ".", *WORDS], **sizes)


@pytest.fixture
def colours(tmp_path):
    """A file of a dozen multiple-choice questions."""
    rows = [
        {"text": f"what colour is {'the ' * (number % 3)}{thing}?", "answers": [colour], "choices": ["red", "blue hat"]}
        for number, (thing, colour) in enumerate([("hat", "red"), ("coat", "blue hat"), ("Ann", "red")] * 4)
    ]
    path = tmp_path / "sets" / "colours.jsonl"
    path.parent.mkdir()
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def reading(tmp_path_factory):
    """Folder of the generated task in a tiny size, with its untrained T5."""
    folder = tmp_path_factory.mktemp("reading")
    text = folder / "text.txt"
    text.write_text(" ".join(f"{letter * 4}{other}" for letter in "abcdef" for other in "uvwxyz"))
    sizes = {"words": 8, "facts": (2, 3), "num_train": 60, "num_test": 12}
    model = {"d_model": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    small_reader.make_small_reader(small_reader.SmallReaderConfig(text, **sizes, **model, out=folder), lambda _: None)
    return folder


@pytest.fixture
def in_this_process(monkeypatch):
    """Runs workers where the test runs; records (function, request, messages) of each."""
    calls = []

    def run(function, request, on_message):
        name = function.partition(":")[2]
        messages = []
        calls.append((name, request, messages))

        def send(message):
            messages.append(message)
            on_message(message)

        worker = {"evaluate_point": evaluation.evaluate_point, "train_arm": finetuning.train_arm}[name]
        return worker(json.loads(json.dumps(request)), send)

    monkeypatch.setattr(evaluation, "run_in_fresh_process", run)
    monkeypatch.setattr(training, "run_in_fresh_process", run)
    return calls
