"""Compiled calls, without a graph break, do what eager ones do."""

import subprocess
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from comparison import COMPLETED_NAMES, SIZES, Sizes, assert_same, attention_inputs, named_call, output_and_gradients
from topk_attention import RelativeBias, topk_attention, topk_feed_forward

pytestmark = [
    # torch's own: importing its compiler, and compiling, use what newer torch calls deprecated.
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.*treespec.*LeafSpec.*:FutureWarning"),
]


@pytest.fixture(autouse=True)
def _forget_compiled_code():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(function, compiler="aot_eager", **options):
    return torch.compile(function, fullgraph=True, backend=compiler, **options)


def assert_compiled_equals_eager(function, *tensors, compiler="aot_eager"):
    expected = output_and_gradients(function, *tensors)
    assert_same(output_and_gradients(compiled(function, compiler), *tensors), expected)


@pytest.mark.parametrize("options", [{}, {"k": None}], ids=["some", "all"])
@pytest.mark.parametrize(
    "name",
    [
        *("plain", "causal", "padding_mask", "k_per_head", "dense_bias", "relative_bias", "bucketed_bias", "alibi"),
        *("sinks", "soft_cap"),
        *COMPLETED_NAMES,
    ],
)
def test_compiled_attention_equals_eager_attention(fast_backend, name, options):
    call = named_call(name)
    assert_compiled_equals_eager(lambda *tensors: call(*tensors, backend=fast_backend, **options), *call.tensors)


@pytest.mark.parametrize("options", [{}, {"k": None}], ids=["some", "all"])
def test_compiled_attention_of_several_things_at_once_equals_eager_attention(fast_backend, options):
    call = named_call("everything_at_once")
    assert_compiled_equals_eager(
        lambda *tensors: (
            2 * call(*(x.sin() for x in tensors), backend=fast_backend, query_chunk_size=3, **options).cos()
        ),
        *call.tensors,
    )


@pytest.mark.parametrize("num_queries", [1, 7, 11])
@pytest.mark.parametrize("name", ["plain", "causal", "padding_mask", "bool_mask", "grouped_query_heads", "alibi"])
def test_compiled_full_attention_equals_eager_attention(name, num_queries):
    call = named_call(name, SIZES._replace(queries=num_queries, value_dim=3), smallest_gap=0)
    assert_compiled_equals_eager(lambda *tensors: call(*tensors, k=None), *call.tensors)


@pytest.mark.parametrize("num_queries", [1, 11])
def test_a_hidden_nan_does_not_spread_in_compiled_full_attention(num_queries):
    query, key, value = attention_inputs(SIZES._replace(queries=num_queries, value_dim=3))
    mask = torch.arange(SIZES.keys) != 4

    @compiled
    def attend(query, key, value):
        return topk_attention(query, key, value, k=None, attn_mask=mask, is_causal=True)

    expected = output_and_gradients(attend, query, key, value)
    for tensor in (key, value):
        tensor[:, :, 4] = torch.nan
    assert_same(output_and_gradients(attend, query, key, value), expected)


@pytest.mark.parametrize("k", [4, None])
@pytest.mark.parametrize("is_gated", [False, True], ids=["plain", "gated"])
def test_compiled_feed_forward_equals_eager_feed_forward(is_gated, k):
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in ((2, 7, 5), (11, 5), (3, 11), (11,), (3,))]
    if is_gated:
        tensors += [torch.randn(11, 5, dtype=torch.float64), torch.randn(11, dtype=torch.float64)]

    def layer(x, w_in, w_out, b_in, b_out, w_gate=None, b_gate=None):
        biases = {"b_in": b_in, "b_out": b_out, "b_gate": b_gate}
        return topk_feed_forward(x, w_in, w_out, k=k, w_gate=w_gate, activation="gelu", backend="chunked", **biases)

    assert_compiled_equals_eager(layer, *tensors)


@pytest.mark.parametrize("k", [3, None])
def test_compiled_dropout_draws_the_mask_of_an_equal_seed(fast_backend, k):
    inputs = attention_inputs()

    def attend(query, key, value):
        return topk_attention(query, key, value, k=k, dropout_p=0.4, backend=fast_backend)

    torch.manual_seed(1)
    expected = output_and_gradients(attend, *inputs)
    torch.manual_seed(1)
    assert_same(output_and_gradients(compiled(attend), *inputs), expected)


def test_a_compiled_call_returns_the_selection(fast_backend):
    inputs = attention_inputs()

    def select(query, key, value):
        return topk_attention(query, key, value, k=[1, 2, 3, 4], backend=fast_backend, return_selection=True)

    output, selection = select(*inputs)
    compiled_output, compiled_selection = compiled(select)(*inputs)
    assert_same([compiled_output], [output])
    assert torch.equal(compiled_selection.indices, selection.indices)
    assert_same([compiled_selection.weights], [selection.weights])


@pytest.mark.parametrize(
    ("backend", "kind", "k"),
    [
        *((backend, "no bias", k) for backend in ("auto", "cpu", "chunked") for k in (3, None)),
        *(("cpu", kind, k) for kind, k in (("dense", 3), ("relative", 3), ("relative", 10**6))),
    ],
    indirect=["backend"],
)
def test_one_compiled_function_serves_several_lengths(backend, kind, k):
    def attend(query, key, value, *source):
        bias = RelativeBias(*source) if kind == "relative" else next(iter(source), None)
        return topk_attention(query, key, value, k=k, bias=bias, is_causal=True, backend=backend)

    counter = CompileCounterWithBackend("aot_eager")
    compiled_attend = compiled(attend, counter, dynamic=True)
    for queries, keys in ((7, 11), (5, 13), (9, 15), (8, 20), (6, 17)):
        inputs = attention_inputs(SIZES._replace(queries=queries, keys=keys))
        shape = {"no bias": None, "dense": (4, queries, keys), "relative": (4, queries + keys - 1)}[kind]
        source = [] if shape is None else [torch.randn(shape, dtype=torch.float64)]
        expected = output_and_gradients(attend, *inputs, *source)
        assert_same(output_and_gradients(compiled_attend, *inputs, *source), expected)
    assert counter.frame_count <= 2  # torch may take the first lengths for fixed ones


EXPORT_FIRST = """
import torch
from topk_attention import topk_attention, topk_feed_forward

class Layer(torch.nn.Module):
    def forward(self, x, weight):
        x = topk_attention(x, x, x, k=3, is_causal=True, backend="BACKEND")
        return topk_feed_forward(x, weight, weight.t(), k=4, backend="chunked")

inputs = torch.randn(1, 2, 5, 4), torch.randn(9, 4)
exported = torch.export.export(Layer(), inputs).module()
assert torch.equal(exported(*inputs), Layer()(*inputs))
"""


def test_an_export_may_be_the_first_use_in_a_process(fast_backend):
    code = EXPORT_FIRST.replace("BACKEND", fast_backend)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_inductor_compiles_forward_and_backward(fast_backend):
    inputs = attention_inputs(Sizes(batch=1, heads=2, key_heads=2, queries=5, keys=6, head_dim=4, value_dim=4))

    def layer(query, key, value):
        return 2 * topk_attention(query, key, value, k=3, is_causal=True, backend=fast_backend)

    assert_compiled_equals_eager(layer, *inputs, compiler="inductor")
