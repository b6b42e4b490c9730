"""The Triton kernels keep the keys of the reference and send its gradients, for all data and however calls are cut.

The claims of tests/functional run in the same process with backend="triton"; here are those of the kernels alone.
"""

import importlib

import pytest
import torch

from comparison import Call, Sizes, assert_same, attention_inputs, named_call, small_integers
from topk_attention import RelativeBias, topk_attention
from topk_attention.backends.triton import plan

LONG = Sizes(batch=1, heads=2, key_heads=1, queries=5, keys=150, head_dim=6, value_dim=4)


@pytest.fixture
def kernels():
    """The modules that launch, imported when a test runs: a process without Triton cannot."""
    pytest.importorskip("triton")
    return (
        importlib.import_module("topk_attention.backends.triton.attention"),
        importlib.import_module("topk_attention.backends.triton.keys"),
    )


@pytest.fixture
def overflowing(kernels, monkeypatch):
    """A list of whether some row had more candidates than there is room for, one entry for each launch."""
    attention, _ = kernels
    launched, found = attention.cut_in_passes_kernel, []

    class Noted:
        def __getitem__(self, grid):
            def launch(*arguments, **options):
                counts = arguments[9]
                found.append(bool((counts > options["capacity"]).any()))
                return launched[grid](*arguments, **options)

            return launch

    monkeypatch.setattr(attention, "cut_in_passes_kernel", Noted())
    return found


def both(call, **options):
    """What the kernels give and what the reference gives, indices first."""
    results = []
    for backend in ("triton", "reference"):
        indices = call(*call.tensors, backend=backend, return_selection=True, **options)[1].indices
        results.append([indices, *call.run(backend=backend, **options)])
    return results


def assert_equals_the_reference(call, **options):
    (indices, *actual), (expected_indices, *expected) = both(call, **options)
    assert torch.equal(indices, expected_indices)
    assert_same(actual, expected)


def keys_in_order(kind):
    """Keys of which query 1 has scores in this order."""
    query, key, value = attention_inputs(LONG)
    query[..., 1:], query[..., 0] = 0, query[..., 0].abs() + 0.5
    steps = torch.arange(LONG.keys, dtype=torch.float64)
    key[..., 0] = {
        "ascending": steps / 50,
        "descending": -steps / 50,
        "constant": torch.ones_like(steps),
        "nearly constant": 1 + 1e-7 * torch.randn(LONG.keys, dtype=torch.float64),
        "the best in one group": torch.where(steps < 8, 5 + steps, steps / 1000),
        "a few levels": steps % 3,
    }[kind]
    return Call((query, key, value), {"k": 7, "enable_gqa": True})


@pytest.mark.parametrize(
    "kind", ["ascending", "descending", "constant", "nearly constant", "the best in one group", "a few levels"]
)
def test_no_order_of_keys_changes_what_is_kept(kernels, overflowing, kind):
    assert_equals_the_reference(keys_in_order(kind))
    assert overflowing
    if kind in ("constant", "a few levels"):
        assert any(overflowing), "these have more candidates than there is room for"


def test_ties_of_integers_are_broken_by_index_where_candidates_do_not_fit(kernels, overflowing):
    query, key = small_integers(1, 2, 5, 6), small_integers(1, 1, LONG.keys, 6)
    call = Call((query, key, attention_inputs(LONG)[2]), {"k": 7, "enable_gqa": True, "is_causal": True})
    assert_equals_the_reference(call)
    assert any(overflowing)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)], ids=str
)
def test_low_precision_keeps_the_same_keys_and_stays_close(kernels, dtype, tolerance):
    sizes = LONG._replace(keys=300, head_dim=80, value_dim=48)
    inputs = [x.to(dtype) for x in attention_inputs(sizes)]
    options = {"k": 9, "enable_gqa": True, "is_causal": True}
    actual = both(Call(tuple(inputs), options))[0]
    expected = both(Call(tuple(x.double() for x in inputs), options))[1]
    assert torch.equal(actual[0], expected[0])
    for a, e in zip(actual[1:], expected[1:], strict=True):
        assert a.dtype == dtype
        assert (a.double() - e).abs().max() <= tolerance * e.abs().max()


def test_a_head_size_of_256_and_a_k_of_100_fit(kernels):
    sizes = LONG._replace(queries=3, keys=400, head_dim=130, value_dim=256)
    assert_equals_the_reference(Call(attention_inputs(sizes), {"k": 100, "enable_gqa": True}))


def test_one_query_of_many_heads_reads_each_key_head_once(kernels, monkeypatch):
    attention, _ = kernels
    sizes = LONG._replace(heads=6, key_heads=2, queries=1)
    call = Call(attention_inputs(sizes), {"k": 7, "enable_gqa": True, "is_causal": True})
    grids = []
    launched = attention.score_tiles_kernel

    class Noted:
        def __getitem__(self, grid):
            grids.append(grid)
            return launched[grid]

    monkeypatch.setattr(attention, "score_tiles_kernel", Noted())
    assert_equals_the_reference(call)
    assert {tiles for tiles, _ in grids} == {2}


def test_slabs_splits_and_parts_change_nothing(kernels, monkeypatch):
    attention, _ = kernels
    sizes = LONG._replace(batch=2, heads=4, key_heads=2, queries=9, keys=140)
    values = torch.randn(4, 148, dtype=torch.float64)
    options = {"enable_gqa": True, "is_causal": True, "k": [3, 1, 7, 5]}
    call = Call((*attention_inputs(sizes), values), options, RelativeBias)

    def run():
        return [call(*call.tensors, backend="triton", return_selection=True)[1].indices, *call.run(backend="triton")]

    whole = run()
    monkeypatch.setattr(attention, "_processors", lambda device: 3)
    monkeypatch.setattr(plan, "SLAB_BYTES", 60_000)
    monkeypatch.setattr(plan, "SORTED_ENTRIES", 50)
    cut = run()
    made = plan.make_plan(2, 4, 2, 9, 140, 6, 7, itemsize=8, adds=True, saves=True, processors=3, interpreted=True)
    assert made.slab_tiles < made.num_tiles
    assert made.splits > 1
    assert len(plan.parts_of_backward([3, 1, 7, 5], 2, 2, 9)) > 1
    assert torch.equal(cut[0], whole[0])
    assert_same(cut[1:], whole[1:])


def test_a_key_that_every_query_keeps_is_summed_in_segments(kernels, monkeypatch):
    _, keys = kernels
    monkeypatch.setattr(keys, "SEGMENT", 4)
    sizes = LONG._replace(queries=13, keys=20)
    query, key, value = attention_inputs(sizes)
    query[..., 0], key[:, :, 3], key[:, :, 3, 0] = 1, 0, 4
    call = Call((query, key, value, torch.randn(2, 32, dtype=torch.float64)), {"enable_gqa": True}, RelativeBias)
    _, (indices, _) = call(*call.tensors, backend="triton", return_selection=True)
    assert (indices == 3).any(-1).sum() > 4 * keys.SEGMENT
    assert_equals_the_reference(call)


BIAS_SHAPES = [(2, 4, 5, 11), (1, 4, 5, 11), (1, 1, 5, 11), (2, 1, 1, 11), (1, 4, 5, 1), (1, 1, 1, 1)]


@pytest.mark.parametrize("shape", BIAS_SHAPES, ids=str)
def test_a_bias_gets_its_gradient_in_every_shape_that_broadcasts(kernels, shape):
    sizes = Sizes(batch=2, heads=4, key_heads=1, queries=5, keys=11, head_dim=3, value_dim=2)
    bias = torch.randn(shape, dtype=torch.float64)
    assert_equals_the_reference(Call((*attention_inputs(sizes), bias), {"enable_gqa": True}))


def test_two_runs_give_the_same_bits(kernels):
    call = named_call("soft_cap_with_sinks_and_a_relative_bias")
    call = Call(call.tensors[:4], {"dropout_p": 0.3, "sinks": call.tensors[4]}, RelativeBias)
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        runs.append(call.run(backend="triton"))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_a_broken_key_spoils_the_queries_that_see_it_among_many_keys(kernels, broken):
    query, key, value = attention_inputs(LONG)
    options = {"k": 7, "enable_gqa": True, "is_causal": True, "backend": "triton"}
    clean = topk_attention(query, key, value, **options)
    key[:, :, 148, 2], value[:, :, 148] = broken, broken
    output = topk_attention(query, key, value, **options)
    assert torch.equal(output[:, :, :3], clean[:, :, :3])
    assert output[:, :, 3:].isnan().all()


def test_the_operators_are_right_for_torch_and_compile(kernels):
    attention, _ = kernels
    sizes = Sizes(batch=1, heads=2, key_heads=1, queries=3, keys=6, head_dim=3, value_dim=2)
    tensors = [x.requires_grad_() for x in attention_inputs(sizes)]
    options = ([2, 2], True, 0.5, 0.0, 0.0)
    torch.library.opcheck(
        attention.topk_attention_op,
        (*tensors, None, None, None, None, None, *options, True),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )

    def attend(query, key, value):
        return topk_attention(query, key, value, k=2, is_causal=True, enable_gqa=True, backend="triton")

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    results = []
    for function in (attend, compiled):
        output = function(*tensors)
        results.append([output, *torch.autograd.grad(output.sum(), tensors)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
