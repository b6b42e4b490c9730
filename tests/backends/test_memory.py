"""No matrix of queries x keys or of tokens x neurons exists at any time, and little is saved for the backward pass."""

import importlib
import itertools

import pytest
import torch

from topk_attention import ALiBi, BucketedBias, RelativeBias, topk_attention, topk_feed_forward
from topk_attention.backends import sdpa
from topk_attention.backends.chunked import tiles

LENGTH, HEAD_DIM, K = 2048, 8, 8


@pytest.fixture(autouse=True)
def _tiles_of_64_kib(monkeypatch):
    monkeypatch.setattr(tiles, "TILE_BYTES", 2**16)
    monkeypatch.setattr(importlib.import_module("topk_attention.backends.chunked.feed_forward"), "TILE_BYTES", 2**16)


def peak_bytes(function):
    """The most memory that tensors made within the function took at one time, those inside operators included."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert events
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes))


def test_the_measurement_sees_tensors_that_are_freed_again_and_those_inside_operators():
    x = torch.ones(1000, 1000)
    peak = peak_bytes(lambda: (x + 1).sum() + (x + 2).sum())
    assert 4_000_000 <= peak < 8_000_000
    assert peak_bytes(lambda: x.sort(stable=True)) >= 12_000_000  # values and int64 indices


def attend_and_differentiate(backend, *, with_bias=None, **options):
    tensors = [torch.randn(1, 1, LENGTH, HEAD_DIM, requires_grad=True) for _ in range(3)]
    bias = None if with_bias is None else with_bias()

    def run():
        topk_attention(*tensors, bias=bias, backend=backend, **{"k": K, **options}).sum().backward()

    return run


def learned(kind, *shape, **options):
    return lambda: kind(torch.zeros(*shape, requires_grad=True), **options)


def padding_mask():
    return (torch.arange(LENGTH) < LENGTH - 100)[None, None, None, :]


def queries_without_keys():
    return (torch.arange(LENGTH) % 3 > 0)[:, None]


def key_mask_to_add():
    return torch.zeros(LENGTH).masked_fill(torch.arange(LENGTH) > LENGTH - 100, -torch.inf)


SELECTING = pytest.mark.parametrize(
    ("backend", "k"), [("chunked", K), ("chunked", None), ("cpu", K), ("cpu", None)], indirect=["backend"]
)

CALLS = {
    "plain": {},
    "causal": {"is_causal": True},
    "padding mask": {"attn_mask": padding_mask()},
    "float key mask": {"attn_mask": key_mask_to_add()},
    "queries without keys": {"attn_mask": queries_without_keys()},
    "relative bias": {"with_bias": learned(RelativeBias, 1, 2 * LENGTH - 1)},
    "bucketed bias": {"with_bias": learned(BucketedBias, 32, 1)},
    "alibi": {"with_bias": learned(ALiBi, 1)},
    "bias of keys": {"with_bias": lambda: torch.zeros(1, LENGTH, requires_grad=True)},
    "dropout": {"dropout_p": 0.1},
    "everything": {
        "is_causal": True,
        "attn_mask": padding_mask(),
        "with_bias": learned(BucketedBias, 32, 1, bidirectional=False),
        "dropout_p": 0.1,
    },
}


@SELECTING
@pytest.mark.parametrize("name", CALLS)
def test_attention_never_holds_even_a_bool_for_each_query_and_key(backend, name, k):
    run = attend_and_differentiate(backend, **CALLS[name], k=k)
    run()  # what is made once per process does not count
    assert peak_bytes(run) < LENGTH * LENGTH


# Parts of 256 queries and PyTorch's own blocks take 5 MB, which would hide a matrix of a smaller size.
LONG = 2 * LENGTH


@pytest.mark.parametrize("num_queries", [LONG, LONG - 500])
@pytest.mark.parametrize(
    ("is_causal", "attn_mask"),
    [
        (False, None),
        (True, None),
        (False, torch.arange(LONG) < LONG - 100),
        (False, torch.zeros(LONG).masked_fill(torch.arange(LONG) > LONG - 100, -torch.inf)),
        (False, torch.arange(LONG).unsqueeze(1) > 100),
        (True, torch.arange(LONG) < LONG - 100),
    ],
    ids=["plain", "causal", "padding mask", "float key mask", "queries without keys", "causal with padding"],
)
def test_auto_never_holds_even_a_bool_for_each_query_and_key_of_full_attention(
    monkeypatch, is_causal, attn_mask, num_queries
):
    monkeypatch.setattr(sdpa, "_MASK_BYTES", 2**16)
    if attn_mask is not None and attn_mask.ndim == 2:
        attn_mask = attn_mask[:num_queries]
    query = torch.randn(1, 1, num_queries, HEAD_DIM, requires_grad=True)
    key, value = (torch.randn(1, 1, LONG, HEAD_DIM, requires_grad=True) for _ in range(2))

    def run():
        topk_attention(query, key, value, k=None, is_causal=is_causal, attn_mask=attn_mask).sum().backward()

    run()
    assert peak_bytes(run) < num_queries * LONG


def test_the_selection_takes_no_more_memory_than_its_size_calls_for(fast_backend):
    def run():
        tensors = [torch.randn(1, 1, LENGTH, HEAD_DIM) for _ in range(3)]
        topk_attention(*tensors, k=K, backend=fast_backend, return_selection=True)

    run()
    assert peak_bytes(run) < LENGTH * LENGTH


def test_the_reference_does_hold_a_matrix_of_queries_and_keys():
    assert peak_bytes(attend_and_differentiate("reference")) > 4 * LENGTH * LENGTH


@SELECTING
def test_memory_grows_linearly_with_length(backend, k):
    def peak(length):
        tensors = [torch.randn(1, 1, length, HEAD_DIM, requires_grad=True) for _ in range(3)]

        def run():
            topk_attention(*tensors, k=k, is_causal=True, backend=backend).sum().backward()

        run()
        return peak_bytes(run)

    assert peak(4096) < 2.5 * peak(2048)


TOKENS, NEURONS = 8192, 1024


@pytest.mark.parametrize("is_gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("k", [8, None])
def test_feed_forward_never_holds_even_a_byte_for_each_token_and_neuron(fast_backend, is_gated, dropout_p, k):
    x, w_in, w_out, w_gate = (
        torch.randn(*shape, requires_grad=True) for shape in ((TOKENS, 8), (NEURONS, 8), (8, NEURONS), (NEURONS, 8))
    )

    def run():
        gate = {"w_gate": w_gate} if is_gated else {}
        output = topk_feed_forward(
            x, w_in, w_out, k=k, **gate, activation="gelu", dropout_p=dropout_p, backend=fast_backend
        )
        output.sum().backward()

    run()
    assert peak_bytes(run) < TOKENS * NEURONS


def saved_for_backward(function):
    """What autograd keeps of a call, by storage: views of one tensor count once."""
    saved = {}

    def pack(x):
        saved[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = function()
    assert output.requires_grad
    return list(saved.values())


def new_tensors(saved, *known):
    storages = {x.untyped_storage().data_ptr() for x in known}
    return [x for x in saved if x.untyped_storage().data_ptr() not in storages]


def dtypes_and_sizes(tensors):
    return sorted((str(x.dtype), x.numel()) for x in tensors if x.numel() > 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k", [3, [1, 2, 3, 5]], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_attention_saves_its_inputs_an_index_and_a_weight_for_each_kept_key(fast_backend, dropout_p, k, dtype):
    query, key, value = (torch.randn(2, 4, n, 16, dtype=dtype, requires_grad=True) for n in (7, 11, 11))
    mask = torch.rand(2, 1, 7, 11) < 0.8
    bias = torch.randn(4, 7, 11, dtype=dtype, requires_grad=True)
    saved = saved_for_backward(
        lambda: topk_attention(
            query, key, value, k=k, attn_mask=mask, bias=bias, dropout_p=dropout_p, backend=fast_backend
        )
    )
    num_kept = 2 * 7 * (4 * 3 if k == 3 else sum(k))
    expected = [("torch.float32", num_kept), ("torch.int32", num_kept)]
    expected += [("torch.int64", 1)] if dropout_p else []  # the seed
    assert dtypes_and_sizes(new_tensors(saved, query, key, value)) == expected


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_attention_over_all_keys_saves_its_inputs_its_output_and_one_float_a_query(dropout_p):
    query, key, value = (torch.randn(2, 4, n, 16, requires_grad=True) for n in (7, 11, 11))
    mask, bias = torch.rand(2, 1, 7, 11) < 0.8, torch.randn(4, 7, 11, requires_grad=True)
    saved = saved_for_backward(
        lambda: topk_attention(
            query, key, value, k=None, attn_mask=mask, bias=bias, dropout_p=dropout_p, backend="chunked"
        )
    )
    expected = [("torch.float32", 2 * 4 * 7), ("torch.float32", 2 * 4 * 7 * 16)]
    expected += [("torch.int64", 1)] if dropout_p else []
    assert dtypes_and_sizes(new_tensors(saved, query, key, value, mask, bias)) == expected


@pytest.mark.usefixtures("kernels")
def test_the_cpu_backend_saves_an_index_and_a_weight_for_each_key_where_all_are_kept():
    query, key, value = (torch.randn(2, 4, n, 16, requires_grad=True) for n in (7, 11, 11))
    saved = saved_for_backward(lambda: topk_attention(query, key, value, k=11, backend="cpu"))
    num_kept = 2 * 4 * 7 * 11
    assert dtypes_and_sizes(new_tensors(saved, query, key, value)) == [
        ("torch.float32", num_kept),
        ("torch.int32", num_kept),
    ]


@pytest.mark.usefixtures("kernels")
def test_the_cpu_backend_saves_nothing_when_nothing_needs_a_gradient():
    tensors = [torch.randn(2, 4, n, 16) for n in (7, 11, 11)]
    forward = torch.ops.topk_attention.cpu_attention_forward
    _, indices, weights, _ = forward(*tensors, *[None] * 5, [3] * 4, False, 0.25, 0.0, 0.0, False)
    assert indices.numel() == weights.numel() == 0


def test_nothing_is_saved_when_nothing_needs_a_gradient():
    tensors = [torch.randn(2, 4, n, 16) for n in (7, 11, 11)]
    attention = importlib.import_module("topk_attention.backends.chunked.attention")
    _, indices, weights, _ = attention.topk_attention_op(
        *tensors, *[None] * 5, [3] * 4, False, 0.25, 0.0, 0.0, None, False
    )
    assert indices.numel() == weights.numel() == 0


@pytest.mark.parametrize("is_gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("k", [5, None])
def test_feed_forward_saves_its_inputs_and_for_each_kept_neuron_an_index_and_its_pre_activations(
    fast_backend, is_gated, k
):
    tensors = [torch.randn(*shape, requires_grad=True) for shape in ((13, 8), (32, 8), (6, 32))]
    names = {"b_in": torch.randn(32, requires_grad=True), "b_out": torch.randn(6, requires_grad=True)}
    if is_gated:
        names |= {"w_gate": torch.randn(32, 8, requires_grad=True), "b_gate": torch.randn(32, requires_grad=True)}
    saved = saved_for_backward(
        lambda: topk_feed_forward(*tensors, k=k, **names, activation="silu", backend=fast_backend)
    )
    floats = [("torch.float32", 13 * 5)] * (2 if is_gated else 1)
    expected = [] if k is None else [*floats, ("torch.int32", 13 * 5)]
    assert dtypes_and_sizes(new_tensors(saved, *tensors, *names.values())) == expected
