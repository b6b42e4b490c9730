"""Converts Hugging Face models to top-k attention and feed-forward layers; their weights are not copied.

To import this package does not import transformers.
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
