"""What every method promises."""

import pytest
import torch

from topk_attention.backends import choose_backend
from topk_experiments.rivals import METHODS, new_attention

EXACT = ["vanilla", "vanilla-chunks", "sdpa", "query-chunks"]
DENSE = ["vanilla", "vanilla-chunks", "sdpa"]
RANDOM = ["performer", "rfa"]
CHUNK = 4  # several chunks, and a last one that is cut short


def new(name, **options):
    return new_attention(name, head_dim=6, k=3, num_features=16, query_chunk_size=CHUNK, **options)


def inputs(num_queries=11, num_keys=11, dtype=torch.float64, batch=2):
    query = torch.randn(batch, 3, num_queries, 6, dtype=dtype)
    key = torch.randn(batch, 3, num_keys, 6, dtype=dtype)
    return query, key, torch.randn(batch, 3, num_keys, 5, dtype=dtype)


def padding(num_keys=11):
    mask = torch.rand(2, num_keys) > 0.4
    mask[0, 0] = mask[1, -1] = True
    mask[0, 1:4] = False
    return mask


def dense(query, key, value, key_mask=None, is_causal=False):
    visible = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool)
    visible = visible.tril(key.shape[2] - query.shape[2]) if is_causal else visible
    visible = visible if key_mask is None else visible & key_mask[:, None, None, :]
    scores = (query @ key.mT / query.shape[-1] ** 0.5).masked_fill(~visible, -torch.inf)
    return scores.softmax(-1).nan_to_num(0) @ value


LENGTHS = [(11, 11), (3, 11), (11, 3), (1, 1), (12, 8)]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("name", EXACT)
def test_exact_methods_equal_attention_written_out(name, is_padded, is_causal, lengths):
    query, key, value = inputs(*lengths)
    mask = padding(lengths[1]) if is_padded else None
    output = new(name)(query, key, value, key_mask=mask, is_causal=is_causal)
    torch.testing.assert_close(output, dense(query, key, value, mask, is_causal))


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("name", ["topk", "topk-completed", *RANDOM])
def test_causal_attention_is_attention_to_each_prefix(name, is_padded, lengths):
    query, key, value = inputs(*lengths)
    mask = padding(lengths[1]) if is_padded else None
    attention = new(name)
    output = attention(query, key, value, key_mask=mask, is_causal=True)
    for row in range(query.shape[2]):
        stop = row + 1 + key.shape[2] - query.shape[2]
        if stop < 1:
            assert not output[:, :, row].any()
            continue
        prefix = (query[:, :, row : row + 1], key[:, :, :stop], value[:, :, :stop])
        expected = attention(*prefix, key_mask=None if mask is None else mask[:, :stop])
        torch.testing.assert_close(output[:, :, row : row + 1], expected)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", RANDOM)
def test_the_chunk_size_decides_nothing_but_memory(name, is_causal):
    tensors = inputs(11, 13)
    attention = new(name)
    expected = attention(*tensors, is_causal=is_causal)
    for size in (1, 2, 10, 11, 100):
        attention.chunk_size = size
        torch.testing.assert_close(attention(*tensors, is_causal=is_causal), expected)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("garbage", [7.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", [name for name in METHODS if name not in DENSE])
def test_masked_keys_never_matter(name, garbage, is_causal):
    query, key, value = inputs()
    mask = padding()
    attention = new(name)
    hidden = ~mask[:, None, :, None]

    def output_and_gradients(key, value):
        tensors = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
        output = attention(*tensors, key_mask=mask, is_causal=is_causal)
        output.square().sum().backward()
        return output, *(tensor.grad for tensor in tensors)

    expected = output_and_gradients(key, value)
    result = output_and_gradients(key.masked_fill(hidden, garbage), value.masked_fill(hidden, garbage))
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", DENSE)
def test_masked_keys_never_matter_to_dense_methods_where_they_are_finite(name, is_causal):
    query, key, value = inputs()
    mask = padding()
    hidden = ~mask[:, None, :, None]
    expected = new(name)(query, key, value, key_mask=mask, is_causal=is_causal)
    changed = new(name)(
        query, key.masked_fill(hidden, 7), value.masked_fill(hidden, 7), key_mask=mask, is_causal=is_causal
    )
    torch.testing.assert_close(changed, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_queries_without_keys_return_zeros_and_have_zero_gradient(name, is_causal):
    tensors = [tensor.requires_grad_() for tensor in inputs()]
    mask = padding()
    mask[0] = False
    output = new(name)(*tensors, key_mask=mask, is_causal=is_causal)
    assert not output[0].any()
    assert output[1].any()
    output.sum().backward()
    for tensor in tensors:
        assert not tensor.grad[0].any()
        assert tensor.grad[1].isfinite().all()


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", ["performer", "rfa", "rfa unnormalised", "vanilla", "vanilla-chunks"])
def test_gradients_are_those_of_the_output(name, is_causal, is_padded):
    # Without its bound on the denominator, which is not smooth.
    options = {"normalize": False, "num_heads": 3, "smallest_share": 1e-9} if name.endswith("unnormalised") else {}
    attention = new(name.split()[0], **options).double()
    tensors = [(0.3 * tensor).requires_grad_() for tensor in inputs(6, 6)]
    mask = padding(6) if is_padded else None
    parameters = list(attention.parameters())

    def attend(query, key, value, *_):
        return attention(query, key, value, key_mask=mask, is_causal=is_causal)

    assert torch.autograd.gradcheck(attend, (*tensors, *parameters))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", METHODS)
def test_the_output_has_the_dtype_of_the_query_and_is_as_exact_as_that(name, dtype):
    exact = inputs(9, 9)
    rounded = [tensor.to(dtype) for tensor in exact]
    attention = new(name)
    torch.manual_seed(1)
    output = attention(*rounded, is_causal=True)
    assert output.dtype == dtype
    expected = attention(*(tensor.double() for tensor in rounded), is_causal=True)
    # Scores of dense methods are rounded to the dtype too.
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=10 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", RANDOM)
def test_autocast_leaves_features_in_float32(name):
    tensors = inputs(dtype=torch.float32)
    attention = new(name)
    expected = attention(*tensors, is_causal=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = attention(*tensors, is_causal=True)
    assert torch.equal(output, expected)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in RANDOM])
def test_dropout_drops_weights_and_keeps_their_mean(name):
    torch.manual_seed(0)
    query, key, value = torch.zeros(1, 1, 4000, 6), torch.zeros(1, 1, 3, 6), torch.eye(3)[None, None]
    output = new(name)(query, key, value, dropout_p=0.25)[0, 0]  # the weights themselves
    dropped = output == 0
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.02)
    torch.testing.assert_close(output[~dropped], torch.full_like(output[~dropped], 1 / 3 / 0.75))


def test_chunks_of_queries_drop_the_same_weights_when_they_are_computed_again(monkeypatch):
    def gradients():
        torch.manual_seed(5)
        tensors = [tensor.requires_grad_() for tensor in inputs()]
        new("vanilla-chunks")(*tensors, is_causal=True, dropout_p=0.3).square().sum().backward()
        return [tensor.grad for tensor in tensors]

    again = gradients()
    monkeypatch.setattr("topk_experiments.rivals.dense.checkpoint", lambda function, *tensors, **_: function(*tensors))
    torch.testing.assert_close(again, gradients())


@pytest.mark.parametrize("name", RANDOM)
def test_random_features_have_no_weights_to_drop(name):
    with pytest.raises(ValueError, match=r"dropout_p must be 0 for .*, which never forms attention weights"):
        new(name)(*inputs(), dropout_p=0.1)


@pytest.mark.parametrize("name", RANDOM)
def test_a_checkpoint_holds_the_random_directions(name):
    first, second = new(name), new(name)
    tensors = inputs()
    assert not torch.equal(first(*tensors), second(*tensors))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(*tensors), second(*tensors))


@pytest.mark.parametrize("name", RANDOM)
def test_directions_change_on_redraw_alone(name):
    attention = new(name)
    before = attention.directions.clone()
    attention.train()(*inputs())
    assert torch.equal(attention.directions, before)
    torch.manual_seed(5)
    attention.redraw()
    after = attention.directions.clone()
    assert (after != before).all()
    torch.manual_seed(5)
    attention.redraw()
    assert torch.equal(attention.directions, after)


def test_topk_is_the_library_with_its_k_on_the_backend_it_chooses():
    query, key, value = inputs()
    kept = (query @ key.mT).topk(3).indices
    visible = torch.zeros(2, 3, 11, 11, dtype=torch.bool).scatter(-1, kept, True)
    scores = (query @ key.mT / 6**0.5).masked_fill(~visible, -torch.inf)
    torch.testing.assert_close(new("topk")(query, key, value), scores.softmax(-1) @ value)
    assert new("topk").backend == "auto"
    assert new("query-chunks").backend == "chunked"
    choose_backend(new("topk", backend="reference").backend)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "linformer"}, "name must be one of \"topk\", .*, got 'linformer'"),
        ({"name": "topk"}, 'k must be a whole number for name="topk", got None; every key is name="query-chunks"'),
        ({"name": "topk", "k": 0}, "k must be at least 1"),
        ({"name": "query-chunks", "query_chunk_size": 0}, "query_chunk_size must be at least 1"),
        ({"name": "vanilla-chunks", "query_chunk_size": -1}, "query_chunk_size must be at least 1"),
        ({"name": "performer", "num_features": 0}, "num_features must be at least 1"),
        ({"name": "performer", "query_chunk_size": 0}, "query_chunk_size must be at least 1"),
        ({"name": "rfa", "num_features": 7}, "num_features must be even, half sines and half cosines, got 7"),
        ({"name": "rfa", "sigma": 0.0}, r"sigma must be above 0, got 0\.0"),
        ({"name": "rfa", "smallest_share": 0.0}, r"smallest_share must be above 0, got 0\.0"),
    ],
)
def test_what_cannot_be_made_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        new_attention(**{"head_dim": 6, **options})


@pytest.mark.parametrize("is_causal", [False, True])
def test_chunks_give_the_same_without_gradients(is_causal):
    attention, tensors = new("vanilla-chunks"), inputs(num_queries=11, num_keys=13)
    expected = attention(*(tensor.requires_grad_() for tensor in tensors), is_causal=is_causal)
    with torch.no_grad():
        assert torch.equal(attention(*tensors, is_causal=is_causal), expected)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"query": torch.zeros(3, 11, 6)}, ValueError, r"query must have shape \[batch, heads, length, size\], got"),
        ({"key": torch.zeros(2, 2, 11, 6)}, ValueError, r"key must have shape \[2, 3, M, 6\] to match query, got"),
        ({"value": torch.zeros(2, 3, 9, 5)}, ValueError, r"value must have shape \[2, 3, 11, E\] to match key, got"),
        ({"value": torch.zeros(2, 3, 11, 5).double()}, ValueError, "value must have dtype torch.float32 like query"),
        ({"key_mask": torch.ones(2, 11)}, TypeError, r"key_mask must be a bool tensor .*, got torch.float32"),
        ({"key_mask": [True]}, TypeError, "key_mask must be a bool tensor .*, got list"),
        ({"key_mask": torch.ones(11).bool()}, ValueError, r"key_mask must have shape \[2, 11\], got \[11\]"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p must be at least 0 and below 1, got 1\.0"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, error, words):
    query, key, value = inputs(dtype=torch.float32)
    arguments = {"query": query, "key": key, "value": value} | change
    with pytest.raises(error, match=words):
        new("vanilla")(**arguments)


def test_heads_with_directions_of_their_own_fit_that_many_heads_alone():
    with pytest.raises(ValueError, match="query must have 4 heads like this module, got 3"):
        new("rfa", num_heads=4)(*inputs())
