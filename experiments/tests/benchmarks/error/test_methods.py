import pytest
import torch
import torch.nn.functional as F

from topk_experiments.benchmarks.error import measure
from topk_experiments.benchmarks.error.capture import Layer, dense_attention
from topk_experiments.benchmarks.error.measure import (
    METHODS,
    Attention,
    Point,
    largest_errors,
    relative_errors,
    sizes_of,
)

HEADS, LENGTH, HEAD_DIM = 3, 150, 8


@pytest.fixture
def layer():
    query, key, value = (torch.randn(1, HEADS, LENGTH, HEAD_DIM) for _ in range(3))
    return Layer(query, key, value, dense_attention(query, key, value).float())


def test_dense_attention_is_causal_softmax_attention(layer):
    expected = F.scaled_dot_product_attention(*(tensor.double() for tensor in layer[:3]), is_causal=True)
    torch.testing.assert_close(dense_attention(*layer[:3]), expected)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_causal_attention_of_the_same_shape(method, layer):
    attention = Attention(method, sizes_of(method, [16])[0], HEADS, HEAD_DIM, "cpu")
    output = attention(*attention.prepare(*layer[:3]))
    assert output.shape == layer.value.shape
    torch.testing.assert_close(output[:, :, 0], layer.value[:, :, 0])  # the first query sees one key


def test_exact_methods_have_no_error(layer):
    for method, size in (("sdpa", None), ("topk", LENGTH), ("topk-completed", LENGTH)):
        attention = Attention(method, size, HEADS, HEAD_DIM, "cpu")
        assert relative_errors(attention(*layer[:3]), layer.output).max() < 1e-5


def test_the_error_falls_with_the_size(layer):
    for method, sizes in (("topk", (4, 64)), ("topk-completed", (4, 64)), ("performer", (16, 4096))):
        errors = []
        for size in sizes:
            attention = Attention(method, size, HEADS, HEAD_DIM, "cpu")
            errors.append(relative_errors(attention(*layer[:3]), layer.output))
        assert (errors[1] < 0.6 * errors[0]).all()


def test_completed_attention_is_closer_to_dense_attention_than_the_same_keys_alone(layer):
    alone, completed = (
        relative_errors(Attention(method, 8, HEADS, HEAD_DIM, "cpu")(*layer[:3]), layer.output)
        for method in ("topk", "topk-completed")
    )
    assert (completed < 0.5 * alone).all()


def test_the_mean_of_visible_values_is_attention_with_equal_scores(layer):
    expected = F.scaled_dot_product_attention(0 * layer.query, layer.key, layer.value, is_causal=True)
    torch.testing.assert_close(Attention("uniform", None, HEADS, HEAD_DIM, "cpu")(*layer[:3]), expected)


@pytest.mark.parametrize("method", ["performer-tuned", "rfa"])
def test_each_head_gets_the_sharpness_with_which_its_own_error_is_lowest(method):
    """Heads of known sharpness: one that looks at all keys alike, and one with clearly unequal scores."""
    torch.manual_seed(3)
    query, key, value = (torch.randn(1, 2, LENGTH, HEAD_DIM) for _ in range(3))
    query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
    wanted = torch.tensor([METHODS[method].sharpness[0], 1.0])
    scale = 1 if method == "rfa" else HEAD_DIM**-0.5
    scores = wanted[:, None, None] * scale * query @ key.mT
    exact = scores.masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), -torch.inf).softmax(-1) @ value
    attention = Attention(method, 4096, 2, HEAD_DIM, "cpu")
    attention.tune(Layer(query, key, value, exact))
    assert attention.sharpness[0] < 0.2
    if method == "rfa":
        assert attention.sharpness[1] == 1.0
    tuned = relative_errors(attention(*attention.prepare(query, key, value)), exact)
    for candidate in METHODS[method].sharpness:
        attention.sharpness.fill_(candidate)
        assert (tuned <= relative_errors(attention(*attention.prepare(query, key, value)), exact)).all()


def test_errors_are_fractions_of_the_dense_output_head_by_head():
    exact = torch.ones(1, 2, 4, 4)
    output = exact.clone()
    output[0, 1, 0, 0] = 3
    torch.testing.assert_close(relative_errors(output, exact), torch.tensor([0.0, 0.5], dtype=torch.float64))
    torch.testing.assert_close(largest_errors(output, exact), torch.tensor([0.0, 2.0], dtype=torch.float64))


@pytest.mark.parametrize("method", ["topk", "topk-completed"])
def test_the_call_before_memory_is_measured_leaves_keys_out_too(method, monkeypatch, layer):
    """With a large k it took another path, so that loading the compiler counted as memory of a long call."""
    point = Point(method, 120, LENGTH, ["tiny", "1"], ["story", "2"], [0], None, "cpu", 1, 0)
    measured = []
    steps = measure._steps

    def steps_and_sizes(attention, inputs):
        measured.append((attention._attention.k, inputs[0].shape[2]))
        return steps(attention, inputs)

    monkeypatch.setattr(measure, "_steps", steps_and_sizes)
    measure._memory(point, Attention(method, 120, HEADS, HEAD_DIM, "cpu"), layer[:3])
    assert measured == [(32, 64), (120, LENGTH)]
