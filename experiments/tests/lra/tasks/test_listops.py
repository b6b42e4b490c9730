import statistics
from collections import Counter
from dataclasses import replace
from random import Random

import pytest

from topk_experiments.lra.tasks import ListOps
from topk_experiments.lra.tasks.listops import evaluate, longest_expression, write

SHORT = ListOps(min_length=8, max_length=60)


def value_by_python(text):
    """An evaluator of its own: the expression becomes one of Python's and is computed by it."""
    functions = {
        "MIN": lambda *digits: min(digits),
        "MAX": lambda *digits: max(digits),
        "MED": lambda *digits: int(statistics.median(digits)),
        "SM": lambda *digits: int(str(sum(digits))[-1]),
    }
    words = [f"{word[1:]}(" if word.startswith("[") else ")," if word == "]" else f"{word}," for word in text.split()]
    (value,) = eval(f"({' '.join(words)})", {"__builtins__": {}}, functions)
    return value


def depth(text):
    level, deepest = 1, 1
    for word in text.split():
        level += word.startswith("[") - (word == "]")
        deepest = max(deepest, level)
    return deepest


def numbers_of_arguments(text):
    counts, pending = [], []
    for word in text.split():
        if word == "]":
            counts.append(pending.pop())
        elif pending:
            pending[-1] += 1
        if word.startswith("["):
            pending.append(0)
    return counts


@pytest.fixture(scope="module")
def drawn():
    """Expressions at the published settings."""
    expressions = ListOps().draw(Random(1))
    return [next(expressions) for _ in range(120)]


def test_every_label_is_the_value_of_its_expression(drawn):
    short = SHORT.draw(Random(2))
    for values in [*drawn[:20], *(next(short) for _ in range(300))]:
        assert evaluate(values) == value_by_python(write(values))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[MED 1 2 ]", 1),  # 1.5, rounded down
        ("[MED 9 0 5 ]", 5),
        ("[SM 9 9 9 ]", 7),
        ("[MIN [MAX 3 8 ] [SM 5 4 ] ]", 8),
    ],
)
def test_operators_mean_what_they_are_published_to_mean(text, value):
    from topk_experiments.lra.tasks.listops import parse

    assert evaluate(parse(text)) == value == value_by_python(text)


def test_lengths_depths_and_arguments_keep_the_published_bounds(drawn):
    assert all(500 < len(values) < 2000 for values in drawn)
    texts = [write(values) for values in drawn]
    assert max(map(depth, texts)) == 10
    arguments = Counter(number for text in texts for number in numbers_of_arguments(text))
    assert sorted(arguments) == list(range(2, 11))
    # Each number from 2 to 10 is equally likely; longer expressions are dropped less often, hence the wide margin.
    assert max(arguments.values()) < 2 * min(arguments.values())


def test_operators_and_digits_are_equally_frequent(drawn):
    counts = Counter(value for values in drawn for value in values)
    for group in (range(10), range(10, 14)):
        mean = sum(counts[value] for value in group) / len(group)
        for value in group:
            assert 0.95 * mean < counts[value] < 1.05 * mean
    assert counts[14] == sum(counts[value] for value in range(10, 14))


def test_a_quarter_of_all_subexpressions_above_the_deepest_level_are_operations():
    # Drawn without bounds on the length, where nothing is dropped that could shift the share.
    task = replace(SHORT, min_length=4, max_length=10**6)
    lists = Counter()
    random = Random(3)
    for _ in range(4000):
        values = []
        task._extend(values, random, depth=task.max_depth - 1)
        lists[len(values) > 1] += 1
    assert 0.23 < lists[True] / 4000 < 0.27


def test_a_seed_gives_the_same_expressions_again():
    first, again, other = (SHORT.draw(Random(seed)) for seed in (4, 4, 5))
    three = [next(first) for _ in range(3)]
    assert three == [next(again) for _ in range(3)]
    assert three != [next(other) for _ in range(3)]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_args": 1}, "max_args must be at least 2, got 1"),
        ({"min_length": 3}, "min_length must be at least 4 .* and at most max_length, got 3 and 1999"),
        ({"min_length": 9, "max_length": 8}, "at most max_length, got 9 and 8"),
        ({"max_depth": 2, "max_args": 3}, "min_length 501 is out of reach: .* have at most 5 symbols"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        ListOps(**settings)


def test_the_longest_expression_has_every_argument_at_every_level():
    assert longest_expression(3, 10) == 2 + 10 * 12
