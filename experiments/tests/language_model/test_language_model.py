import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from topk_experiments.language_model.language_model import (
    LanguageModelConfig,
    new_model,
    run_language_model,
    split_tokens,
    train_arm,
    validation_loss,
)
from topk_experiments.models.settings import one_at_a_time
from topk_experiments.models.text import Text
from topk_experiments.runs import training
from topk_experiments.runs.records import read_json


@pytest.fixture
def config(tmp_path):
    text = tmp_path / "story.txt"
    text.write_text("the keys that score best are kept and all others are left out.\n" * 20)
    sizes = {"num_layers": 1, "d_model": 16, "num_heads": 2, "d_ff": 32, "context": 12, "batch": 3}
    return LanguageModelConfig(
        one_at_a_time([3], [8]), text=text, **sizes, steps=4, evaluate_every=2, threads=1, out=tmp_path / "out"
    )


@pytest.fixture
def in_this_process(monkeypatch):
    requests = []

    def run(function, request, on_message):
        requests.append(request)
        return train_arm(request, on_message)

    monkeypatch.setattr(training, "run_in_fresh_process", run)
    return requests


@pytest.mark.parametrize("tokens", ["bytes", "words"])
def test_every_arm_is_trained_and_its_perplexity_recorded(config, in_this_process, console, tokens):
    record = run_language_model(replace(config, tokens=tokens), console)
    name = f"story-{tokens}"
    assert read_json(config.out / f"{name}.json") == record
    assert (config.out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert [arm["name"] for arm in record["arms"]] == ["full", "attention k = 3", "feed-forward k = 8"]
    assert len({arm["validation_loss"] for arm in record["arms"]}) == 3
    for arm in record["arms"]:
        assert arm["perplexity"] == pytest.approx(math.exp(arm["validation_loss"]))
        assert arm["curve"][-1]["step"] == 4
    assert run_language_model(replace(config, tokens=tokens), console) == record
    assert len(in_this_process) == 3


def test_with_every_key_and_neuron_the_curves_are_those_of_the_full_model(config, in_this_process, console):
    record = run_language_model(replace(config, settings=one_at_a_time([12], [32])), console)
    full, *others = ([point["validation_loss"] for point in arm["curve"]] for arm in record["arms"])
    for losses in others:
        assert losses == pytest.approx(full, rel=1e-4)
    assert "k = 12 is full attention here: no query has more than 12 keys" in console.export_text()


def test_the_loss_falls(config, in_this_process, console):
    settings = one_at_a_time([4], full=False)
    record = run_language_model(replace(config, settings=settings, steps=60, evaluate_every=30), console)
    first, last = (point["validation_loss"] for point in record["arms"][0]["curve"])
    assert last < first - 0.1


def test_validation_counts_every_token_but_the_first_once():
    config = {"context": 8, "num_layers": 1, "d_model": 16, "num_heads": 2, "d_ff": 32, "seed": 0}
    model = new_model(config, 11).eval()
    tokens = torch.randint(11, (30,), generator=torch.Generator().manual_seed(0))
    expected = []
    with torch.no_grad():
        for start in range(0, 29, 8):
            window = tokens[start : start + 9]
            logits = model(input_ids=window[None, :-1]).logits[0]
            expected += F.cross_entropy(logits, window[1:], reduction="none").tolist()
        assert len(expected) == 29
        assert validation_loss(model, tokens, config) == pytest.approx(sum(expected) / 29, rel=1e-5)
        assert validation_loss(model, tokens, config, most_windows=2) != validation_loss(model, tokens, config)


def test_words_of_validation_that_training_lacks_are_unknown():
    training_part, validation, vocabulary = split_tokens(Text("a <unk> b c d e f g h\nz a", ""), "words")
    assert (len(training_part), len(validation), vocabulary) == (10, 2, 10)
    assert validation[1] == training_part[0]
    assert training_part[1] == 0 == validation[0]
    assert split_tokens(Text("ab" * 10, ""), "bytes") == ([97, 98] * 9, [97, 98], 256)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": "letters"}, 'tokens must be "bytes" or "words", got \'letters\''),
        ({"d_model": 15}, "d_model must be a multiple of its 2 heads, got 15"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
    ],
)
def test_a_configuration_that_cannot_run_is_refused(config, change, words):
    with pytest.raises(ValueError, match=words):
        replace(config, **change)


def test_a_text_that_is_too_short_is_refused(config, console):
    with pytest.raises(ValueError, match=r"story\.txt is too short: its validation part must hold 201 bytes, it has 1"):
        run_language_model(replace(config, context=200), console)
