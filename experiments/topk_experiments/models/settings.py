"""The k that a model runs with, in the notation of the command line and of records."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from topk_attention.calibrate import Calibration
from topk_attention.convert import convert, unconvert
from topk_attention.convert.settings import CONFIG_ATTRIBUTE
from topk_attention.functional.checks import check_count

from ..runs.records import Json


@dataclass(frozen=True)
class Setting:
    """One way to run a model: keys per query and neurons per token. None: all of them. A path: a calibration's file.

    >>> print(Setting(attention_k=64)), print(Setting())
    attention k = 64
    full
    (None, None)
    """

    attention_k: int | Path | None = None
    feed_forward_k: int | Path | None = None

    def __post_init__(self) -> None:
        for name in ("attention_k", "feed_forward_k"):
            k = getattr(self, name)
            if isinstance(k, int):
                check_count(name.replace("_", "-"), k)

    @property
    def is_full(self) -> bool:
        return self.attention_k is None and self.feed_forward_k is None

    def __str__(self) -> str:
        return setting_name(self.describe())

    def for_convert(self) -> Json:
        """The arguments of `convert`, as JSON."""
        return {name: k if isinstance(k, int | None) else _from_file(k, name) for name, k in vars(self).items()}

    def describe(self) -> Json:
        """For records: numbers as they are; for a file its name, its hash and the mean k."""
        return {name: k if isinstance(k, int | None) else _describe_file(k, name) for name, k in vars(self).items()}


def one_at_a_time(
    attention_k: Sequence[int | Path] = (), feed_forward_k: Sequence[int | Path] = (), full: bool = True
) -> list[Setting]:
    """Settings that limit one kind at a time: the full model, then every k alone.

    >>> [str(setting) for setting in one_at_a_time([64], [384])]
    ['full', 'attention k = 64', 'feed-forward k = 384']
    """
    settings = [Setting()] if full else []
    settings += [Setting(attention_k=k) for k in attention_k]
    settings += [Setting(feed_forward_k=k) for k in feed_forward_k]
    return list(dict.fromkeys(settings))


def fixed_attention_k(settings: Sequence[Setting]) -> list[int]:
    """The attention k of settings that are one number for every head."""
    return [setting.attention_k for setting in settings if isinstance(setting.attention_k, int)]


def convert_model(model: Any, ks: Json, backend: str) -> None:
    """Convert a model with the arguments of `Setting.for_convert`.

    None means all keys or neurons, even if the model was saved with a k: records name what really ran.
    """
    if hasattr(model.config, CONFIG_ATTRIBUTE):
        unconvert(model)
    if any(k is not None for k in ks.values()):
        convert(model, **ks, backend=backend)


def setting_name(described: Json) -> str:
    """The name of a setting in tables and messages.

    >>> setting_name({"attention_k": {"file": "novel.json", "sha256": "", "mean_k": 63.96}, "feed_forward_k": 384})
    'attention calibrated by novel, mean k = 64, feed-forward k = 384'
    """
    parts = []
    for name, kind in (("attention_k", "attention"), ("feed_forward_k", "feed-forward")):
        k = described[name]
        if isinstance(k, dict):
            parts.append(f"{kind} calibrated by {Path(k['file']).stem}, mean k = {round(k['mean_k'], 1):g}")
        elif k is not None:
            parts.append(f"{kind} k = {k}")
    return ", ".join(parts) or "full"


def mean_k(k: Any) -> float | None:
    """The mean of a k in the form of `Setting.describe`; None for all."""
    return k["mean_k"] if isinstance(k, dict) else k


def _from_file(path: Path, name: str) -> Json:
    calibration = Calibration.load(path)
    per_layer: Json = (
        dict(calibration.feed_forward)
        if name == "feed_forward_k"
        else {layer: list(k) for layer, k in calibration.attention.items()}
    )
    if not per_layer:
        raise ValueError(f"{path} holds no {name.replace('_', '-')}; calibrate with --feed-forward-mean-k")
    return per_layer


def _describe_file(path: Path, name: str) -> Json:
    per_layer = _from_file(path, name)
    ks = [k for entry in per_layer.values() for k in (entry if isinstance(entry, list) else [entry])]
    content = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"file": path.name, "sha256": content, "mean_k": sum(ks) / len(ks)}
