"""Transformers that use only the k best keys per query and the k best feed-forward neurons per token."""

from typing import Any

from ._version import __version__
from .calibrate import Calibration, LossIncrease, LostMass, MeanK, StandIns, calibrate, fit_completion, fit_stand_ins
from .convert import ConversionReport, convert, is_cross_attention, is_self_attention, unconvert
from .convert.cache import topk_cache
from .convert.registration import register_when_transformers_is_imported
from .functional import (
    ALiBi,
    BucketedBias,
    Completion,
    KeyIndex,
    KeySums,
    RelativeBias,
    Selection,
    StandIn,
    topk_attention,
    topk_feed_forward,
)
from .nn import TopKAttention, TopKFeedForward

register_when_transformers_is_imported()

__all__ = [
    "ALiBi",
    "BucketedBias",
    "Calibration",
    "Completion",
    "ConversionReport",
    "KeyIndex",
    "KeySums",
    "LossIncrease",
    "LostMass",
    "MeanK",
    "RelativeBias",
    "Selection",
    "StandIn",
    "StandIns",
    "TopKAttention",
    "TopKFeedForward",
    "__version__",
    "calibrate",
    "convert",
    "fit_completion",
    "fit_stand_ins",
    "is_cross_attention",
    "is_self_attention",
    "topk_attention",
    "topk_feed_forward",
    "unconvert",
]


def __getattr__(name: str) -> Any:
    # Not in __all__: `import *` would import transformers, which takes seconds and need not be installed.
    if name == "TopKCache":
        return topk_cache()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
