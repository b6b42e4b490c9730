"""The k that a model runs with, in the notation of the command line and of records."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from topk_attention import Completion
from topk_attention.calibrate import Calibration
from topk_attention.convert import convert, unconvert
from topk_attention.convert.settings import CONFIG_ATTRIBUTE, completion_to_json
from topk_attention.functional.checks import check_count

from ..runs.records import Json

_KINDS = ("attention_k", "feed_forward_k")


@dataclass(frozen=True)
class Setting:
    """One way to run a model: keys per query and neurons per token. None: all of them. A path: a calibration's file.

    completed  whether the keys that are not kept enter each softmax as one entry. A calibration that was measured with
               completion is run with its own in any case

    >>> print(Setting(attention_k=64)), print(Setting()), print(Setting(attention_k=64, completed=True))
    attention k = 64
    full
    attention k = 64, completed
    (None, None, None)
    """

    attention_k: int | Path | None = None
    feed_forward_k: int | Path | None = None
    completed: bool = False

    def __post_init__(self) -> None:
        for name in _KINDS:
            k = getattr(self, name)
            if isinstance(k, int):
                check_count(name.replace("_", "-"), k)
        if self.completed and self.attention_k is None:
            raise ValueError("completed needs an attention-k: with every key kept there is nothing to complete")

    @property
    def is_full(self) -> bool:
        return self.attention_k is None and self.feed_forward_k is None

    def __str__(self) -> str:
        return setting_name(self.describe())

    def for_convert(self) -> Json:
        """The arguments of `convert`, as JSON."""
        ks = {name: getattr(self, name) for name in _KINDS}
        arguments = {name: k if isinstance(k, int | None) else _from_file(k, name) for name, k in ks.items()}
        completion = self._completion()
        return arguments if completion is None else arguments | {"completion": completion}

    def describe(self) -> Json:
        """For records: numbers as they are; for a file its name, its hash and the mean k.

        "completed" is there only where it is true: records from before there was completion stay the same.
        """
        ks = {name: getattr(self, name) for name in _KINDS}
        described = {name: k if isinstance(k, int | None) else _describe_file(k, name) for name, k in ks.items()}
        return described if self._completion() is None else described | {"completed": True}

    def _completion(self) -> Json | None:
        """As JSON, with the fields of one `Completion` for all layers or of one for each path; None without any."""
        own = Calibration.load(self.attention_k).completion if isinstance(self.attention_k, Path) else {}
        if own:
            return {path: completion_to_json(completion) for path, completion in own.items()}
        return completion_to_json(Completion()) if self.completed else None


def one_at_a_time(
    attention_k: Sequence[int | Path] = (),
    feed_forward_k: Sequence[int | Path] = (),
    full: bool = True,
    completed_k: Sequence[int | Path] = (),
) -> list[Setting]:
    """Settings that limit one kind at a time: the full model, then every k alone.

    completed_k  attention k with completion

    >>> [str(setting) for setting in one_at_a_time([64], [384], completed_k=[16])]
    ['full', 'attention k = 64', 'attention k = 16, completed', 'feed-forward k = 384']
    """
    settings = [Setting()] if full else []
    settings += [Setting(attention_k=k) for k in attention_k]
    settings += [Setting(attention_k=k, completed=True) for k in completed_k]
    settings += [Setting(feed_forward_k=k) for k in feed_forward_k]
    return list(dict.fromkeys(settings))


def fixed_attention_k(settings: Sequence[Setting]) -> list[int]:
    """The attention k of settings that are one number for every head."""
    return [setting.attention_k for setting in settings if isinstance(setting.attention_k, int)]


def convert_model(model: Any, arguments: Json, backend: str) -> None:
    """Convert a model with the arguments of `Setting.for_convert`.

    None means all keys or neurons, even if the model was saved with a k: records name what really ran.
    """
    if hasattr(model.config, CONFIG_ATTRIBUTE):
        unconvert(model)
    if all(argument is None for argument in arguments.values()):
        return
    convert(model, **arguments | {"completion": completion_from_json(arguments.get("completion"))}, backend=backend)


def completion_from_json(stored: Json | None) -> Completion | dict[str, Completion] | None:
    """What `convert` takes as completion, of the fields of one for all layers or of one for each path; None: none.

    >>> completion_from_json({"mass_scale": 1.0, "lift": 0.2})
    Completion(mass_scale=1.0, lift=0.2)
    """
    if stored is None:
        return None
    return Completion(**stored) if "lift" in stored else {path: Completion(**one) for path, one in stored.items()}


def setting_name(described: Json) -> str:
    """The name of a setting in tables and messages.

    >>> setting_name({"attention_k": {"file": "novel.json", "sha256": "", "mean_k": 63.96}, "feed_forward_k": 384})
    'attention calibrated by novel, mean k = 64, feed-forward k = 384'
    >>> setting_name({"attention_k": 16, "feed_forward_k": None, "completed": True})
    'attention k = 16, completed'
    """
    parts = []
    for name, kind in (("attention_k", "attention"), ("feed_forward_k", "feed-forward")):
        k = described[name]
        if isinstance(k, dict):
            parts.append(f"{kind} calibrated by {Path(k['file']).stem}, mean k = {round(k['mean_k'], 1):g}")
        elif k is not None:
            parts.append(f"{kind} k = {k}")
        if name == "attention_k" and described.get("completed"):
            parts.append("completed")
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
