"""What a calibration runs: the user's wishes, defaults that fit the model, and the points to evaluate."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from topk_attention.backends import choose_backend
from topk_attention.calibrate import Calibration, LossIncrease, LostMass, MeanK, completion_by_name
from topk_attention.convert.settings import completion_to_json
from topk_attention.functional.checks import check_count

from ..models.pretrained import ModelSource, is_encoder, load_config, longest_input
from ..runs.progress import Say
from ..runs.records import Json

RECORDS = Path("results/calibration")
AFTER = "after the calibration windows"
Target = MeanK | LostMass | LossIncrease
_DEFAULT_TARGET = MeanK(64.0)
_DEFAULT_TOKENS = 2048
# By what a model is judged -> number of windows. One window of an encoder gives one vector.
_DEFAULT_WINDOWS = {"perplexity": 1, "embedding_error": 16}


@dataclass(frozen=True)
class CalibrationConfig:
    """What a calibration runs; paths and the model as the user wrote them.

    text              text to calibrate on
    start             character of the text at which the first window begins
    num_tokens        tokens of a window; None: 2,048, or the longest input of the model if that is shorter
    windows           number of windows; None: 1, or 16 for an encoder
    completion        "on" or "fit": with completed attention, its scale fitted or not, at every k that is tried
    uniform           k for every head to compare with; None: the mean k of the calibrated points
    mean_ks           mean k of calibrated points beside the target's; None: half and twice that
    evaluate_text     text to read with every k; None: the same text
    evaluate_start    character at which its first window begins; None, without a text: after the calibration windows
    evaluate_tokens   tokens of a window to read; None: as num_tokens
    evaluate_windows  number of windows to read; None: 1, or 16 for an encoder

    >>> CalibrationConfig(target=MeanK(64), num_tokens=1)
    Traceback (most recent call last):
    ValueError: tokens must be at least 2, got 1
    """

    model: str | None = None
    text: Path | None = None
    start: int = 0
    num_tokens: int | None = None
    windows: int | None = None
    target: Target = _DEFAULT_TARGET
    feed_forward_mean_k: float | None = None
    completion: str | None = None
    uniform: Sequence[int] | None = None
    mean_ks: Sequence[int] | None = None
    evaluate_text: Path | None = None
    evaluate_start: int | None = None
    evaluate_tokens: int | None = None
    evaluate_windows: int | None = None
    report: Path = RECORDS / "calibration.html"
    out: Path = RECORDS / "calibration.json"
    records: Path = RECORDS
    seed: int = 0
    threads: int | None = None
    backend: str = "auto"
    fresh: bool = False

    def __post_init__(self) -> None:
        for name, number, least in (
            ("tokens", self.num_tokens, 2),
            ("evaluate-tokens", self.evaluate_tokens, 2),
            ("windows", self.windows, 1),
            ("evaluate-windows", self.evaluate_windows, 1),
            ("start", self.start, 0),
            ("evaluate-start", self.evaluate_start, 0),
            ("threads", self.threads, 1),
        ):
            if number is not None and number < least:
                raise ValueError(f"{name} must be at least {least}, got {number}")
            if number is not None and number >= 2**31:
                raise ValueError(f"{name} must be below 2^31, got {number}")
        for name, ks in (("uniform", self.uniform), ("also-mean-k", self.mean_ks)):
            for k in ks or ():
                check_count(name, k)
        if self.feed_forward_mean_k is not None:
            if not self.feed_forward_mean_k >= 1:
                raise ValueError(f"feed-forward-mean-k must be at least 1, got {self.feed_forward_mean_k:g}")
            if self.feed_forward_mean_k == math.inf:
                raise ValueError("feed-forward-mean-k must be finite, got inf")
        if self.report == self.out:
            raise ValueError(f"report and out must be two files, got {self.out} for both")
        choose_backend(self.backend)
        completion_by_name(self.completion)

    @property
    def record(self) -> Path:
        return self.records / f"{self.out.stem}.record.json"


@dataclass(frozen=True)
class Point:
    """One way to run the model: `convert(model, attention_k=..., feed_forward_k=...)`; None leaves a kind alone.

    completion  by layer path: the fields of its `Completion`; None for top-k attention alone
    """

    kind: str  # "full", "uniform" or "calibrated"
    attention_k: int | dict[str, list[int]] | None = None
    feed_forward_k: int | dict[str, int] | None = None
    completion: dict[str, Json] | None = None

    @property
    def key(self) -> str:
        """Equal for equal k: a run with this key need not be made again."""
        parts = [self.attention_k, self.feed_forward_k, *([] if self.completion is None else [self.completion])]
        ks = json.dumps(parts, sort_keys=True)
        return hashlib.sha256(ks.encode()).hexdigest()[:16]

    def describe(self) -> Json:
        """For the record."""
        described = {
            "key": self.key,
            "kind": self.kind,
            "mean_k": mean_of(self.attention_k),
            "feed_forward_mean_k": mean_of(self.feed_forward_k),
        }
        return described if self.completion is None else described | {"completed": True}


def points_of(calibration: Calibration, config: CalibrationConfig, say: Say) -> list[Point]:
    """What to evaluate: full attention, the calibration itself, other budgets, and one k for every head."""
    mean_k = calibration.mean_k
    largest_k = max(curves.ks[-1] for curves in calibration.curves.values())
    wanted = config.mean_ks if config.mean_ks is not None else [round(mean_k / 2), round(2 * mean_k)]
    others = [k for k in wanted if 1 <= k <= largest_k]
    if left_out := [k for k in wanted if k > largest_k]:
        listed = ", ".join(f"{k:,}" for k in left_out)
        say(f"Left out: mean k = {listed}, above {largest_k:,}, the largest k that was measured.")
    uniform = config.uniform if config.uniform is not None else sorted({*others, max(1, round(mean_k))})
    points = [Point("full"), _calibrated(calibration)]
    points += [_calibrated(calibration.reallocated(MeanK(k))) for k in others]
    points += [Point("uniform", k, completion=_completion(calibration.with_one_k(k))) for k in uniform]
    if calibration.feed_forward:
        neurons = dict(calibration.feed_forward)
        mean_neurons = round(sum(neurons.values()) / len(neurons))
        points.append(Point("calibrated", None, neurons))
        points.append(Point("uniform", None, dict.fromkeys(neurons, mean_neurons)))
        points.append(replace(_calibrated(calibration), feed_forward_k=neurons))
    return list({point.key: point for point in reversed(points)}.values())[::-1]


def _calibrated(calibration: Calibration) -> Point:
    ks = {path: list(ks) for path, ks in calibration.items()}
    return Point("calibrated", ks, completion=_completion(calibration))


def _completion(calibration: Calibration) -> dict[str, Json] | None:
    """That of each layer, None where there is none."""
    return {path: completion_to_json(one) for path, one in calibration.completion.items()} or None


def with_defaults(config: CalibrationConfig, source: ModelSource) -> CalibrationConfig:
    """The configuration with numbers of tokens and windows filled in; defaults fit the model."""
    limit, windows = None, 1
    if source.gguf_file is None:  # packed weights are a language model; its longest input is known once unpacked
        model_config = load_config(source)
        limit, windows = longest_input(model_config), _DEFAULT_WINDOWS[measure_for(source)]
    tokens = min(_DEFAULT_TOKENS, limit or _DEFAULT_TOKENS)
    return replace(
        config,
        num_tokens=config.num_tokens or tokens,
        windows=config.windows or windows,
        evaluate_tokens=config.evaluate_tokens or config.num_tokens or tokens,
        evaluate_windows=config.evaluate_windows or windows,
    )


def check_budget(config: CalibrationConfig) -> None:
    """Raise where the mean k is above the tokens of a window, before anything is measured."""
    tokens = config.num_tokens or 0
    if isinstance(config.target, MeanK) and config.target.mean_k > tokens:
        raise ValueError(
            f"mean-k must be at most {tokens}, the tokens of a window, where it is full attention, got "
            f"{config.target.mean_k:g}; give a smaller one, or more --tokens"
        )


def measure_for(source: ModelSource) -> str:
    """By what a model is judged: "perplexity", or "embedding_error" for an encoder."""
    return "embedding_error" if source.gguf_file is None and is_encoder(load_config(source)) else "perplexity"


def evaluation_start(config: CalibrationConfig) -> int | str:
    """The character at which evaluation begins, or AFTER."""
    if config.evaluate_text is None and config.evaluate_start is None:
        return AFTER
    return config.evaluate_start or 0


def mean_of(ks: int | dict[str, Any] | None) -> float | None:
    """The mean k of all heads or layers; None for all keys or neurons."""
    if ks is None or isinstance(ks, int):
        return ks
    flat = [k for entry in ks.values() for k in (entry if isinstance(entry, list) else [entry])]
    return sum(flat) / len(flat)
