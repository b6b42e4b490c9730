"""ListOps with long expressions (Nangia and Bowman 2018, as lengthened by the Long Range Arena).

An expression is a digit, or an operator over two to ten expressions. Its value is a digit: minimum, maximum, median
(rounded down) or sum modulo 10. The model reads the operators, digits and closing brackets; the label is the value.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np

from .examples import Examples, ExamplesWriter
from .preparation import Progress, Splits, make_in_shards, shares_right_by

OPERATORS = ("MIN", "MAX", "MED", "SM")
# Values 0 to 9 are the digits.
_FIRST_OPERATOR = 10
_CLOSE = _FIRST_OPERATOR + len(OPERATORS)
_OPERATOR_PROBABILITY = 0.25


@dataclass(frozen=True)
class ListOps:
    """Random expressions; those that are too short or too long are dropped.

    The defaults are the published ones: lengths strictly between 500 and 2,000, at most ten levels and ten arguments.

    max_depth   levels of brackets, the outermost included
    max_args    most arguments of an operator, at least 2
    min_length  least number of operators, digits and closing brackets
    max_length  largest number of operators, digits and closing brackets
    """

    num_train: int = 96_000
    num_validation: int = 2_000
    num_test: int = 2_000
    max_depth: int = 10
    max_args: int = 10
    min_length: int = 501
    max_length: int = 1_999
    seed: int = 0

    name = "listops"
    num_classes = 10
    vocabulary = _CLOSE + 1
    parts = 1

    def __post_init__(self) -> None:
        if self.max_args < 2:
            raise ValueError(f"max_args must be at least 2, got {self.max_args}")
        if not 4 <= self.min_length <= self.max_length:
            raise ValueError(
                "min_length must be at least 4 (an operator, two digits, a bracket) and at most max_length, got "
                f"{self.min_length} and {self.max_length}"
            )
        longest = longest_expression(self.max_depth, self.max_args)
        if longest < self.min_length:
            raise ValueError(
                f"min_length {self.min_length} is out of reach: expressions of max_depth {self.max_depth} and max_args "
                f"{self.max_args} have at most {longest} symbols"
            )

    def make(self, progress: Progress) -> Splits:
        """All three splits; shards of earlier, interrupted calls are used."""
        counts = {"train": self.num_train, "validation": self.num_validation, "test": self.num_test}
        return make_in_shards(self._add_shard, counts, self.seed, progress)

    def baselines(self, splits: Splits) -> dict[str, dict[str, float]]:
        """Accuracies of guesses without a model.

        "by first operator": the value that is most frequent in training after the first symbol, without reading the
        arguments.
        """
        return {"by first operator": shares_right_by(_first_symbols, self.vocabulary, self.num_classes, splits)}

    def _add_shard(self, random: Random, count: int, writer: ExamplesWriter) -> None:
        expressions = self.draw(random)
        for _ in range(count):
            values = next(expressions)
            writer.add([bytes(values)], evaluate(values))

    def draw(self, random: Random) -> Iterator[list[int]]:
        """Expressions, one after another without end."""
        while True:
            values: list[int] = []
            if self._extend(values, random, depth=1) and len(values) >= self.min_length:
                yield values

    def _extend(self, values: list[int], random: Random, depth: int) -> bool:
        """Append one expression; False as soon as the whole expression is too long."""
        if depth >= self.max_depth or random.random() > _OPERATOR_PROBABILITY:
            values.append(int(10 * random.random()))
            return len(values) <= self.max_length
        num_args = 2 + int((self.max_args - 1) * random.random())
        position = len(values)
        values.append(0)
        for _ in range(num_args):
            if not self._extend(values, random, depth + 1):
                return False
        values[position] = _FIRST_OPERATOR + int(len(OPERATORS) * random.random())
        values.append(_CLOSE)
        return len(values) <= self.max_length


def _first_symbols(examples: Examples) -> np.ndarray:
    return examples.values[examples.starts[examples.sequences[:, 0]]]


def longest_expression(max_depth: int, max_args: int) -> int:
    """The largest number of symbols of an expression.

    >>> longest_expression(1, 10), longest_expression(2, 10), longest_expression(3, 2)
    (1, 12, 10)
    """
    length = 1
    for _ in range(max_depth - 1):
        length = 2 + max_args * length
    return length


def evaluate(values: Sequence[int]) -> int:
    """The value of an expression, a digit.

    >>> evaluate(parse("[MAX 2 [MED 4 9 1 5 ] [SM 9 9 ] 0 ]"))
    8
    """
    pending: list[tuple[int, list[int]]] = [(-1, [])]
    for value in values:
        if value < _FIRST_OPERATOR:
            pending[-1][1].append(value)
        elif value < _CLOSE:
            pending.append((value, []))
        else:
            operator, arguments = pending.pop()
            pending[-1][1].append(_apply(OPERATORS[operator - _FIRST_OPERATOR], arguments))
    ((_, (result,)),) = pending
    return result


def _apply(operator: str, arguments: list[int]) -> int:
    match operator:
        case "MIN":
            return min(arguments)
        case "MAX":
            return max(arguments)
        case "MED":
            ordered = sorted(arguments)
            return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) // 2
        case _:
            return sum(arguments) % 10


def parse(text: str) -> list[int]:
    """The values of an expression from the text that `write` returns.

    >>> parse("[MIN 3 4 ]")
    [10, 3, 4, 14]
    """
    names = {"]": _CLOSE} | {f"[{name}": _FIRST_OPERATOR + number for number, name in enumerate(OPERATORS)}
    return [names[word] if word in names else int(word) for word in text.split()]


def write(values: Sequence[int]) -> str:
    """The text of an expression, for people to read.

    >>> write([10, 3, 4, 14])
    '[MIN 3 4 ]'
    """
    names = [*map(str, range(10)), *(f"[{name}" for name in OPERATORS), "]"]
    return " ".join(names[value] for value in values)
