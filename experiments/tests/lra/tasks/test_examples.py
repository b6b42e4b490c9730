import numpy as np
import torch

from topk_experiments.lra.tasks import Examples, ExamplesWriter


def pairs():
    writer = ExamplesWriter()
    shared = writer.add_sequence(bytes([0, 255, 7]))
    writer.add_example([shared, writer.add_sequence(bytes([9]))], label=1)
    writer.add_example([shared, writer.add_sequence(bytes([1, 2]))], label=0)
    return writer.examples()


def same(a, b):
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_batch_holds_each_value_plus_one_and_zeros_behind_it():
    batch = pairs().batch([1, 0])
    assert batch.tokens.tolist() == [[[1, 256, 8], [2, 3, 0]], [[1, 256, 8], [10, 0, 0]]]
    assert batch.mask.tolist() == [[[True] * 3, [True, True, False]], [[True] * 3, [True, False, False]]]
    assert batch.labels.tolist() == [0, 1]


def test_the_length_of_an_example_is_that_of_its_longest_sequence():
    assert Examples.concatenated([pairs(), pairs()]).take([1, 2]).lengths().tolist() == [3, 3]
    writer = ExamplesWriter()
    for count in (5, 2):
        writer.add([bytes(count)], label=0)
    assert writer.examples().take([1, 0]).lengths().tolist() == [2, 5]


def test_without_padding_there_is_no_mask():
    writer = ExamplesWriter()
    for label in (0, 1):
        writer.add([np.full((2, 2), 5 + label, dtype=np.uint8)], label)
    batch = writer.examples().batch([0, 1])
    assert batch.mask is None
    assert batch.tokens.tolist() == [[[6] * 4], [[7] * 4]]
    assert batch.tokens.dtype == torch.int64


def test_what_is_written_is_read_again():
    examples = pairs()
    assert same(Examples.from_bytes(examples.to_bytes()), examples)


def test_sets_are_joined_in_order_with_their_own_sequences():
    joined = Examples.concatenated([pairs(), pairs()])
    assert joined.num_examples == 4
    first, again = joined.batch([0, 1]), joined.batch([2, 3])
    assert torch.equal(first.tokens, again.tokens)
    assert joined.sequences.tolist() == [[0, 1], [0, 2], [3, 4], [3, 5]]


def test_the_hash_sees_every_field():
    examples = pairs()
    changed = [
        examples._replace(labels=examples.labels[::-1].copy()),
        examples._replace(values=examples.values + np.uint8(1)),
        examples.take([1, 0]),
    ]
    assert len({part.sha256() for part in [examples, *changed]}) == 4
    assert examples.sha256() == pairs().sha256()


def test_the_majority_is_the_most_frequent_label():
    writer = ExamplesWriter()
    for label in (2, 0, 2, 1):
        writer.add([b"x"], label)
    assert writer.examples().majority_share(num_classes=4) == 0.5
