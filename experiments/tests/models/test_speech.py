"""Recordings, words, and how far two transcripts lie apart."""

from __future__ import annotations

import numpy as np
import pytest

from topk_experiments.models.speech import read_recording, resample, word_errors, words


def test_channels_are_mixed_and_the_rate_is_changed(tmp_path):
    soundfile = pytest.importorskip("soundfile", reason="soundfile, which reads audio files, is not installed")
    time = np.arange(44_100) / 44_100
    low, high = np.sin(2 * np.pi * 440 * time), np.sin(2 * np.pi * 12_000 * time)
    path = tmp_path / "tones.wav"
    soundfile.write(path, np.stack([low, high], axis=1) / 2, 44_100, subtype="DOUBLE")
    recording = read_recording(path, 16_000)
    assert (recording.source, recording.sampling_rate, recording.seconds) == ("tones.wav", 16_000, 1.0)
    # 16 kHz cannot hold 12 kHz; the mean of two channels halves what one of them has.
    expected = np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000) / 4
    np.testing.assert_allclose(recording.samples, expected, atol=1e-12)


def test_a_higher_rate_adds_no_frequencies():
    time = np.arange(800) / 8_000
    louder = resample(np.cos(2 * np.pi * 1_000 * time), 8_000, 24_000)
    np.testing.assert_allclose(louder, np.cos(2 * np.pi * 1_000 * np.arange(2400) / 24_000), atol=1e-12)


def test_files_that_hold_no_sound_are_named(tmp_path):
    pytest.importorskip("soundfile", reason="soundfile, which reads audio files, is not installed")
    with pytest.raises(FileNotFoundError, match="audio file not found"):
        read_recording(tmp_path / "none.wav", 16_000)
    text = tmp_path / "text.wav"
    text.write_text("no sound at all")
    with pytest.raises(ValueError, match=r"cannot be read .*; convert it to WAV or FLAC"):
        read_recording(text, 16_000)


def test_a_cut_off_file_is_refused_and_one_of_unknown_size_is_read(tmp_path):
    soundfile = pytest.importorskip("soundfile", reason="soundfile, which reads audio files, is not installed")
    path = tmp_path / "half.wav"
    soundfile.write(path, np.sin(np.arange(1000) / 10), 16_000)
    content = bytearray(path.read_bytes())
    path.write_bytes(content[:1044])
    with pytest.raises(ValueError, match=r"half\.wav is cut off: its header promises 2,000 bytes of sound, and 1,0"):
        read_recording(path, 16_000)
    content[40:44] = b"\xff\xff\xff\xff"  # as ffmpeg writes into a pipe
    path.write_bytes(content)
    assert len(read_recording(path, 16_000).samples) == 1000


@pytest.mark.parametrize(
    ("heard", "expected", "errors"),
    [
        ("a b c", "a b c", 0),
        ("", "a b c", 3),
        ("a b c", "", 3),
        ("a x c", "a b c", 1),
        ("a c", "a b c", 1),
        ("x a b c", "a b c", 1),
        ("b c a", "a b c", 2),
        ("the cat sat on a mat", "a cat on the mat sat", 4),
        ("a a a a a", "a", 4),
    ],
)
def test_word_errors_are_the_fewest_words_to_change(heard, expected, errors):
    assert word_errors(heard.split(), expected.split()) == errors
    assert word_errors(expected.split(), heard.split()) == errors


def test_case_and_punctuation_make_no_other_word():
    assert words("And so, my fellow Americans -- don't ask!") == [
        "and",
        "so",
        "my",
        "fellow",
        "americans",
        "don't",
        "ask",
    ]
    assert words("Straße, 2 Äpfel") == ["straße", "2", "äpfel"]
