"""The windows of text that a calibration measures and those that it evaluates on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..models.pretrained import ModelSource, is_encoder, load_config, load_tokenizer, longest_input
from ..models.sentence_embedding import first_windows
from ..models.text import Text, first_tokens
from .calibration_settings import AFTER, CalibrationConfig, evaluation_start


@dataclass(frozen=True)
class Windows:
    """Token ids to calibrate on and to evaluate on, and whether these are parts of the same text that overlap."""

    calibration: list[list[int]]
    evaluation: list[list[int]]
    overlap: bool

    @staticmethod
    def read(config: CalibrationConfig, source: ModelSource, text: Text, evaluate_text: Text) -> Windows:
        """Cut both texts into windows.

        Raises:
            ValueError: a window is longer than the model's input, or a text is too short.
        """
        model_config = load_config(source)
        limit = longest_input(model_config)
        for name, number in (("tokens", config.num_tokens), ("evaluate-tokens", config.evaluate_tokens)):
            if limit is not None and number is not None and number > limit:
                raise ValueError(f"{name} must be at most {limit}, the longest input of {source.name}, got {number}")
        tokenizer = load_tokenizer(source)
        read = _encoder_windows if is_encoder(model_config) else _language_model_windows
        return read(config, tokenizer, text, evaluate_text)


def _language_model_windows(config: CalibrationConfig, tokenizer: Any, text: Text, evaluate_text: Text) -> Windows:
    num_tokens, num_windows = config.num_tokens or 0, config.windows or 0
    evaluate_tokens, evaluate_windows = config.evaluate_tokens or 0, config.evaluate_windows or 0
    num_measured, num_read = num_tokens * num_windows, evaluate_tokens * evaluate_windows
    after = evaluation_start(config) == AFTER
    ids = first_tokens(text_from(text, config.start), tokenizer, num_measured + (num_read if after else 0))[0].tolist()
    measured, rest = ids[:num_measured], ids[num_measured:]
    overlap = False
    if not after:
        begin = config.evaluate_start or 0
        rest = first_tokens(text_from(evaluate_text, begin), tokenizer, num_read)[0].tolist()
        ends = config.start + len(tokenizer.decode(measured)), begin + len(tokenizer.decode(rest))
        overlap = text.sha256 == evaluate_text.sha256 and begin < ends[0] and config.start < ends[1]
    return Windows(cut(measured, num_tokens), cut(rest, evaluate_tokens), overlap)


def _encoder_windows(config: CalibrationConfig, tokenizer: Any, text: Text, evaluate_text: Text) -> Windows:
    measured, num_characters = first_windows(
        text_from(text, config.start), tokenizer, config.windows or 0, config.num_tokens or 0
    )
    end = config.start + num_characters
    begin = end if evaluation_start(config) == AFTER else config.evaluate_start or 0
    rest, num_read = first_windows(
        text_from(evaluate_text, begin), tokenizer, config.evaluate_windows or 0, config.evaluate_tokens or 0
    )
    overlap = text.sha256 == evaluate_text.sha256 and begin < end and config.start < begin + num_read
    return Windows(measured, rest, overlap)


def cut(ids: list[int], num_tokens: int) -> list[list[int]]:
    """Windows of this many tokens, one after the other."""
    return [ids[first : first + num_tokens] for first in range(0, len(ids), num_tokens)]


def text_from(text: Text, start: int) -> Text:
    """The text from a character on.

    Raises:
        ValueError: it has none from there on.
    """
    if start >= len(text.content):
        raise ValueError(f"{text.source} has {len(text.content):,} characters, so none from {start:,} on")
    return Text(text.content[start:], text.source if start == 0 else f"{text.source} from character {start:,}")
