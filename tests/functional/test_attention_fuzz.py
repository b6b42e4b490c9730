"""Random calls with exact scores and many ties: every backend does what the reference does."""

import math
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from comparison import assert_same, output_and_gradients
from topk_attention import ALiBi, BucketedBias, RelativeBias, topk_attention
from topk_attention.backends import cpu
from topk_attention.backends.chunked import tiles

FAST_BACKENDS = ["chunked"] if cpu.problem() else ["chunked", "cpu"]


class RandomCall(NamedTuple):
    tensors: tuple[torch.Tensor, ...]
    make_bias: Any
    options: dict[str, Any]
    tile_sizes: dict[str, int]


@st.composite
def integer_tensors(draw, shape, smallest=-2, largest=2):
    """Small integers in float64, in storage of any layout."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randint(smallest, largest + 1, shape, generator=generator).double()
    match draw(st.sampled_from(["contiguous", "permuted", "sliced", "expanded"] if shape else ["contiguous"])):
        case "permuted":
            order = draw(st.permutations(range(len(shape))))
            back = [order.index(axis) for axis in range(len(shape))]
            return x.permute(order).contiguous().permute(back)
        case "sliced":
            axis = draw(st.integers(0, len(shape) - 1))
            spread = torch.full([2 * n if a == axis else n for a, n in enumerate(shape)], math.nan).double()
            view = spread[tuple(slice(None, None, 2) if a == axis else slice(None) for a in range(len(shape)))]
            view.copy_(x)
            return view
        case "expanded":
            axis = draw(st.integers(0, len(shape) - 1))
            return x.narrow(axis, 0, min(1, shape[axis])).expand(shape)
    return x


@st.composite
def broadcastable(draw, shape):
    kept = draw(st.lists(st.booleans(), min_size=4, max_size=4))
    first = draw(st.integers(0, 4)) if not any(kept) else kept.index(True)
    return tuple(size if keep else 1 for size, keep in zip(shape, kept, strict=True))[first:]


@st.composite
def masks(draw, shape):
    shape = draw(broadcastable(shape))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    visible = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.2, 0.6, 0.9, 1.0]))
    if draw(st.booleans()):
        return visible
    return torch.randint(-1, 2, shape, generator=generator).double().masked_fill(~visible, -math.inf)


@st.composite
def biases(draw, shape):
    """The tensor that a bias is made from, and the function that makes it."""
    _, heads, queries, keys = shape
    heads = draw(st.sampled_from([1, heads]))
    kind = draw(st.sampled_from(["none", "dense", "relative", "bucketed", "one-way bucketed", "alibi"]))
    match kind:
        case "dense":
            return draw(integer_tensors(draw(broadcastable(shape)))), lambda source: source
        case "relative":
            return draw(integer_tensors((heads, queries + keys - 1))), RelativeBias
        case "bucketed":
            return draw(integer_tensors((8, heads))), lambda table: BucketedBias(table, max_distance=5)
        case "one-way bucketed":
            table = draw(integer_tensors((5, heads)))
            return table, lambda table: BucketedBias(table, bidirectional=False, max_distance=6)
        case "alibi":
            return draw(integer_tensors((heads,))), ALiBi
    return None, None


@st.composite
def calls(draw):
    batch, queries = draw(st.integers(0, 3)), draw(st.integers(1, 9))
    key_heads, keys = draw(st.integers(1, 3)), draw(st.one_of(st.integers(1, 12), st.integers(24, 60)))
    heads = key_heads * draw(st.integers(1, 3))
    head_dim, value_dim = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    shape = (batch, heads, queries, keys)
    tensors = (
        draw(integer_tensors((batch, heads, queries, head_dim))),
        draw(integer_tensors((batch, key_heads, keys, head_dim))),
        draw(integer_tensors((batch, key_heads, keys, value_dim))),
    )
    source, make_bias = draw(biases(shape))
    some_k = st.one_of(st.integers(1, 3), st.integers(1, keys + 2))
    options = {
        "k": draw(st.one_of(some_k, st.lists(some_k, min_size=heads, max_size=heads), st.none())),
        "attn_mask": draw(st.one_of(st.none(), masks(shape))),
        "is_causal": draw(st.booleans()),
        "scale": draw(st.sampled_from([1.0, 0.5, -0.25, 0.0])),
        "dropout_p": draw(st.sampled_from([0.0, 0.0, 0.4])),
        "enable_gqa": key_heads != heads,
        "query_chunk_size": draw(st.one_of(st.none(), st.integers(1, queries + 1))),
    }
    tile_sizes = {
        "TILE_BYTES": draw(st.sampled_from([8, 100, 1000, 10**6])),
        "_KEY_BLOCK_PER_K": draw(st.sampled_from([1, 2, 8])),
        "_QUERY_CHUNK_BEFORE_KEYS_ARE_BLOCKED": draw(st.sampled_from([1, 3, 128])),
    }
    return RandomCall(tensors if source is None else (*tensors, source), make_bias, options, tile_sizes)


@given(call=calls())
def test_any_call_gives_the_output_the_selection_and_the_gradients_of_the_reference(call):
    def run(backend):
        selections = []

        def attend(query, key, value, *source):
            torch.manual_seed(0)
            bias = call.make_bias(*source) if source else None
            output, selection = topk_attention(
                query, key, value, bias=bias, backend=backend, return_selection=True, **call.options
            )
            selections.append(selection)
            return output

        return output_and_gradients(attend, *call.tensors), selections[0]

    def run_without_selection(backend):
        def attend(query, key, value, *source):
            torch.manual_seed(0)
            bias = call.make_bias(*source) if source else None
            return topk_attention(query, key, value, bias=bias, backend=backend, **call.options)

        return output_and_gradients(attend, *call.tensors)

    expected, expected_selection = run("reference")
    with pytest.MonkeyPatch.context() as patch:
        for name, size in call.tile_sizes.items():
            patch.setattr(tiles, name, size)
        for backend in FAST_BACKENDS:
            actual, selection = run(backend)
            assert torch.equal(selection.indices, expected_selection.indices)
            assert_same([selection.weights], [expected_selection.weights])
            assert_same(actual, expected)
            assert_same(run_without_selection(backend), expected)
