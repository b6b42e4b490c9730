"""Hugging Face models with top-k attention and feed-forward layers, their weights where they were.

Nothing here imports transformers until a model is there.
"""

from .conversion import convert, unconvert
from .report import ConversionReport, ReportEntry
from .selectors import is_cross_attention, is_self_attention

__all__ = [
    "ConversionReport",
    "ReportEntry",
    "convert",
    "is_cross_attention",
    "is_self_attention",
    "unconvert",
]
