"""Speech: recordings, transcripts by a speech model, and the number of words in which two transcripts differ."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

# What libsndfile says of a WAV file whose sound ends early.
_CUT_OFF = re.compile(r"^data : (\d+) \(should be (\d+)\)", re.MULTILINE)
# A program that writes WAV into a pipe cannot know the size, and writes about this much.
_UNKNOWN_SIZE = 0x7FFF_0000
# progress(windows done, windows in all)
Progress = Callable[[int, int], None]


class Recording(NamedTuple):
    """Mono sound and the name of its file, without folder names."""

    samples: np.ndarray  # [N] float64
    sampling_rate: int
    source: str
    sha256: str  # of the file

    @property
    def seconds(self) -> float:
        return len(self.samples) / self.sampling_rate


def read_recording(path: Path, sampling_rate: int) -> Recording:
    """The sound of a file that libsndfile reads (WAV, FLAC, Ogg, MP3), with channels mixed, at a sampling rate.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds no sound that can be read, or only a part of it.
    """
    import soundfile

    if not path.is_file():
        raise FileNotFoundError(f"audio file not found: {path}")
    try:
        with soundfile.SoundFile(path) as file:
            samples, rate, header = file.read(always_2d=True), file.samplerate, file.extra_info
    except Exception as error:  # soundfile's, and TypeError or MemoryError where a header is damaged
        raise ValueError(f"audio file {path} cannot be read ({error}); convert it to WAV or FLAC") from error
    if not len(samples):
        raise ValueError(f"audio file {path} is empty")
    if sizes := _CUT_OFF.search(header):
        promised, there = map(int, sizes.groups())
        if there < promised < _UNKNOWN_SIZE:
            raise ValueError(
                f"audio file {path} is cut off: its header promises {promised:,} bytes of sound, and {there:,} are "
                "there; get it again, or convert it to FLAC to use that part"
            )
    if not np.isfinite(samples).all():
        raise ValueError(f"audio file {path} holds samples that are no numbers; convert it to WAV or FLAC again")
    mono = resample(samples.mean(1), rate, sampling_rate)
    return Recording(mono, sampling_rate, path.name, hashlib.sha256(path.read_bytes()).hexdigest())


def resample(samples: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    """Sound [N] at another rate, [N * new_rate // rate], by its Fourier series, cut to what both rates hold.

    >>> resample(np.sin(np.arange(8) * np.pi / 4), 8, 16)[::2].round(6).tolist()
    [0.0, 0.707107, 1.0, 0.707107, 0.0, -0.707107, -1.0, -0.707107]
    """
    length = max(1, len(samples) * new_rate // rate)
    spectrum = np.fft.rfft(samples)[: length // 2 + 1]
    return np.fft.irfft(spectrum, length) * length / len(samples)


@torch.no_grad()
def transcribe(
    model: Any,
    tokenizer: Any,
    feature_extractor: Any,
    recording: Recording,
    *,
    language: str | None = None,
    progress: Progress = lambda done, total: None,
) -> str:
    """The transcript of a Whisper model, greedily decoded. Long recordings are cut into windows of its input length.

    language  for example "en"; None: a multilingual model detects it for each window
    """
    size = feature_extractor.n_samples
    starts = range(0, len(recording.samples), size)
    options = {"task": "transcribe", "language": language} if _is_multilingual(model) else {}
    parts = []
    for number, start in enumerate(starts, 1):
        features = feature_extractor(
            recording.samples[start : start + size], sampling_rate=recording.sampling_rate, return_tensors="pt"
        ).input_features
        tokens = model.generate(features.to(model.device, model.dtype), do_sample=False, num_beams=1, **options)
        parts.append(tokenizer.decode(tokens[0], skip_special_tokens=True).strip())
        progress(number, len(starts))
    return " ".join(part for part in parts if part)


@torch.no_grad()
def encoded(model: Any, feature_extractor: Any, recording: Recording) -> Tensor:
    """What a Whisper model's encoder makes of the first window, [frames, size], without the frames after the sound."""
    samples = recording.samples[: feature_extractor.n_samples]
    features = feature_extractor(samples, sampling_rate=recording.sampling_rate, return_tensors="pt").input_features
    output: Tensor = model.get_encoder()(features.to(model.device, model.dtype)).last_hidden_state[0]
    return output[: math.ceil(len(output) * len(samples) / feature_extractor.n_samples)]


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation.

    >>> words("Ask not: what YOUR country can't do.")
    ['ask', 'not', 'what', 'your', 'country', "can't", 'do']
    """
    return re.findall(r"\w+(?:'\w+)*", text.lower())


def word_errors(heard: Sequence[str], expected: Sequence[str]) -> int:
    """The number of words to replace, insert or delete to turn one list of words into the other.

    >>> word_errors(["ask", "what", "you"], ["ask", "not", "what", "you", "can"])
    2
    """
    distances = np.arange(len(expected) + 1)
    for number, word in enumerate(heard, 1):
        changed = distances[:-1] + [word != other for other in expected]
        left_out = distances[1:] + 1
        new = np.concatenate([[number], np.minimum(changed, left_out)])
        # Each inserted word costs 1: the minimum over all entries to the left plus their distance.
        places = np.arange(len(new))
        distances = np.minimum.accumulate(new - places) + places
    return int(distances[-1])


def _is_multilingual(model: Any) -> bool:
    return getattr(model.generation_config, "lang_to_id", None) is not None
