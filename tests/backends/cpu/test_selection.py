"""Scores that mislead the kernels' guesses: the kernels keep what the reference keeps."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from large_calls import (
    assert_equals_the_reference,
    assert_keeps_what_the_reference_keeps,
    integer_inputs,
    integers,
    select,
)
from topk_attention import Completion, topk_attention
from topk_attention.backends import cpu

NUM_KEYS = 4096
# Keys of a panel in float64; twice as many in float32.
PANELS = {"avx512vnni": 16, "avx512screen": 16, "avx512": 16, "avxvnni": 8, "avx2screen": 8, "avx2": 8} | {
    "neondot": 6,
    "neon": 6,
    "baseline": 4,
}
# Up to 16 rows of a key head are few: they are worked on another way.
FEW_AND_MANY = pytest.mark.parametrize("num_rows", [14, 20])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@pytest.fixture(params=sorted({PANELS[name] for name in cpu.cpu_targets()} if cpu.problem() is None else []))
def panel(request):
    """Keys of a panel in float64: the scores of a test hang on it."""
    return request.param


def panel_of(panel, dtype):
    return panel * (2 if dtype == torch.float32 else 1)


def targets_with(panel):
    """CPU targets of this processor with panels of that many keys."""
    return [name for name in cpu.cpu_targets() if PANELS[name] == panel]


def in_sampled_panels(panel):
    """[M] bool: of 4096 keys the sample is an eighth of the panels, the fifth, the thirteenth, ..."""
    return torch.arange(NUM_KEYS) // panel % 8 == 4


def noise():
    return torch.randint(0, 1000, (NUM_KEYS,)) / 1024


PATTERNS = {
    "ascending": lambda panel: torch.arange(NUM_KEYS),
    "descending": lambda panel: -torch.arange(NUM_KEYS),
    "all equal": lambda panel: torch.zeros(NUM_KEYS),
    "one dominates, first": lambda panel: torch.arange(NUM_KEYS) == 0,
    "one dominates, last": lambda panel: (torch.arange(NUM_KEYS) == NUM_KEYS - 1) * 30,
    "two levels": lambda panel: torch.arange(NUM_KEYS) % 2,
    "up and down": lambda panel: (torch.arange(NUM_KEYS) * 2654435761 % 4099) / 64,
    # Fewer than k keys reach the guess: the rows are computed again.
    "the sample is best": lambda panel: in_sampled_panels(panel) * 8 + noise(),
    "the sample is best, equal elsewhere": lambda panel: torch.where(in_sampled_panels(panel), 8 + noise(), 0),
    "a few of the sample are best": lambda panel: in_sampled_panels(panel) * (noise() > 0.7) * 8 + noise(),
    # Every other key reaches the guess: stores overflow.
    "the sample is worst": lambda panel: in_sampled_panels(panel) * -8 + noise(),
    "the sample is worst, ascending elsewhere": lambda panel: in_sampled_panels(panel) * -8192 + torch.arange(NUM_KEYS),
    "the last eighth is best": lambda panel: (torch.arange(NUM_KEYS) > NUM_KEYS * 7 // 8) * 8 + noise(),
    "far apart": lambda panel: torch.where(torch.arange(NUM_KEYS) % 3 == 0, 1e30, -1e30) * noise(),
    "barely apart": lambda panel: torch.randint(0, 3, (NUM_KEYS,)) * 2.0**-140,
    "of both signs around zero": lambda panel: torch.randint(-1, 2, (NUM_KEYS,)) * 0.0,
}


@DTYPES
@FEW_AND_MANY
@pytest.mark.parametrize("pattern", PATTERNS)
def test_for_all_scores_the_best_keys_are_kept(panel, pattern, num_rows, dtype):
    scores = PATTERNS[pattern](panel_of(panel, dtype)).to(dtype)
    key = scores[None, None, :, None]  # a head size of 1 and queries of 1 let the test choose the scores
    query, value = torch.ones(1, 1, num_rows, 1, dtype=dtype), torch.zeros(1, 1, NUM_KEYS, 1, dtype=dtype)
    query[:, :, 1::3] = -1
    for k in (1, 64, 300, 500, NUM_KEYS // 2 + 1, NUM_KEYS - 1):
        assert_keeps_what_the_reference_keeps(query, key, value, targets=targets_with(panel), k=k, scale=1.0)


@DTYPES
@FEW_AND_MANY
def test_scores_given_by_a_mask_are_selected_like_others(panel, num_rows, dtype):
    """Rows of one block that each follow another pattern."""
    patterns = itertools.islice(itertools.cycle(PATTERNS.values()), num_rows)
    rows = [make(panel_of(panel, dtype)).to(dtype) for make in patterns]
    query = torch.zeros(1, 1, len(rows), 3, dtype=dtype)
    key, value = torch.zeros(1, 1, NUM_KEYS, 3, dtype=dtype), torch.zeros(1, 1, NUM_KEYS, 1, dtype=dtype)
    mask = torch.stack(rows)
    for k in (1, 64, 300, NUM_KEYS // 2 + 1):
        options = {"targets": targets_with(panel), "k": k}
        assert_keeps_what_the_reference_keeps(query, key, value, **options, attn_mask=mask)
        hidden = mask.masked_fill(torch.rand(mask.shape) < 0.5, -math.inf)
        hidden[3], hidden[5, 7:] = -math.inf, -math.inf  # no keys, and only seven
        assert_keeps_what_the_reference_keeps(query, key, value, **options, attn_mask=hidden)
        visible = torch.rand(NUM_KEYS) < 0.03
        assert_keeps_what_the_reference_keeps(query, key, value, **options, attn_mask=visible)


@FEW_AND_MANY
@pytest.mark.parametrize("pattern", ["the sample is best", "the sample is worst", "ascending", "all equal"])
def test_misleading_scores_have_the_gradients_of_the_reference(panel, pattern, num_rows):
    key = torch.stack([PATTERNS[pattern](panel) / 1000, torch.randn(NUM_KEYS)], dim=-1)[None, None]
    query, value = torch.ones(1, 1, num_rows, 2), torch.randn(1, 1, NUM_KEYS, 3)
    query[..., 1] = 0
    for k in (300, NUM_KEYS // 2 + 1):
        assert_equals_the_reference(query, key, value, targets=targets_with(panel), k=k, scale=1.0)


@pytest.mark.parametrize("completion", [None, Completion()], ids=["kept alone", "completed"])
def test_rows_done_again_among_others_get_their_own_output(panel, completion):
    """In every third row the sample is worst and enough keys are found, in the others it is best and too few are."""
    pattern = PATTERNS["the sample is best"](panel)
    key = torch.stack([pattern, torch.randn(NUM_KEYS)], dim=-1)[None, None]
    query, value = torch.ones(1, 1, 40, 2), torch.randn(1, 1, NUM_KEYS, 3)
    query[:, :, 1::3, 0] = -1
    query[..., 1] = torch.randn(40) / 8
    options = {"targets": targets_with(panel), "k": 300, "scale": 1.0, "completion": completion}
    assert_equals_the_reference(query, key, value, **options)


@pytest.mark.parametrize("num_queries", [600, 1100])
@pytest.mark.parametrize("num_keys", [600, 1100])
def test_causal_blocks_keep_what_the_reference_keeps(cpu_targets, num_queries, num_keys):
    inputs = integer_inputs(1, 2, 1, num_queries, num_keys, 8, 1)
    options = {"targets": cpu_targets, "is_causal": True, "enable_gqa": True, "scale": 0.25}
    for k in (1, 40, [7, num_keys // 2 + 1]):
        assert_keeps_what_the_reference_keeps(*inputs, **options, k=k)


@pytest.mark.parametrize("k", [64, [64, 1, 700, 20]], ids=["one k", "k per head"])
def test_of_a_million_keys_the_best_are_kept(k):
    query, key, value = integer_inputs(1, 4, 1, 3, 10**6, 4, 2)
    query += torch.arange(4)  # heads that differ
    value = torch.randn(value.shape)
    options = {"k": k, "scale": 0.25, "enable_gqa": True}
    assert_keeps_what_the_reference_keeps(query, key, value, **options)
    assert_equals_the_reference(query, key, value, **options)


@FEW_AND_MANY
@pytest.mark.parametrize("num_broken", [1, 100])
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("num_keys", [33, 600, 5000])
def test_a_broken_key_makes_the_rows_that_see_it_nan_and_no_others(cpu_target, num_keys, broken, num_broken, num_rows):
    query, key, value = torch.randn(1, 1, num_rows, 8), torch.randn(1, 1, num_keys, 8), torch.randn(1, 1, num_keys, 4)
    clean = key.clone()
    where = torch.randperm(num_keys)[:num_broken]
    key[0, 0, where, torch.randint(0, 8, (len(where),))] = broken
    mask = torch.ones(num_rows, num_keys, dtype=torch.bool)
    mask[::2, where] = False
    output = topk_attention(query, key, value, k=20, attn_mask=mask, backend="cpu")
    expected = topk_attention(query, clean, value, k=20, attn_mask=mask, backend="cpu")
    assert torch.equal(output[:, :, ::2], expected[:, :, ::2])
    assert output[:, :, 1::2].isnan().all()
    assert topk_attention(query, key, value, k=20, backend="cpu").isnan().all()


@FEW_AND_MANY
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("num_keys", [33, 600, 5000])
def test_a_broken_query_makes_its_row_nan_and_no_other(cpu_target, num_keys, broken, num_rows):
    query, key, value = torch.randn(1, 1, num_rows, 8), torch.randn(1, 1, num_keys, 8), torch.randn(1, 1, num_keys, 4)
    expected = topk_attention(query, key, value, k=20, backend="cpu")
    query[0, 0, [2, 13], 3] = broken
    output = topk_attention(query, key, value, k=20, backend="cpu")
    whole = [i for i in range(num_rows) if i not in (2, 13)]
    assert torch.equal(output[:, :, whole], expected[:, :, whole])
    assert output[:, :, [2, 13]].isnan().all()


@FEW_AND_MANY
@pytest.mark.parametrize("num_keys", [33, 600])
def test_scores_that_overflow_do_what_they_do_in_the_reference(cpu_target, num_keys, num_rows):
    query, key = torch.ones(1, 1, num_rows, 2), torch.randn(1, 1, num_keys, 2)
    query[:, :, 3:] = 1e30
    key[:, :, 4] = 1e30
    key[:, :, 9:12] = -1e30
    value = torch.randn(1, 1, num_keys, 3)
    for k in (3, num_keys - 1):
        actual, expected = (topk_attention(query, key, value, k=k, backend=name) for name in ("cpu", "reference"))
        torch.testing.assert_close(actual, expected, equal_nan=True)


@st.composite
def integer_calls(draw):
    """Calls of a few rows and many keys, as the kernels' samples and stores see them."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    num_keys = draw(st.one_of(st.integers(1, 70), st.integers(480, 560), st.integers(600, 3000)))
    key_heads, group, num_queries = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 30))
    heads = key_heads * group
    inputs = integer_inputs(
        draw(st.integers(1, 2)), heads, key_heads, num_queries, num_keys, draw(st.integers(1, 9)), 1
    )
    some_k = st.one_of(st.integers(1, 80), st.integers(1, num_keys))
    mask = draw(st.sampled_from(["none", "bool", "keys", "float"]))
    options = {
        "k": draw(st.one_of(some_k, st.lists(some_k, min_size=heads, max_size=heads))),
        "is_causal": draw(st.booleans()),
        "scale": draw(st.sampled_from([0.5, -0.25, 0.0])),
        "attn_mask": {
            "none": lambda: None,
            "bool": lambda: torch.rand(num_queries, num_keys) < 0.5,
            "keys": lambda: torch.rand(num_keys) < 0.1,
            "float": lambda: integers(heads, 1, num_keys).masked_fill(torch.rand(num_keys) < 0.3, -math.inf),
        }[mask](),
        "bias": integers(num_queries, num_keys) if draw(st.booleans()) else None,
        "enable_gqa": True,
    }
    return inputs, options


@settings(max_examples=300)
@given(call=integer_calls(), target=st.deferred(lambda: st.sampled_from(cpu.cpu_targets())))
def test_any_call_keeps_what_the_reference_keeps(call, target):
    inputs, options = call
    with cpu.forced_cpu_target(target):
        assert_keeps_what_the_reference_keeps(*inputs, **options)


def test_weights_are_positive_and_sum_to_one():
    query, key, value = torch.randn(1, 2, 40, 16), torch.randn(1, 2, 3000, 16), torch.randn(1, 2, 3000, 1)
    weights = select(query, key, value, k=100).weights
    assert (weights > 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 40))
