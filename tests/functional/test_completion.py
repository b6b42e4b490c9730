"""The keys that a query does not keep enter its softmax as one more entry, as `Completion` says."""

import math
import re

import pytest
import torch

from comparison import Sizes, assert_same, attention_inputs, output_and_gradients
from topk_attention import ALiBi, Completion, RelativeBias, topk_attention
from topk_attention.backends import completed_attention, visible_keys

SMALL = Sizes(batch=2, heads=4, key_heads=2, queries=19, keys=23, head_dim=3, value_dim=5)


def completed_densely(
    query, key, value, mass_scale, bias=None, *, k, lift=0.35, visible=None, scale=None, enable_gqa=True
):
    """The docstring of `Completion`, on full matrices of scores; no two scores of a row are alike.

    mass_scale  [] or [H]
    visible     broadcasts to [B, H, N, M], and bias
    """
    group, num_keys = query.shape[-3] // key.shape[-3], key.shape[-2]
    key, value = (x.repeat_interleave(group, dim=-3) for x in (key, value))
    products = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = products if bias is None else products + bias
    visible = torch.ones_like(scores, dtype=torch.bool) if visible is None else visible.expand(scores.shape)
    hidden_last = scores.detach().masked_fill(~visible, -math.inf)
    per_head = torch.as_tensor(k).expand(query.shape[-3]).clamp(max=num_keys).view(-1, 1, 1)
    in_order = hidden_last.sort(-1, descending=True).values
    kth = in_order.gather(-1, (per_head - 1).expand(*in_order.shape[:-1], 1))
    kept = visible & (hidden_last >= kth)
    rest = visible & ~kept
    n = rest.sum(-1, keepdim=True)

    def mean_over_rest(x):
        return (x * rest).sum(-1, keepdim=True) / n.clamp(min=1)

    largest = in_order[..., :1].clamp(min=-1e9)  # the same factor on all entries
    smallest_kept = scores.masked_fill(~kept, math.inf).amin(-1, keepdim=True).clamp(max=1e9)
    score = (1 - lift) * mean_over_rest(scores) + lift * smallest_kept
    rest_mass = mass_scale.view(-1, 1, 1) * n * (score.masked_fill(n == 0, 0) - largest).clamp(max=700).exp()
    rest_mass = rest_mass.masked_fill(n == 0, 0)
    shares = (1 + products - mean_over_rest(products)) * rest / n.clamp(min=1)
    kept_masses = (scores - largest).masked_fill(~kept, -math.inf).exp()
    total = (kept_masses.sum(-1, keepdim=True) + rest_mass).clamp(min=1e-300)
    return (kept_masses @ value + rest_mass * (shares @ value)) / total


def attend(*inputs, backend, lift=0.35, make_bias=lambda bias: bias, **options):
    query, key, value, mass_scale, *bias = inputs
    return topk_attention(
        *(query, key, value),
        completion=Completion(mass_scale, lift),
        backend=backend,
        bias=make_bias(bias[0]) if bias else None,
        enable_gqa=True,
        **options,
    )


@pytest.fixture(params=["intervals of 512", "intervals of 4"])
def interval(request, monkeypatch):
    """Keys between two running sums."""
    if request.param == "intervals of 4":
        monkeypatch.setattr(visible_keys, "INTERVAL", 4)
        monkeypatch.setattr(completed_attention, "INTERVAL", 4)


def positions(queries, keys):
    """How far the key is behind the last one that the query sees under causality, [N, M]."""
    return torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)


@pytest.mark.usefixtures("interval")
@pytest.mark.parametrize("lift", [0.0, 0.35, 1.0])
@pytest.mark.parametrize("scales", ["one", "by head"])
@pytest.mark.parametrize(
    "kind",
    [
        *("all keys", "causal", "more queries than keys", "one query", "padding", "causal padding", "padding by head"),
        *("sliding window", "bias", "causal bias", "relative bias", "causal relative bias", "float mask"),
    ],
)
def test_output_and_gradients_are_those_of_the_formula(backend, kind, scales, lift):
    sizes = SMALL
    if kind == "more queries than keys":
        sizes = sizes._replace(queries=23, keys=19)
    if kind == "one query":
        sizes = sizes._replace(queries=1)
    batch, heads, _, queries, keys, *_ = sizes
    is_causal = kind in ("causal", "more queries than keys", "one query") or kind.startswith("causal")
    options = {"k": [3, 1, 5, 2] if scales == "by head" else 3, "scale": 0.8}
    mass_scale = torch.tensor([0.5, 2.0, 1.0, 3.0] if scales == "by head" else 1.5, dtype=torch.float64)
    inputs = [*attention_inputs(sizes), mass_scale]
    behind = positions(queries, keys)
    visible = behind >= 0 if is_causal else torch.ones(queries, keys, dtype=torch.bool)
    mask, make_bias, spread = None, lambda bias: bias, lambda bias: bias
    if "padding" in kind:
        mask = torch.rand(batch, heads if kind == "padding by head" else 1, 1, keys) < 0.7
    if kind == "sliding window":
        mask = (behind >= 0) & (behind < 9)
    if kind == "float mask":
        mask = (
            torch.randn(batch, 1, queries, keys)
            .double()
            .masked_fill(torch.rand(batch, 1, queries, keys) < 0.2, -math.inf)
        )
    if kind in ("bias", "causal bias"):
        inputs.append(torch.randn(heads, queries, keys).double())
    if "relative" in kind:
        inputs.append(torch.randn(heads, queries + keys - 1).double())
        place = torch.arange(keys) - torch.arange(queries)[:, None] + queries - 1
        make_bias, spread = RelativeBias, lambda bias: bias[:, place]
    if mask is not None:
        visible = visible & (mask if mask.dtype == torch.bool else ~mask.isneginf())
    added = 0 if mask is None or mask.dtype == torch.bool else mask.masked_fill(mask.isneginf(), 0)

    def formula(*tensors):
        bias = spread(tensors[4]) + added if len(tensors) > 4 else added
        return completed_densely(*tensors[:4], bias, **options, lift=lift, visible=visible)

    def operation(*tensors):
        kept = {"attn_mask": mask, "is_causal": is_causal, "lift": lift, "make_bias": make_bias}
        return attend(*tensors, backend=backend, **kept, **options)

    assert_same(output_and_gradients(operation, *inputs), output_and_gradients(formula, *inputs))


@pytest.mark.parametrize("kind", ["causal", "padding", "relative bias"])
def test_more_than_a_thousand_rows_are_those_of_the_formula(fast_backend, kind):
    """Several intervals of keys, and in the kernels several tasks of rows."""
    sizes = Sizes(batch=1, heads=2, key_heads=1, queries=1130, keys=1150, head_dim=4, value_dim=3)
    inputs = [*attention_inputs(sizes), torch.tensor([0.7, 1.3], dtype=torch.float64)]
    behind = positions(sizes.queries, sizes.keys)
    visible, mask, options = behind >= 0, None, {"k": 8, "lift": 0.3}
    if kind == "padding":
        mask = torch.arange(sizes.keys).ge(70).expand(1, 1, 1, -1)
        visible = visible & mask
    make_bias, spread = lambda bias: bias, lambda bias: bias
    if kind == "relative bias":
        inputs.append(torch.randn(2, sizes.queries + sizes.keys - 1).double())
        place = (sizes.keys - 1 - behind).clamp(max=sizes.queries + sizes.keys - 2)
        make_bias, spread = RelativeBias, lambda bias: bias[:, place]

    def formula(*tensors):
        bias = spread(tensors[4]) if len(tensors) > 4 else None
        return completed_densely(*tensors[:4], bias, visible=visible, **options)

    def operation(*tensors):
        return attend(*tensors, backend=fast_backend, attn_mask=mask, is_causal=True, make_bias=make_bias, **options)

    assert_same(output_and_gradients(operation, *inputs), output_and_gradients(formula, *inputs))


@pytest.mark.parametrize("spread", [1.0, 60.0])
@pytest.mark.parametrize("is_causal", [False, True])
def test_float32_gradients_are_those_of_float64_also_where_weights_underflow(fast_backend, is_causal, spread):
    """With a spread of 60 some kept keys of a row lie more than 100 below its best one."""
    sizes = Sizes(batch=1, heads=4, key_heads=2, queries=90, keys=100, head_dim=16, value_dim=8)
    inputs = attention_inputs(sizes)
    options = {"backend": fast_backend, "k": 20, "is_causal": is_causal, "scale": spread / 4}

    def operation(*tensors):
        return attend(*tensors, 1.5, **options)

    exact = output_and_gradients(operation, *inputs)
    rounded = output_and_gradients(operation, *(x.float() for x in inputs))
    for ours, truth in zip(rounded, exact, strict=True):
        error = (ours.double() - truth).abs().max() / truth.abs().max()
        assert error < 2e-6 * spread


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"attn_mask": torch.rand(2, 1, 1, 23) < 0.7}])
def test_the_backward_pass_takes_the_sums_of_the_forward_pass(fast_backend, options, monkeypatch):
    inputs = [x.requires_grad_() for x in attention_inputs(SMALL)]
    output = topk_attention(*inputs, k=3, completion=Completion(), enable_gqa=True, backend=fast_backend, **options)

    def refuse(*_):
        raise AssertionError("summed again")

    for name in ("_running_sums", "_total_sums"):
        monkeypatch.setattr(visible_keys, name, refuse)
    output.sum().backward()
    assert all(x.grad.isfinite().all() for x in inputs)


@pytest.mark.parametrize("is_causal", [False, True])
def test_equal_scores_in_the_rest_without_lift_give_full_attention(backend, is_causal):
    query, key, value = attention_inputs(Sizes(1, 2, 2, 20, 20, 4, 3))
    key[:, :, 3:] = key[:, :, :1]  # whatever is kept, of the rest all are alike
    query, key = query.abs() + 0.1, key.clone()
    key[:, :, 1:3] = key[:, :, :1] + 1  # these are better
    options = {"is_causal": is_causal, "backend": backend}
    full = topk_attention(query, key, value, k=None, **options)
    assert_same([topk_attention(query, key, value, k=2, completion=Completion(1, lift=0), **options)], [full])


@pytest.mark.parametrize("k", [11, 50, None, [11, 12, 50, 11]], ids=str)
def test_without_a_rest_it_is_ordinary_attention(backend, k):
    inputs = attention_inputs()
    expected = output_and_gradients(lambda *x: topk_attention(*x, k=None, backend="reference"), *inputs)
    options = {"k": k, "completion": Completion(2.0), "backend": backend}
    assert_same(output_and_gradients(lambda *x: topk_attention(*x, **options), *inputs), expected)


@pytest.mark.usefixtures("interval")
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_mass_scale_of_zero_is_topk_attention_alone(backend, is_causal):
    inputs, options = attention_inputs(), {"k": 3, "is_causal": is_causal, "backend": backend}
    expected = output_and_gradients(lambda *x: topk_attention(*x, **options), *inputs)
    assert_same(
        output_and_gradients(lambda *x: topk_attention(*x, completion=Completion(0), **options), *inputs), expected
    )


@pytest.mark.usefixtures("interval")
@pytest.mark.parametrize("shape", [(), (4,)], ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_parameter_as_mass_scale_gets_its_gradient(backend, shape, is_causal, dtype):
    inputs = attention_inputs()
    scale = torch.nn.Parameter((torch.rand(shape) + 0.5).to(dtype))

    def output_of(scale):
        return attend(*inputs, scale, k=3, is_causal=is_causal, backend=backend)

    output = output_of(scale)
    grad_output = torch.randn_like(output)
    (output * grad_output).sum().backward()
    assert scale.grad.dtype == dtype
    assert scale.grad.shape == shape
    exact = scale.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(output_of, [exact])
    (expected,) = torch.autograd.grad(output_of(exact), exact, grad_output)
    torch.testing.assert_close(scale.grad, expected.to(dtype))


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_million_keys_stay_close_to_float64(fast_backend, is_causal):
    inputs = attention_inputs(Sizes(1, 1, 1, 3, 1_000_000, 8, 8), torch.float32)
    mass_scale, visible = torch.tensor(1.0).double(), positions(3, 1_000_000) >= 0 if is_causal else None
    exact = completed_densely(*(x.double() for x in inputs), mass_scale, k=32, visible=visible)
    output = topk_attention(*inputs, k=32, completion=Completion(), is_causal=is_causal, backend=fast_backend)
    assert (output.double() - exact).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", ["all keys", "causal", "bool mask"])
def test_the_number_of_threads_changes_no_bit(fast_backend, kind):
    sizes = Sizes(batch=2, heads=2, key_heads=1, queries=600, keys=640, head_dim=8, value_dim=6)
    inputs = [*attention_inputs(sizes, torch.float32), torch.tensor([0.5, 1.5])]
    mask = torch.rand(sizes.queries, sizes.keys) < 0.6 if kind == "bool mask" else None
    options = {"k": 8, "is_causal": kind == "causal", "attn_mask": mask, "backend": fast_backend}
    threads, results = torch.get_num_threads(), []
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            results.append(output_and_gradients(lambda *x: attend(*x, **options), *inputs))
    finally:
        torch.set_num_threads(threads)
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(others, results[0], strict=True))


@pytest.mark.usefixtures("interval")
@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("table", ["key", "value"])
@pytest.mark.parametrize("kind", ["padding", "bool mask", "causal", "float mask"])
def test_what_is_broken_and_hidden_stays_out(backend, kind, table, broken):
    sizes = Sizes(batch=2, heads=2, key_heads=2, queries=9, keys=9, head_dim=3, value_dim=2)
    query, key, value = attention_inputs(sizes)
    last = 5  # of the queries' keys; the others are broken
    shown = torch.arange(9) <= last
    if kind == "causal":
        query = query[:, :, : last + 1]
    options = {"k": 2, "completion": Completion(), "backend": backend}
    masks = {
        "padding": shown.view(1, 1, 1, -1),
        "bool mask": shown.expand(9, -1),
        "float mask": torch.zeros(1, 1, 9, 9).double().masked_fill(~shown, -math.inf),
    }
    if kind == "causal":
        query = torch.cat([query, torch.zeros_like(query[:, :, :3])], dim=2)
        options["is_causal"] = True
    else:
        options["attn_mask"] = masks[kind]
    rows = slice(0, last + 1)

    def gradients(query, key, value):
        leaves = [x.detach().requires_grad_() for x in (query, key, value)]
        output = topk_attention(*leaves, **options)[:, :, rows]
        grad_query, *others = torch.autograd.grad(output.square().sum(), leaves)
        if kind == "causal":  # later rows see what is broken, and each sends NaN to all keys that it sees
            others = []
        return [output.detach(), grad_query[:, :, rows], *others]

    expected = gradients(query, key, value)
    assert all(x.isfinite().all() for x in expected)
    ({"key": key, "value": value}[table])[:, :, last + 1 :] = broken
    assert_same(gradients(query, key, value), expected)


@pytest.mark.usefixtures("interval")
@pytest.mark.parametrize("table", ["key", "value"])
@pytest.mark.parametrize("kind", ["all keys", "causal", "bool mask"])
def test_nan_in_a_visible_key_or_value_makes_the_row_nan(backend, kind, table):
    query, key, value = attention_inputs(Sizes(1, 2, 2, 9, 9, 3, 2))
    query[:], key[:] = 1, 1
    key[:, :, :2] = 2  # these are kept
    ({"key": key, "value": value}[table])[0, 1, 5] = math.nan
    sees = torch.ones(9, 9, dtype=torch.bool) if kind == "all keys" else torch.rand(9, 9) < 0.7
    if kind == "causal":
        sees = positions(9, 9) >= 0
    options = {"attn_mask": sees if kind == "bool mask" else None, "is_causal": kind == "causal"}
    output = topk_attention(query, key, value, k=2, completion=Completion(), backend=backend, **options)
    assert output[0, 0].isfinite().all()
    assert torch.equal(output[0, 1].isnan().all(-1), sees[:, 5])
    assert torch.equal(output[0, 1].isnan().any(-1), sees[:, 5])


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_selection_weighs_what_the_formula_leaves_to_kept_keys(backend, is_causal):
    query, key, _ = attention_inputs(Sizes(1, 2, 2, 9, 9, 3, 9))
    options = {"k": 3, "completion": Completion(1.5), "is_causal": is_causal, "backend": backend}
    value = torch.randn(1, 2, 9, 2).double()
    _, selection = topk_attention(query, key, value, return_selection=True, **options)
    # Of one-hot values the formula gives the weight of each key; a kept one has no part in the rest.
    visible = positions(9, 9) >= 0 if is_causal else None
    weights = completed_densely(
        query, key, torch.eye(9).double().expand(1, 2, -1, -1), torch.tensor(1.5).double(), k=3, visible=visible
    )
    filled = selection.indices >= 0
    expected = weights.gather(-1, selection.indices.clamp(min=0).long()) * filled
    assert_same([selection.weights], [expected])
    has_rest = torch.arange(1, 10) > 3 if is_causal else torch.ones(9, dtype=torch.bool)
    assert (selection.weights.sum(-1)[..., has_rest] < 1).all()
    assert_same([selection.weights.sum(-1)[..., ~has_rest]], [torch.ones(1, 2, int((~has_rest).sum())).double()])


@pytest.mark.parametrize("is_causal", [False, True])
def test_bfloat16_is_rounded_float32(backend, is_causal):
    inputs = attention_inputs(dtype=torch.bfloat16)
    options = {"k": 3, "completion": Completion(), "is_causal": is_causal, "backend": backend}
    output = topk_attention(*inputs, **options)
    assert output.dtype == torch.bfloat16
    in_float32 = topk_attention(*(x.float() for x in inputs), **options)
    torch.testing.assert_close(output.float(), in_float32, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 4, 7, 3), (2, 4, 0, 3)], ids=str)
def test_calls_without_rows_return_nothing_and_have_zero_gradients(backend, shape):
    query = torch.randn(shape, requires_grad=True)
    key = torch.randn(shape[0], 4, 11, 3, requires_grad=True)
    scale = torch.ones(4, requires_grad=True)
    output = topk_attention(query, key, key, k=3, completion=Completion(scale), backend=backend)
    assert output.shape == shape
    output.sum().backward()
    for x in (query, key, scale):
        assert x.grad.shape == x.shape
        assert (x.grad == 0).all()


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"lift": "1"}, TypeError, "lift must be a number from 0 to 1, got str '1'"),
        ({"lift": True}, TypeError, "lift must be a number from 0 to 1, got bool True"),
        ({"lift": 1.01}, ValueError, "lift must be from 0 to 1, got 1.01"),
        ({"lift": math.nan}, ValueError, "lift must be from 0 to 1, got nan"),
        ({"mass_scale": -1}, ValueError, "mass_scale must be finite and at least 0, got -1"),
        ({"mass_scale": [1, math.inf]}, ValueError, "mass_scale must be finite and at least 0, got inf"),
        ({"mass_scale": math.nan}, ValueError, "mass_scale must be finite and at least 0, got nan"),
        ({"mass_scale": None}, TypeError, "mass_scale must be a number, one number for each head, or a tensor of them"),
        ({"mass_scale": [True]}, TypeError, "or a tensor of them, got bool True"),
        (
            {"mass_scale": torch.ones(1, 4)},
            ValueError,
            "mass_scale must be one number, or one for each head, got [1, 4]",
        ),
        (
            {"mass_scale": torch.ones(4).int()},
            ValueError,
            "must be float16, bfloat16, float32 or float64, got torch.int32",
        ),
    ],
    ids=str,
)
def test_a_completion_that_makes_no_sense_is_refused_in_words(arguments, error, words):
    with pytest.raises(error, match=re.escape(words)):
        Completion(**arguments)


KEY_SUMS = Completion().sums(torch.randn(2, 4, 11, 3), torch.randn(2, 4, 11, 5))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"completion": 1.0}, TypeError, "completion must be a Completion or None, got float 1.0"),
        ({"completion": Completion([1, 2])}, ValueError, "one number for each of the 4 query heads, got 2"),
        ({"completion": Completion(torch.ones(3))}, ValueError, "one number for each of the 4 query heads, got 3"),
        ({"completion": None, "key_sums": KEY_SUMS}, ValueError, "key_sums are for completion, but completion is None"),
        ({"key_sums": tuple(KEY_SUMS)}, TypeError, "key_sums must be a KeySums or None, got tuple"),
        (
            {"key_sums": KEY_SUMS._replace(values=torch.ones(2, 4, 4))},
            ValueError,
            "key_sums.values must be torch.float32 [2, 4, 5] on cpu to match key and value, got torch.float32",
        ),
        (
            {"key_sums": KEY_SUMS._replace(keys=KEY_SUMS.keys.double())},
            ValueError,
            "key_sums.keys must be torch.float32",
        ),
        (
            {"key_sums": KEY_SUMS._replace(keys=KEY_SUMS.keys.clone().requires_grad_())},
            ValueError,
            "key_sums get no gradient, but keys requires one; detach it",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_a_completion_or_sums_that_do_not_fit_the_call_are_refused_in_words(options, error, words):
    with pytest.raises(error, match=re.escape(words)):
        topk_attention(*attention_inputs(dtype=torch.float32), k=3, **{"completion": Completion(), **options})


def test_sums_are_refused_unless_keys_and_values_are_as_many():
    with pytest.raises(ValueError, match=r"value must have shape \[2, 5, 3\] but for its last axis, like key, got"):
        Completion().sums(torch.randn(2, 5, 3), torch.randn(2, 6, 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["bias", "float mask", "ALiBi and a bool mask"])
def test_biases_are_added_up_as_precisely_as_everything_else(backend, kind, dtype):
    """In float16 a thousand biases of -100 are -inf, in bfloat16 their sum is off by half, in float32 not exact."""
    query, key, value = attention_inputs(SMALL._replace(queries=3, keys=1000), dtype)
    slope = torch.full((1, 1, 1, 1000), -100.3).to(dtype)
    options = {
        "bias": {"bias": slope},
        "float mask": {"attn_mask": slope},
        "ALiBi and a bool mask": {
            "bias": ALiBi(torch.tensor([0.7, 0.1, 0.03, 0.01])),
            "attn_mask": torch.rand(1, 1, 3, 1000) < 0.9,
        },
    }[kind]
    exact = {name: x.double() if x is slope else x for name, x in options.items()}
    options, exact = ({"k": 3, "completion": Completion(), "enable_gqa": True, **x} for x in (options, exact))
    output = topk_attention(query, key, value, backend=backend, **options)
    expected = topk_attention(query.double(), key.double(), value.double(), backend="reference", **exact)
    if dtype == torch.float64:
        torch.testing.assert_close(output, expected, rtol=1e-11, atol=1e-11)
    else:
        torch.testing.assert_close(output, expected.to(dtype), rtol=1e-2, atol=1e-2)


@pytest.mark.usefixtures("interval")
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("by", ["nothing", "head", "batch", "head and batch"])
def test_a_mask_that_hides_all_keys_or_none_is_as_good_as_written_out(backend, by, is_causal):
    shape = (2 if "batch" in by else 1, 4 if "head" in by else 1, 1, 1)
    inputs, options = [*attention_inputs(SMALL), torch.tensor(1.5).double()], {"k": 3, "is_causal": is_causal}

    def outputs(mask, backend):
        return output_and_gradients(lambda *x: attend(*x, attn_mask=mask, backend=backend, **options), *inputs)

    shows_first = torch.arange(math.prod(shape)).view(shape) % 3 == 0
    for mask in (shows_first, ~shows_first):
        expected = outputs(mask.expand(-1, -1, SMALL.queries, SMALL.keys).contiguous(), "reference")
        assert_same(outputs(mask, backend), expected)
        if by == "nothing":
            assert_same(outputs(mask.view(()), backend), expected)
            assert_same(outputs(mask.view(1), backend), expected)


@pytest.mark.parametrize("lift", [0.0, 0.35, 1.0])
@pytest.mark.parametrize(("dtype", "score"), [(torch.float32, -100.0), (torch.float64, -800.0)], ids=str)
def test_a_row_without_a_rest_has_finite_gradients_also_where_its_scores_are_low(backend, dtype, score, lift):
    query = torch.full((1, 1, 1, 1), score, dtype=dtype)
    key = torch.tensor([1.0, 2.0, 3.0], dtype=dtype).view(1, 1, 3, 1)
    mask = torch.tensor([[True, False, False]])
    options = {"k": 2, "attn_mask": mask, "scale": 1.0, "completion": Completion(lift=lift), "backend": backend}
    _, *gradients = output_and_gradients(lambda *x: topk_attention(*x, **options), query, key, key.clone())
    for gradient in gradients[:2]:
        assert torch.equal(gradient, torch.zeros_like(gradient))
    assert gradients[2].isfinite().all()


@pytest.mark.parametrize("shape", [(), (4,)], ids=str)
@pytest.mark.parametrize("k", [11, None], ids=str)
@pytest.mark.parametrize("keys", [11, 0])
@pytest.mark.parametrize("chosen", ["by name", "auto"])
def test_a_mass_scale_that_completes_nothing_gets_zero_gradient(backend, chosen, keys, k, shape):
    query, key, value = attention_inputs(SMALL._replace(keys=keys), torch.float16)
    options = {"k": k, "enable_gqa": True, "backend": "auto" if chosen == "auto" else backend}
    scale = torch.full(shape, 1.5, requires_grad=True)
    output = topk_attention(query, key, value, completion=Completion(scale), **options)
    assert output.dtype == query.dtype
    assert torch.equal(output, topk_attention(query, key, value, **options))
    output.sum().backward()
    assert torch.equal(scale.grad, torch.zeros(shape))
