"""Performer and RFA against the kernels they estimate, and Performer against performer-pytorch."""

import importlib
import warnings

import pytest
import torch

from topk_experiments.rivals import PerformerAttention, RandomFeatureAttention, random_feature_weights
from topk_experiments.rivals.random_features import random_directions

HEAD_DIM = 8
LENGTH = 12


def softmax_kernel(query, key):
    return (query @ key.mT / HEAD_DIM**0.5).exp()


def gaussian_kernel(query, key, sigma):
    x, y = (sigma * rows / rows.norm(dim=-1, keepdim=True) for rows in (query, key))
    return (-(x[:, None] - y).square().sum(-1) / 2).exp()


@torch.no_grad()
def estimate(attention, query, key):
    """The module's estimates of all weights, [N, M], in float64."""
    features_of = attention.double().feature_map(torch.float64)
    (of_query, query_log), (of_key, key_log) = (features_of(rows[None, None].double()) for rows in (query, key))
    return ((of_query @ of_key.mT) * (query_log + key_log.mT).exp())[0, 0]


def performer(num_features=32, **options):
    return PerformerAttention(HEAD_DIM, num_features, **options)


def rfa(num_features=32, **options):
    return RandomFeatureAttention(HEAD_DIM, num_features, **options)


CASES = {
    "performer": (performer, softmax_kernel),
    "performer, independent directions": (lambda n=32: performer(n, orthogonal=False), softmax_kernel),
    "rfa": (lambda n=32: rfa(n, sigma=1.2), lambda query, key: gaussian_kernel(query, key, 1.2)),
    "rfa, orthogonal": (
        lambda n=32: rfa(n, sigma=1.2, orthogonal=True),
        lambda query, key: gaussian_kernel(query, key, 1.2),
    ),
    "rfa, softmax": (lambda n=32: rfa(n, normalize=False), softmax_kernel),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture
def query_and_key():
    """Short rows: of long ones the estimates have so heavy a tail that no test could average it away."""
    torch.manual_seed(7)
    query, key = torch.randn(2, LENGTH, HEAD_DIM, dtype=torch.float64)
    return query / 2, key / 2


def test_weights_are_estimated_without_bias(case, query_and_key):
    new, kernel = case
    draws = torch.stack([estimate(new(), *query_and_key) for _ in range(2000)])
    standard_error = draws.std(0) / len(draws) ** 0.5
    # The largest of 144 means; a bias of 5 % would be 20 standard errors and more in most of them.
    assert ((draws.mean(0) - kernel(*query_and_key)).abs() < 5 * standard_error).all()
    assert standard_error.median() < 0.02 * kernel(*query_and_key).median()


def test_the_error_falls_as_one_over_the_square_root_of_the_features(case, query_and_key):
    new, kernel = case
    exact = kernel(*query_and_key)

    def error(num_features):
        draws = [estimate(new(num_features), *query_and_key) - exact for _ in range(150)]
        return torch.stack(draws).square().mean().sqrt()

    assert (error(32) / error(512)).item() == pytest.approx(4, rel=0.3)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", ["performer", "rfa, softmax"])
def test_with_many_features_the_output_nears_softmax_attention(name, is_causal, query_and_key):
    query, key = (rows[None, None] for rows in query_and_key)
    value = torch.randn(1, 1, LENGTH, 5, dtype=torch.float64)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=is_causal)
    few, many = (CASES[name][0](n)(query, key, value, is_causal=is_causal) - expected for n in (64, 65536))
    assert many.norm() < 0.03 * expected.norm()
    assert many.norm() < 0.3 * few.norm()


def test_with_many_features_rfa_nears_softmax_attention_of_unit_vectors(query_and_key):
    query, key = (rows[None, None] for rows in query_and_key)
    value = torch.randn(1, 1, LENGTH, 5, dtype=torch.float64)
    x, y = (torch.nn.functional.normalize(rows, dim=-1) for rows in (query, key))
    expected = torch.nn.functional.scaled_dot_product_attention(x, y, value, is_causal=True, scale=1.2**2)
    output = rfa(65536, sigma=1.2)(query, key, value, is_causal=True)
    assert (output - expected).norm() < 0.05 * expected.norm()


def test_orthogonal_directions_have_a_lower_error(query_and_key):
    exact = softmax_kernel(*query_and_key)

    def error(orthogonal):
        draws = [estimate(performer(HEAD_DIM, orthogonal=orthogonal), *query_and_key) - exact for _ in range(1000)]
        return torch.stack(draws).square().mean(0)  # [N, M]

    assert (error(True) / error(False)).median() < 0.9


def test_orthogonal_directions_are_orthogonal_in_blocks_and_gaussian_each():
    directions = random_directions(20, HEAD_DIM, orthogonal=True)
    for block in directions.split(HEAD_DIM):
        products = block @ block.T
        assert (products - products.diagonal().diag()).abs().max() < 1e-4
    many = torch.cat([random_directions(20, HEAD_DIM, orthogonal=True) for _ in range(1000)])
    assert many.mean().abs() < 0.02
    torch.testing.assert_close(many.T @ many / len(many), torch.eye(HEAD_DIM), rtol=0, atol=0.04)
    assert many.pow(4).mean().item() == pytest.approx(3, rel=0.05)


@pytest.mark.parametrize("is_causal", [False, True])
def test_large_keys_and_queries_neither_overflow_nor_vanish(is_causal):
    """Exponents of 1,000: without the logarithms everything would be 0 / 0."""
    attention = performer(64)
    query, key = 30 * torch.randn(1, 2, 300, HEAD_DIM), 30 * torch.randn(1, 2, 300, HEAD_DIM)
    key[:, :, 100:] *= 0.01  # the first keys weigh next to nothing beside those that come later
    value = torch.randn(1, 2, 300, 5)
    output = attention(query, key, value, is_causal=is_causal)
    assert output.isfinite().all()
    # A mean of values with positive weights that add up to one.
    assert (output.amax(2) <= value.amax(2) + 1e-5).all()
    ones = attention(query, key, torch.ones_like(value), is_causal=is_causal)
    torch.testing.assert_close(ones, torch.ones_like(value))


def test_float32_agrees_with_float64_where_scores_are_sharp():
    attention = performer(64)
    query, key, value = (torch.randn(1, 2, 300, HEAD_DIM) for _ in range(3))
    expected = attention(4 * query.double(), 4 * key.double(), value.double(), is_causal=True)
    output = attention(4 * query, 4 * key, value, is_causal=True)
    torch.testing.assert_close(output.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("new", [performer, lambda: rfa(num_heads=2, sigma=1.2)])
def test_weights_written_out_give_the_same_output(new, is_causal):
    attention = new().double()
    query, key, value = (torch.randn(2, 2, 20, HEAD_DIM, dtype=torch.float64) for _ in range(3))
    key_mask = torch.rand(2, 20) < 0.7
    key_mask[:, 0] = True
    visible = key_mask[:, None, None] & torch.ones(20, 20, dtype=torch.bool).tril(0 if is_causal else 20)
    weights = random_feature_weights(attention, query, key, visible=visible)
    assert (weights[~visible.expand_as(weights)] == 0).all()
    torch.testing.assert_close(weights @ value, attention(query, key, value, key_mask=key_mask, is_causal=is_causal))


def test_weights_of_rows_of_any_length_are_not_written_out():
    rows = torch.randn(1, 1, 3, HEAD_DIM)
    with pytest.raises(ValueError, match="with normalize=True, got normalize=False"):
        random_feature_weights(rfa(normalize=False), rows, rows)


def test_sigma_is_learned_per_dimension_and_head():
    attention = rfa(num_heads=3)
    assert attention.sigma.shape == (3, HEAD_DIM)
    assert attention.directions.shape == (3, 16, HEAD_DIM)
    query, key, value = (torch.randn(2, 3, LENGTH, HEAD_DIM) for _ in range(3))
    attention(query, key, value).square().sum().backward()
    assert (attention.sigma.grad != 0).all()
    with torch.no_grad():
        attention.sigma[1] = torch.rand(HEAD_DIM)
    lone = rfa()
    lone.load_state_dict({"sigma": attention.sigma[1:2].detach(), "directions": attention.directions[1:2]})
    torch.testing.assert_close(
        attention(query, key, value)[:, 1:2], lone(*(rows[:, 1:2] for rows in (query, key, value)))
    )


@pytest.fixture
def performer_pytorch():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it uses what Python and torch have since deprecated
        try:
            return importlib.import_module("performer_pytorch.performer_pytorch")
        except ImportError as error:
            pytest.skip(f"performer-pytorch cannot be imported ({error}); see requirements-benchmark.txt")


def test_performer_equals_performer_pytorch_with_the_same_directions(performer_pytorch):
    attention = performer(32).double()
    query, key, value = (torch.randn(2, 3, 20, HEAD_DIM, dtype=torch.float64) for _ in range(3))
    options = {"projection_matrix": attention.directions, "eps": 0.0}
    of_query = performer_pytorch.softmax_kernel(query, is_query=True, **options)
    of_key = performer_pytorch.softmax_kernel(key, is_query=False, **options)
    expected = performer_pytorch.linear_attention(of_query, of_key, value)
    torch.testing.assert_close(attention(query, key, value), expected)
    # What the package does by default adds 1e-4 to each feature, which is little where none is small.
    query, key = query / 10, key / 10
    theirs = performer_pytorch.FastAttention(HEAD_DIM, nb_features=32).double()
    theirs.projection_matrix.copy_(attention.directions)
    torch.testing.assert_close(attention(query, key, value), theirs(query, key, value), rtol=0, atol=1e-3)


def test_causal_performer_equals_performer_pytorch_with_the_same_directions(performer_pytorch):
    attention = performer(32, query_chunk_size=8).double()
    query, key, value = (torch.randn(2, 3, 20, HEAD_DIM, dtype=torch.float64) for _ in range(3))
    options = {"projection_matrix": attention.directions, "eps": 0.0}
    of_query = performer_pytorch.softmax_kernel(query, is_query=True, **options)
    of_key = performer_pytorch.softmax_kernel(key, is_query=False, **options)
    expected = performer_pytorch.causal_linear_attention_noncuda(of_query, of_key, value, chunk_size=1, eps=0.0)
    torch.testing.assert_close(attention(query, key, value, is_causal=True), expected)
