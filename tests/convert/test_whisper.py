"""Whisper-base, pretrained, on eleven seconds of speech: its transcript with few keys."""

from __future__ import annotations

import pytest
import torch

from topk_attention import convert, unconvert
from topk_experiments.models.speech import read_recording, words
from whisper_base import speech_file, transcribe, whisper_base

SPOKEN = "And so my fellow Americans ask not what your country can do for you, ask what you can do for your country."


def encoder_and_cross(path, module):
    return path.startswith("model.encoder.") or path.endswith("encoder_attn")


@pytest.fixture(scope="module")
def whisper():
    sound = read_recording(speech_file(), 16_000).samples
    model, tokenizer, extract = whisper_base()
    features = extract(sound, sampling_rate=16_000, return_tensors="pt").input_features.float()
    return model, tokenizer, features


def test_with_every_key_kept_the_encoder_and_the_transcript_are_the_originals(whisper):
    model, tokenizer, features = whisper
    with torch.no_grad():
        expected, text = model.model.encoder(features).last_hidden_state, transcribe(model, tokenizer, features)
        assert words(text) == words(SPOKEN)
        convert(model, attention_k=1500, feed_forward_k=2048)
        assert transcribe(model, tokenizer, features) == text
        torch.testing.assert_close(model.model.encoder(features).last_hidden_state, expected, rtol=0, atol=1e-3)
        unconvert(model)
        torch.testing.assert_close(model.model.encoder(features).last_hidden_state, expected, rtol=0, atol=0)


@pytest.mark.parametrize("k", [32, 64, 128])
def test_with_few_of_1500_keys_in_encoder_and_cross_attention_it_hears_nearly_the_same_words(whisper, k):
    """Measured: the same words at k = 32 and 128, "asked" for "ask" twice at k = 64."""
    model, tokenizer, features = whisper
    report = convert(model, attention_k=k, where=encoder_and_cross)
    assert len(report.replaced) == 12
    heard, spoken = words(transcribe(model, tokenizer, features)), words(SPOKEN)
    unconvert(model)
    assert len(heard) == len(spoken)
    assert sum(one != other for one, other in zip(heard, spoken, strict=True)) <= 2, heard
