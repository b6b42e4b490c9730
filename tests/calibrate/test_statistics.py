"""Curves compared with direct measurements: run top-k attention at every k and measure what it loses."""

from itertools import pairwise

import pytest
import torch

from topk_attention import Completion, RelativeBias, topk_attention, topk_feed_forward
from topk_attention.calibrate import statistics
from topk_attention.calibrate.statistics import SCALES, Collector, Curves, CurvesByScale, Rows, k_grid
from topk_attention.functional.observation import observed

BATCH, HEADS, QUERIES, KEYS, SIZE = 2, 4, 7, 11, 5
EVERY_K = range(1, KEYS + 1)


def inputs(num_queries=QUERIES, num_keys=KEYS, key_heads=HEADS, dtype=torch.float64):
    query = 2 * torch.randn(BATCH, HEADS, num_queries, SIZE, dtype=dtype)
    key, value = (torch.randn(BATCH, key_heads, num_keys, SIZE, dtype=dtype) for _ in range(2))
    return query, key, value, torch.randn(BATCH, HEADS, num_queries, SIZE, dtype=dtype)


@pytest.fixture
def every_k(monkeypatch):
    """Curves with a point at every k."""
    monkeypatch.setattr(statistics, "k_grid", lambda largest: tuple(range(1, largest + 1)))


def measured(query, key, value, grad, collector=None, **options):
    """The curves of one attention call whose output gets this gradient."""
    collector = collector or Collector(queries_per_head=1000, largest_k=1000)
    with observed(lambda call, output: collector.see_attention("layer", collector.sample(call, 0), grad)):
        topk_attention(query, key, value, k=None, **options)
    return collector.attention["layer"]


def lost_by_doing_it(query, key, value, grad, **options):
    """Lost mass and squared change of the loss, both [H, K], and the change in either half of the queries [2, H, K]."""
    run = {"backend": "reference", "return_selection": True, **options}
    full, everything = topk_attention(query, key, value, k=key.shape[-2], **run)
    # Empty slots have index -1 and weight 0: one column more takes them.
    weights = torch.zeros(*full.shape[:-1], key.shape[-2] + 1, dtype=torch.float64)
    weights.scatter_(-1, everything.indices.long() % (key.shape[-2] + 1), everything.weights.double())
    lost, change = [], []
    for k in range(1, key.shape[-2] + 1):
        output, kept = topk_attention(query, key, value, k=k, **run)
        kept_weight = weights.gather(-1, kept.indices.long() % (key.shape[-2] + 1)) * (kept.indices >= 0)
        lost.append((weights.sum(-1) - kept_weight.sum(-1)).mean((0, 2)))
        change.append(((output - full) * grad).sum(-1))
    changes = torch.stack(change, -1)  # [B, H, N, K]
    first_later = (changes.shape[2] + 1) // 2
    halves = torch.stack([half.mean((0, 2)) for half in (changes[:, :, :first_later], changes[:, :, first_later:])])
    return torch.stack(lost, 1), changes.square().mean((0, 2)), halves


def some_keys_hidden():
    mask = torch.rand(BATCH, 1, QUERIES, KEYS) > 0.3
    mask[0, 0, 2] = False  # a query that sees no key
    return mask


def left_padding():
    mask = torch.ones(BATCH, 1, 1, KEYS, dtype=torch.bool)
    mask[0, ..., :6] = False
    return mask


CASES = {
    "plain": dict,
    "causal": lambda: {"is_causal": True},
    "bool mask": lambda: {"attn_mask": some_keys_hidden()},
    "float mask": lambda: {"attn_mask": torch.randn(1, HEADS, QUERIES, KEYS, dtype=torch.float64)},
    "padding and causal": lambda: {"attn_mask": left_padding(), "is_causal": True},
    "dense bias": lambda: {"bias": torch.randn(BATCH, 1, QUERIES, KEYS, dtype=torch.float64)},
    "relative bias": lambda: {
        "bias": RelativeBias(torch.randn(HEADS, QUERIES + KEYS - 1, dtype=torch.float64)),
        "is_causal": True,
    },
    "scale": lambda: {"scale": 1.7},
    "sinks": lambda: {"sinks": torch.randn(HEADS, dtype=torch.float64), "attn_mask": some_keys_hidden()},
    "soft cap": lambda: {"softcap": 1.5, "is_causal": True},
    "grouped keys": lambda: {"enable_gqa": True, "is_causal": True},
}


@pytest.mark.usefixtures("every_k")
@pytest.mark.parametrize("case", CASES)
def test_curves_are_what_topk_attention_loses_at_every_k(case):
    options = CASES[case]()
    call = inputs(key_heads=2 if case == "grouped keys" else HEADS)
    curves = measured(*call, **options)
    lost, error, change = lost_by_doing_it(*call, **options)
    assert curves.ks == tuple(EVERY_K)
    torch.testing.assert_close(curves.lost_mass, lost, rtol=0, atol=1e-12)
    torch.testing.assert_close(curves.loss_error, error, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(curves.loss_change, change, rtol=1e-9, atol=1e-12)
    assert error[:, 0].min() > 1e-4


@pytest.mark.usefixtures("every_k")
def test_rows_that_see_nothing_lose_nothing():
    call = inputs(num_queries=KEYS)
    curves = measured(*call, attn_mask=left_padding(), is_causal=True)
    torch.testing.assert_close(curves.lost_mass[:, -1], torch.zeros(HEADS).double(), rtol=0, atol=1e-12)
    assert (curves.lost_mass[:, 0] < 1).all()


@pytest.mark.usefixtures("every_k")
def test_rows_are_measured_in_parts_without_a_seam(monkeypatch):
    call = inputs()
    whole = measured(*call, is_causal=True)
    monkeypatch.setattr(statistics, "_ROWS_AT_A_TIME", 3)
    parts = measured(*call, is_causal=True)
    torch.testing.assert_close(parts.lost_mass, whole.lost_mass)
    torch.testing.assert_close(parts.loss_error, whole.loss_error)
    torch.testing.assert_close(parts.loss_change, whole.loss_change)


def test_a_sign_that_means_nothing_is_left_out():
    call = inputs()
    curves = measured(*call, Collector(queries_per_head=1000, largest_k=1000, signed=False))
    assert curves.loss_change.abs().max() == 0
    torch.testing.assert_close(curves.loss_error, measured(*call).loss_error)


def test_queries_are_spread_over_the_sequence():
    curves = measured(*inputs(num_queries=40), Collector(queries_per_head=10, largest_k=1000))
    assert curves.num_rows == BATCH * 10


def test_curves_end_at_the_largest_k():
    curves = measured(*inputs(), Collector(queries_per_head=1000, largest_k=6))
    assert curves.ks[-1] == 6
    assert (curves.lost_mass[:, -1] > 0).all()


def test_a_shorter_sequence_loses_nothing_at_a_k_above_its_length():
    long, short = inputs(), inputs(num_keys=4)
    both = Collector(queries_per_head=1000, largest_k=1000)
    measured(*long, both)
    together = measured(*short, both)
    alone = [measured(*call) for call in (long, short)]
    at = together.ks.index(8)
    torch.testing.assert_close(together.lost_mass[:, at], alone[0].lost_mass[:, at] / 2)
    at = together.ks.index(2)
    mean = (alone[0].lost_mass[:, at] + alone[1].lost_mass[:, alone[1].ks.index(2)]) / 2
    torch.testing.assert_close(together.lost_mass[:, at], mean)


def test_half_precision_is_measured_in_float32():
    precise = inputs(num_keys=400)
    rough = tuple(tensor.bfloat16() for tensor in precise)
    curves, expected = measured(*rough), measured(*(tensor.double() for tensor in rough))
    torch.testing.assert_close(curves.lost_mass, expected.lost_mass, rtol=0, atol=1e-5)
    torch.testing.assert_close(curves.loss_error, expected.loss_error, rtol=1e-4, atol=1e-8)


COMPLETIONS = {
    "without a lift": Completion(1.0, lift=0.0),
    "lifted": Completion(2.0, lift=0.35),
    "a scale per head": Completion([0.0, 0.5, 1.0, 3.0]),
}


def completing(completion, *, fit=False):
    return Collector(queries_per_head=1000, largest_k=1000, completion=completion, fit_scale=fit)


def changes_by_doing_it(query, key, value, grad, completion, **options):
    """The change of the loss at every k, [B, H, N, K]."""
    full = topk_attention(query, key, value, k=key.shape[-2], backend="reference", **options)
    changes = []
    for k in range(1, key.shape[-2] + 1):
        output = topk_attention(query, key, value, k=k, backend="reference", completion=completion, **options)
        changes.append(((output - full) * grad).sum(-1))
    return torch.stack(changes, -1)


@pytest.mark.usefixtures("every_k")
@pytest.mark.parametrize("case", [case for case in CASES if case != "soft cap"])
@pytest.mark.parametrize("name", COMPLETIONS)
def test_curves_are_what_completed_attention_loses_at_every_k(case, name):
    options, completion = CASES[case](), COMPLETIONS[name]
    call = inputs(key_heads=2 if case == "grouped keys" else HEADS)
    curves = measured(*call, completing(completion), **options)
    changes = changes_by_doing_it(*call, completion, **options)
    error = changes.square().mean((0, 2))
    torch.testing.assert_close(curves.loss_error, error, rtol=1e-9, atol=1e-12)
    halves = torch.stack([half.mean((0, 2)) for half in changes.tensor_split(2, dim=2)])
    torch.testing.assert_close(curves.loss_change, halves, rtol=1e-9, atol=1e-12)
    plain = measured(*call, **options)
    torch.testing.assert_close(curves.lost_mass, plain.lost_mass)
    assert error[:, 0].min() > 1e-4


@pytest.mark.usefixtures("every_k")
@pytest.mark.parametrize("case", ["causal", "bool mask", "dense bias", "grouped keys"])
def test_the_fitted_scale_is_the_best_of_all_that_are_tried(case):
    options = CASES[case]()
    call = inputs(key_heads=2 if case == "grouped keys" else HEADS)
    curves = measured(*call, completing(Completion(), fit=True), **options)
    errors = torch.stack(
        [changes_by_doing_it(*call, Completion(scale), **options).square().mean((0, 2)) for scale in SCALES]
    )
    torch.testing.assert_close(curves.loss_error, errors.amin(0), rtol=1e-9, atol=1e-12)
    for head in range(HEADS):
        for at in range(KEYS - 1):
            scale = curves.mass_scale[head, at].item()
            assert errors[SCALES.index(scale), head, at] <= errors[:, head, at].min() * (1 + 1e-6)


@pytest.mark.usefixtures("every_k")
def test_a_fitted_head_never_does_worse_than_top_k_alone_or_a_scale_of_1():
    call = inputs(num_queries=40, num_keys=40)
    fitted, alone, one = (
        measured(*call, completing(completion, fit=fit), is_causal=True).loss_error
        for completion, fit in ((Completion(), True), (None, False), (Completion(1.0), False))
    )
    assert (fitted <= alone * (1 + 1e-9)).all()
    assert (fitted <= one * (1 + 1e-9)).all()
    assert (fitted < 0.9 * alone).any()


@pytest.mark.usefixtures("every_k")
def test_where_every_scale_is_as_good_it_is_1():
    """At a k that keeps every key nothing is learnt about what more keys need."""
    curves = measured(*inputs(), completing(Completion(), fit=True))
    assert (curves.mass_scale[:, -1] == 1).all()


@pytest.mark.usefixtures("every_k")
@pytest.mark.parametrize("planted", [SCALES[5], 1.0, SCALES[-4]])
def test_a_planted_scale_is_found(planted):
    """Where the rest is exactly `planted` times as heavy as its mean score says."""
    kept, rest = torch.randn(2, HEADS, 20, 1, dtype=torch.float64)
    rows = Rows(torch.zeros_like(kept), kept, torch.zeros_like(kept), rest, torch.rand_like(kept))
    rows = rows._replace(full=rows.loss_change(torch.full((HEADS,), planted)))
    scales = torch.tensor(SCALES, dtype=torch.float64).unsqueeze(1).expand(-1, HEADS)
    curves = CurvesByScale.empty(Completion(), scales, (1,))
    curves.add(rows, signed=True)
    assert (curves.best().mass_scale == planted).all()


@pytest.mark.usefixtures("every_k")
def test_half_precision_with_completion_is_measured_in_float32():
    rough = tuple(tensor.bfloat16() for tensor in inputs(num_keys=400))
    curves, expected = (
        measured(*call, completing(Completion(1.0))) for call in (rough, tuple(tensor.double() for tensor in rough))
    )
    torch.testing.assert_close(curves.loss_error, expected.loss_error, rtol=1e-3, atol=1e-6)


@pytest.mark.usefixtures("every_k")
def test_a_bias_with_a_hidden_part_leaves_only_visible_keys_in_the_rest():
    call = inputs(num_queries=QUERIES, num_keys=KEYS)
    bias = torch.randn(HEADS, QUERIES + KEYS - 1, dtype=torch.float64)
    bias[:, :4] = -torch.inf
    curves = measured(*call, completing(Completion(1.0)), bias=RelativeBias(bias))
    changes = changes_by_doing_it(*call, Completion(1.0), bias=RelativeBias(bias))
    torch.testing.assert_close(curves.loss_error, changes.square().mean((0, 2)), rtol=1e-9, atol=1e-12)


NEURONS, TOKENS, OUTPUTS = 13, 9, 6


@pytest.mark.usefixtures("every_k")
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("biased", [False, True], ids=["no bias", "bias"])
def test_feed_forward_curves_are_what_topk_feed_forward_loses_at_every_k(gated, biased):
    x = torch.randn(TOKENS, SIZE, dtype=torch.float64)
    weights = {
        "w_in": torch.randn(NEURONS, SIZE).double(),
        "w_out": torch.randn(OUTPUTS, NEURONS).double(),
        "activation": "gelu",
    }
    if gated:
        weights |= {"w_gate": torch.randn(NEURONS, SIZE).double(), "activation": "silu"}
    if biased:
        weights |= {"b_in": torch.randn(NEURONS).double(), "b_out": torch.randn(OUTPUTS).double()}
    if biased and gated:
        weights["b_gate"] = torch.randn(NEURONS).double()
    grad = torch.randn(TOKENS, OUTPUTS).double()
    collector = Collector(queries_per_head=1000, largest_k=1000)
    with observed(lambda call, output: collector.see_feed_forward("layer", call, grad)):
        full = topk_feed_forward(x, k=None, **weights)
    curves = collector.feed_forward["layer"]
    # The mass is the sum of |activations|: the output of an output layer of ones.
    hidden = torch.eye(NEURONS).double()
    plain = weights | {"b_out": None, "w_out": hidden}
    total = topk_feed_forward(x, k=None, **plain).abs().sum(1)
    for at, k in enumerate(range(1, NEURONS + 1)):
        change = ((topk_feed_forward(x, k=k, **weights) - full) * grad).sum(1)
        error, halves = change.square().mean(), torch.stack([half.mean() for half in change.tensor_split(2)])
        kept = topk_feed_forward(x, k=k, **plain).abs().sum(1)
        torch.testing.assert_close(curves.loss_error[0, at], error, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(curves.loss_change[:, 0, at], halves, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(curves.lost_mass[0, at], (1 - kept / total).mean(), rtol=1e-9, atol=1e-12)
    assert curves.loss_error[0, 0] > 1e-4


@pytest.mark.parametrize("largest", [1, 2, 3, 4, 5, 7, 8, 9, 16, 100, 128, 129, 2048])
def test_the_grid_rises_from_1_to_the_largest_in_small_steps(largest):
    grid = k_grid(largest)
    assert grid[0] == 1
    assert grid[-1] == largest
    assert all(k < next_k <= max(k + 1, 1.25 * k) for k, next_k in pairwise(grid))
    assert len(grid) <= 4 * largest.bit_length() + 1


def test_curves_average_over_rows_for_any_batches():
    lost, change = torch.rand(2, 10, 3), torch.randn(2, 10, 3)
    curves = Curves.empty(2, (1, 2, 3))
    for part in (slice(0, 1), slice(1, 7), slice(7, 10)):
        curves.add(lost[:, part], change[:, part])
    assert curves.num_rows == 10
    torch.testing.assert_close(curves.lost_mass, lost.double().mean(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(curves.loss_error, change.double().square().mean(1), rtol=1e-6, atol=0)
    halves = torch.stack([change[:, rows].double().mean(1) for rows in ([0, 1, 2, 3, 7, 8], [4, 5, 6, 9])])
    torch.testing.assert_close(curves.loss_change, halves, rtol=1e-6, atol=1e-9)


def test_empty_curves_share_no_memory():
    curves = Curves.empty(1, (1, 2))
    curves.add(torch.ones(1, 1, 2), torch.zeros(1, 1, 2))
    assert curves.loss_error.tolist() == [[0, 0]]
    assert curves.loss_change.abs().max() == 0
