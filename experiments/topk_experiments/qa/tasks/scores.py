"""How answers are scored: SQuAD's exact match and F1, and the standard error of a mean."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Mean(NamedTuple):
    """A mean with its standard error, the sample's deviation over the square root of its size."""

    value: float
    error: float


def normalised(answer: str) -> str:
    """An answer as SQuAD compares it: lower case, without ASCII punctuation, articles and extra spaces, in that order.

    >>> normalised("The  Cat's (black) hat, a hat.")
    'cats black hat hat'
    """
    without_punctuation = answer.lower().translate(_NO_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", without_punctuation).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction is one of the answers after normalisation, otherwise 0.

    >>> exact_match("the Beatles!", ["Queen", "Beatles"])
    1.0
    """
    return _best(lambda answer: float(normalised(prediction) == normalised(answer)), answers)


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of normalised words, repeated ones counted; the best over the answers.

    If the prediction or an answer is empty after normalisation: 1 if both are, otherwise 0.

    >>> f1("in the city of Paris", ["Paris", "city of light"])
    0.5714285714285715
    """
    return _best(lambda answer: _f1(normalised(prediction).split(), normalised(answer).split()), answers)


def mean_and_error(values: Sequence[float]) -> Mean:
    """The mean of the values and its standard error.

    >>> mean_and_error([0.0, 1.0, 1.0, 0.0])
    Mean(value=0.5, error=0.28867513459481287)
    """
    if not values:
        raise ValueError("values must hold at least one number, got none")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Mean(mean, math.nan)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return Mean(mean, math.sqrt(variance / len(values)))


def _f1(predicted: list[str], expected: list[str]) -> float:
    if not predicted or not expected:
        return float(predicted == expected)
    common = (Counter(predicted) & Counter(expected)).total()
    if common == 0:
        return 0.0
    precision, recall = common / len(predicted), common / len(expected)
    return 2 * precision * recall / (precision + recall)


def _best(score: Callable[[str], float], answers: Sequence[str]) -> float:
    if not answers:
        raise ValueError("answers must hold at least one answer, got none")
    return max(score(answer) for answer in answers)
