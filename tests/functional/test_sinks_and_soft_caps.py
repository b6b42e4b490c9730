"""Attention sinks and a soft cap on scores: every backend against a dense computation, and what each of them means."""

import importlib
import math

import pytest
import torch

from comparison import (
    SINK_NAMES,
    SIZES,
    assert_same,
    attention_inputs,
    best_entries,
    causal_visibility,
    named_call,
    output_and_gradients,
    small_integers,
)
from topk_attention import Completion, RelativeBias, topk_attention
from topk_attention.backends import choose_backend, cpu
from topk_attention.nn import TopKAttention

SINKS = torch.tensor([0.5, -1.0, 3.0, 0.0], dtype=torch.float64)


def dense(query, key, value, sinks=None, bias=None, *, k, softcap=None, visible=None):
    """The model's own code: capped scores, then what is added, and the sink as one more column of the softmax."""
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores if bias is None else scores + bias
    visible = torch.ones_like(scores, dtype=torch.bool) if visible is None else visible.expand(scores.shape)
    kept = best_entries(scores.detach(), visible, k)
    scores = scores.masked_fill(~kept, -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(-1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    weights = scores.softmax(-1)[..., : key.shape[2]]
    return torch.where(kept.any(-1, keepdim=True), weights, 0) @ value


@pytest.mark.parametrize("k", [1, 3, 11, None])
@pytest.mark.parametrize("softcap", [None, 0.4, 30.0])
def test_attention_is_that_of_a_softmax_with_one_more_score_per_head(backend, softcap, k):
    inputs, visible = attention_inputs(), causal_visibility(SIZES.queries, SIZES.keys)
    expected = output_and_gradients(
        lambda *x: dense(*x, k=k or SIZES.keys, softcap=softcap, visible=visible), *inputs, SINKS
    )

    def attend(query, key, value, sinks):
        options = {"k": k, "sinks": sinks, "softcap": softcap, "is_causal": True}
        return topk_attention(query, key, value, backend=backend, **options)

    assert_same(output_and_gradients(attend, *inputs, SINKS), expected)


@pytest.mark.parametrize("k", [2, None])
def test_a_bias_is_added_to_capped_scores_and_the_sum_decides_what_is_kept(backend, k):
    inputs = [*(3 * x for x in attention_inputs()[:2]), attention_inputs()[2]]
    bias = torch.randn(4, SIZES.queries, SIZES.keys, dtype=torch.float64)
    expected = output_and_gradients(
        lambda q, key, v, b: dense(q, key, v, bias=b, k=k or SIZES.keys, softcap=0.3), *inputs, bias
    )
    capped_last = dense(*inputs, bias=bias, k=k or SIZES.keys)
    assert not torch.allclose(expected[0], capped_last)
    attend = [
        lambda q, key, v, b: topk_attention(q, key, v, k=k, bias=b, softcap=0.3, backend=backend),
        lambda q, key, v, b: topk_attention(q, key, v, k=k, attn_mask=b, softcap=0.3, backend=backend),
    ]
    assert_same(output_and_gradients(attend[0], *inputs, bias), expected)
    assert_same([attend[1](*inputs, bias)], [expected[0]])


def test_a_soft_cap_that_rounds_scores_to_the_same_number_keeps_their_order(backend):
    query, key = torch.ones(1, 1, 1, 1), torch.tensor([100.0, 102.0, 101.0, 103.0]).view(1, 1, 4, 1)
    value = torch.eye(4).view(1, 1, 4, 4)
    output, selection = topk_attention(
        query, key, value, k=2, scale=1.0, softcap=1.0, backend=backend, return_selection=True
    )
    assert selection.indices.flatten().tolist() == [1, 3]
    assert output.flatten().tolist() == [0, 0.5, 0, 0.5]


def test_of_tied_keys_the_lower_index_is_kept_under_a_cap_and_a_sink(backend):
    sizes = SIZES._replace(queries=13, keys=40)
    query, key = small_integers(2, 4, 13, 3), small_integers(2, 4, 40, 3)
    value = attention_inputs(sizes)[2]
    actual = topk_attention(query, key, value, k=5, sinks=SINKS, softcap=2.0, backend=backend)
    assert_same([actual], [dense(query, key, value, SINKS, k=5, softcap=2.0)])


@pytest.mark.parametrize("name", SINK_NAMES)
def test_weights_sum_to_one_less_those_of_the_sink_and_the_rest(backend, name):
    """Of values that are all 1 the output is what the kept keys and the rest weigh."""
    call = named_call(name)
    query, key, value, *others = call.tensors
    output, (indices, weights) = call(
        query, key, torch.ones_like(value), *others, backend=backend, return_selection=True
    )
    kept, row_has_keys = weights.sum(-1), (indices >= 0).any(-1)
    assert (kept[row_has_keys] < 1).all()
    assert (kept[~row_has_keys] == 0).all()
    if "completed" in name:
        assert (kept <= output[..., 0] + 1e-12).all()
        assert (output[..., 0] < 1).all()
    else:
        assert_same([output], [kept.unsqueeze(-1).expand(output.shape)])


def test_a_sink_of_minus_infinity_is_none(backend):
    inputs, sinks = attention_inputs(), torch.full((4,), -math.inf, dtype=torch.float64)
    for k in (3, None):
        expected = output_and_gradients(lambda *x, k=k: topk_attention(*x, k=k, backend=backend), *inputs)

        def attend(query, key, value, sinks, k=k):
            return topk_attention(query, key, value, k=k, sinks=sinks, backend=backend)

        *actual, of_sinks = output_and_gradients(attend, *inputs, sinks)
        assert_same([*actual, of_sinks], [*expected, torch.zeros(4, dtype=torch.float64)])


@pytest.mark.parametrize("k", [3, None])
def test_a_query_that_sees_no_key_returns_zeros_beside_a_sink_too(backend, k):
    inputs = attention_inputs()
    mask = torch.ones(SIZES.queries, SIZES.keys, dtype=torch.bool)
    mask[2] = False

    def attend(query, key, value, sinks):
        options = {"k": k, "attn_mask": mask, "sinks": sinks, "softcap": 2.0, "backend": backend}
        return topk_attention(query, key, value, **options)[:, :, 2:3]

    assert all((x == 0).all() for x in output_and_gradients(attend, *inputs, SINKS))


@pytest.mark.parametrize("k", [3, None])
def test_a_broken_key_makes_the_rows_that_see_it_nan_under_a_cap_too(backend, k):
    query, key, value = attention_inputs(dtype=torch.float32)
    for broken in (math.nan, math.inf, -math.inf):
        key[0, 0, 4, 1] = broken
        output = topk_attention(
            query, key, value, k=k, is_causal=True, sinks=SINKS.float(), softcap=2.0, backend=backend
        )
        first = 4 - (SIZES.keys - SIZES.queries)  # the first query that sees key 4
        sees = torch.arange(SIZES.queries) >= first
        assert output[0, 0, sees].isnan().all()
        assert not output[0, 0, ~sees].isnan().any()
        assert not output[1].isnan().any()


def test_dropout_leaves_the_sink_its_weight(backend):
    """Kept weights are dropped after the softmax, so what survives is scaled and the sink's share stays as it was."""
    query, key, _ = attention_inputs()
    value = torch.eye(SIZES.keys, dtype=torch.float64).expand(2, 4, -1, -1)
    options = {"k": 5, "sinks": SINKS, "backend": backend}
    whole = topk_attention(query, key, value, **options)
    torch.manual_seed(0)
    dropped = topk_attention(query, key, value, dropout_p=0.5, **options)
    survived = dropped != 0
    assert 0.2 < survived.sum() / (whole != 0).sum() < 0.8
    assert_same([dropped[survived]], [2 * whole[survived]])


def test_a_bias_beside_a_cap_sends_the_kernels_calls_to_chunked(monkeypatch):
    if (problem := cpu.problem()) is not None:
        pytest.skip(problem)
    seen = []
    functional = importlib.import_module("topk_attention.functional.attention")

    def note(backend, call):
        choice = choose_backend(backend, call)
        seen.append((choice.name, choice.reason))
        return choice

    monkeypatch.setattr(functional, "choose_backend", note)
    inputs = attention_inputs(dtype=torch.float32)
    bias = RelativeBias(torch.randn(4, SIZES.queries + SIZES.keys - 1))
    for backend in ("auto", "cpu"):
        topk_attention(*inputs, k=3, softcap=2.0, bias=bias, backend=backend)
        topk_attention(*inputs, k=3, softcap=2.0, is_causal=True, backend=backend)
    assert [name for name, _ in seen] == ["chunked", "cpu", "chunked", "cpu"]
    assert "every score is capped" in seen[0][1]


def test_pytorchs_attention_takes_neither(backend):
    inputs = attention_inputs(SIZES._replace(value_dim=3), torch.float32)
    for options in ({"sinks": SINKS.float()}, {"softcap": 2.0}):
        actual = topk_attention(*inputs, k=None, **options)
        expected = topk_attention(*inputs, k=None, backend=backend, **options)
        torch.testing.assert_close(actual, expected)
        assert not torch.allclose(actual, topk_attention(*inputs, k=None))


def test_autocast_leaves_the_sinks_as_they_are():
    inputs = attention_inputs(dtype=torch.float32)
    sinks = torch.randn(4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = topk_attention(*inputs, k=3, sinks=sinks)
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert sinks.grad.dtype == torch.float32
    low = topk_attention(*(x.bfloat16() for x in inputs), k=3, sinks=sinks)
    assert torch.equal(output, low)


def test_a_layer_trains_its_sinks():
    sinks = torch.nn.Parameter(torch.zeros(2))
    linears = [torch.nn.Linear(8, 8) for _ in range(4)]
    layer = TopKAttention(*linears, num_heads=2, k=3, sinks=sinks, softcap=2.0)
    layer(torch.randn(2, 7, 8)).square().sum().backward()
    assert dict(layer.named_parameters())["sinks"].grad.abs().min() > 0
    assert "softcap=2" in repr(layer)
    fixed = TopKAttention(*linears, num_heads=2, k=3, sinks=torch.zeros(2))
    assert "sinks" in fixed.state_dict()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"sinks": [0.0] * 4}, TypeError, "sinks must be a tensor, got list"),
        ({"sinks": torch.zeros(4, dtype=torch.int64)}, ValueError, "sinks must be float16"),
        (
            {"sinks": torch.zeros(3)},
            ValueError,
            r"sinks must have shape \[4\], one number for each query head, got \[3\]",
        ),
        ({"sinks": torch.zeros(1, 4)}, ValueError, r"sinks must have shape \[4\].*got \[1, 4\]"),
        ({"sinks": torch.zeros(4, device="meta")}, ValueError, "sinks must be on cpu like query, got meta"),
        ({"softcap": "50"}, TypeError, "softcap must be a number above 0 or None, got str"),
        ({"softcap": True}, TypeError, "softcap must be a number above 0 or None, got bool"),
        ({"softcap": 0.0}, ValueError, "softcap must be finite and above 0, got 0.0; None caps nothing"),
        ({"softcap": -1.0}, ValueError, "softcap must be finite and above 0, got -1.0"),
        ({"softcap": math.inf}, ValueError, "softcap must be finite and above 0, got inf"),
        ({"softcap": 2.0, "completion": Completion()}, ValueError, "completion cannot be combined with softcap"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(options, error, words):
    with pytest.raises(error, match=words):
        topk_attention(*attention_inputs(), k=3, **options)
