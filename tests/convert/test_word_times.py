"""Whisper's times of words: transformers switches to its eager attention for them, whatever runs at the moment."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig

from convert_models import tiny_whisper
from topk_attention import convert, unconvert

SPECIAL = {"pad_token_id": 1, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 2}


@pytest.fixture
def whisper():
    model = tiny_whisper(**SPECIAL, init_std=1.5).eval()
    model.generation_config = GenerationConfig(
        **SPECIAL,
        max_length=16,
        is_multilingual=True,
        lang_to_id={"<|en|>": 3},
        task_to_id={"transcribe": 4},
        no_timestamps_token_id=90,
        alignment_heads=[[0, 0], [1, 1]],
        suppress_tokens=[0, 2, 3, 4, 90],
    )
    return model


def heard(model, **options):
    features = torch.randn(1, 8, 2 * model.config.max_source_positions, generator=torch.Generator().manual_seed(0))
    return model.generate(features, language="en", task="transcribe", do_sample=False, num_beams=1, **options)


def test_asking_for_times_leaves_top_k_with_a_warning_and_convert_returns_to_it(whisper):
    expected = heard(whisper, return_token_timestamps=True)
    whisper.set_attn_implementation("sdpa")
    convert(whisper, attention_k=1)
    few = heard(whisper)
    assert not torch.equal(few, expected["sequences"])
    with pytest.warns(UserWarning, match=r'switched from top-k to "eager" and stays so; call topk_attention\.convert'):
        times = heard(whisper, return_token_timestamps=True)
    assert torch.equal(times["sequences"], expected["sequences"])
    assert torch.equal(times["token_timestamps"], expected["token_timestamps"])
    assert torch.equal(heard(whisper), expected["sequences"])  # it stays in full, as the warning says
    convert(whisper)
    assert torch.equal(heard(whisper), few)
    unconvert(whisper)
    assert torch.equal(heard(whisper), expected["sequences"])
    assert whisper.config._attn_implementation == "sdpa"
