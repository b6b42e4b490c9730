"""Compiled calls, without a graph break, do what eager ones do."""

import subprocess
import sys

import pytest
import torch
from comparison import SIZES, Sizes, assert_same, attention_inputs, named_call, output_and_gradients

from topk_attention import topk_attention, topk_feed_forward

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
    ["plain", "causal", "padding_mask", "k_per_head", "dense_bias", "relative_bias", "bucketed_bias", "alibi"],
)
def test_compiled_attention_equals_eager_attention(name, options):
    call = named_call(name)
    assert_compiled_equals_eager(lambda *tensors: call(*tensors, backend="chunked", **options), *call.tensors)


@pytest.mark.parametrize("options", [{}, {"k": None}], ids=["some", "all"])
def test_compiled_attention_of_several_things_at_once_equals_eager_attention(options):
    call = named_call("everything_at_once")
    assert_compiled_equals_eager(
        lambda *tensors: 2 * call(*(x.sin() for x in tensors), backend="chunked", query_chunk_size=3, **options).cos(),
        *call.tensors,
    )


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
def test_compiled_dropout_draws_the_mask_of_an_equal_seed(k):
    inputs = attention_inputs()

    def attend(query, key, value):
        return topk_attention(query, key, value, k=k, dropout_p=0.4, backend="chunked")

    torch.manual_seed(1)
    expected = output_and_gradients(attend, *inputs)
    torch.manual_seed(1)
    assert_same(output_and_gradients(compiled(attend), *inputs), expected)


def test_a_compiled_call_returns_the_selection():
    inputs = attention_inputs()

    def select(query, key, value):
        return topk_attention(query, key, value, k=[1, 2, 3, 4], backend="chunked", return_selection=True)

    output, selection = select(*inputs)
    compiled_output, compiled_selection = compiled(select)(*inputs)
    assert_same([compiled_output], [output])
    assert torch.equal(compiled_selection.indices, selection.indices)
    assert_same([compiled_selection.weights], [selection.weights])


@pytest.mark.parametrize("k", [3, None])
def test_one_compiled_function_serves_several_lengths(k):
    attend = compiled(lambda q, key, v: topk_attention(q, key, v, k=k, is_causal=True, backend="chunked"), dynamic=True)
    for queries, keys in ((7, 11), (5, 13), (9, 9)):
        inputs = attention_inputs(SIZES._replace(queries=queries, keys=keys))
        expected = output_and_gradients(
            lambda q, key, v: topk_attention(q, key, v, k=k, is_causal=True, backend="chunked"), *inputs
        )
        assert_same(output_and_gradients(attend, *inputs), expected)


EXPORT_FIRST = """
import torch
from topk_attention import topk_attention, topk_feed_forward

class Layer(torch.nn.Module):
    def forward(self, x, weight):
        x = topk_attention(x, x, x, k=3, is_causal=True, backend="chunked")
        return topk_feed_forward(x, weight, weight.t(), k=4, backend="chunked")

inputs = torch.randn(1, 2, 5, 4), torch.randn(9, 4)
exported = torch.export.export(Layer(), inputs).module()
assert torch.equal(exported(*inputs), Layer()(*inputs))
"""


def test_an_export_may_be_the_first_use_in_a_process():
    run = subprocess.run([sys.executable, "-c", EXPORT_FIRST], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_inductor_compiles_forward_and_backward():
    inputs = attention_inputs(Sizes(batch=1, heads=2, key_heads=2, queries=5, keys=6, head_dim=4, value_dim=4))

    def layer(query, key, value):
        return 2 * topk_attention(query, key, value, k=3, is_causal=True, backend="chunked")

    assert_compiled_equals_eager(layer, *inputs, compiler="inductor")
