"""Published numbers of others, quoted beside our own and never mixed with them.

UnifiedQA and T5 with top-k in feed-forward layers: Gupta et al. 2021 (arXiv 2106.06899), tables of the authors'
repository. Exact match on development sets by a SQuAD 1.1 scorer. Means are ours, from the authors' rows.
"""

from __future__ import annotations

from typing import NamedTuple


class PublishedTable(NamedTuple):
    """
    columns  headings after the first
    rows     first column -> numbers; None if none was published
    """

    title: str
    first_column: str
    columns: tuple[str, ...]
    rows: dict[str, tuple[float | None, ...]]


_SIZES = ("all", "2048", "1024", "512", "256", "128", "64", "32", "16")

UNIFIEDQA_11B = PublishedTable(
    "UnifiedQA-11B, zero-shot, feed-forward k (of 65,536)",
    "set",
    ("all", "4096", "2048", "1024", "512", "256", "128", "64"),
    {
        "NarrativeQA": (32.3, 32.3, 32.3, 32.3, 32.3, 32.1, 31.6, 30.5),
        "RACE": (87.4, 87.4, 87.3, 87.3, 87.2, 86.8, 85.8, 83.5),
        "BoolQ": (90.7, 90.8, 90.8, 90.7, 90.4, 90.0, 89.7, 88.7),
        "SQuAD 2": (86.3, 86.3, 86.3, 86.3, 86.2, 85.7, 84.3, 82.0),
        "SQuAD 1.1": (87.0, 87.0, 87.0, 87.0, 86.9, 86.8, 86.8, 86.1),
        "MCTest": (93.1, 93.1, 93.1, 93.1, 93.1, 92.8, 93.1, 92.8),
        "AI2 middle": (82.4, 82.4, 82.4, 83.2, 84.0, 84.0, 81.6, 77.6),
        "AI2 elementary": (91.9, 91.9, 91.9, 91.9, 91.1, 91.1, 87.8, 82.9),
        "ARC hard": (75.6, 75.6, 75.9, 76.3, 75.9, 75.6, 72.2, 71.6),
        "ARC easy": (86.0, 86.0, 85.8, 86.3, 85.4, 85.3, 83.5, 79.3),
        "OpenBookQA": (85.2, 85.2, 85.0, 85.0, 83.6, 85.4, 80.0, 77.4),
        "CommonsenseQA": (77.5, 77.6, 77.2, 77.2, 77.0, 75.9, 74.8, 72.4),
        "mean EM": (81.28, 81.30, 81.25, 81.38, 81.09, 80.96, 79.27, 77.07),
        "mean F1": (85.88, 85.89, 85.88, 85.93, 85.60, 85.53, 84.13, 82.44),
    },
)
UNIFIEDQA_SMALLER = PublishedTable(
    "UnifiedQA, zero-shot, feed-forward k, mean EM of 10 sets",
    "model",
    _SIZES,
    {
        "3B, d_ff 16,384": (76.70, 76.70, 76.69, 76.54, 76.54, 75.97, 74.78, 71.77, 64.35),
        "base, d_ff 3,072": (62.40, None, 62.40, 62.36, 62.28, 62.48, 62.38, 60.93, 58.72),
    },
)
T5_BASE_FINETUNED = PublishedTable(
    "T5-base fine-tuned, EM, feed-forward k (of 3,072)",
    "set",
    ("all", "k = 256", "T5, untuned", "UnifiedQA-base, untuned"),
    {
        "CommonsenseQA": (61.9, 62.0, 35.7, 45.0),
        "OpenBookQA": (58.8, 58.0, 17.0, 59.6),
        "BoolQ": (83.3, 83.1, 0.5, 82.0),
        "ROPES": (54.0, 53.8, 21.7, 26.3),
        "MCTest": (81.2, 79.4, 36.6, 85.3),
    },
)
TABLES = (UNIFIEDQA_11B, UNIFIEDQA_SMALLER, T5_BASE_FINETUNED)


def curves() -> dict[str, dict[int, float]]:
    """name -> {feed-forward k: mean EM}

    >>> curves()["UnifiedQA base, 10 sets (quoted)"][64]
    62.38
    """
    rows = {
        "UnifiedQA 11B, 12 sets (quoted)": (UNIFIEDQA_11B.columns, UNIFIEDQA_11B.rows["mean EM"]),
        "UnifiedQA 3B, 10 sets (quoted)": (_SIZES, UNIFIEDQA_SMALLER.rows["3B, d_ff 16,384"]),
        "UnifiedQA base, 10 sets (quoted)": (_SIZES, UNIFIEDQA_SMALLER.rows["base, d_ff 3,072"]),
    }
    return {
        name: {int(k): value for k, value in zip(ks, values, strict=True) if k != "all" and value is not None}
        for name, (ks, values) in rows.items()
    }
