"""Gradients are exact, repeatable and only where they are asked for."""

import itertools

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from comparison import CALL_NAMES, SIZES, TINY, assert_same, attention_inputs, named_call, output_and_gradients
from topk_attention import Completion, topk_attention

K_OR_NONE = pytest.mark.parametrize("options", [{}, {"k": None}], ids=["some", "all"])


@K_OR_NONE
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("name", CALL_NAMES)
def test_gradients_match_finite_differences(backend, small_tiles, name, dropout_p, options):
    call = named_call(name, TINY, smallest_gap=1e-3)

    def function(*tensors):
        torch.manual_seed(3)  # each evaluation draws the same dropout
        return call(*tensors, dropout_p=dropout_p, query_chunk_size=2, backend=backend, **options)

    # The fast mode checks one random direction. Without dropout that will do: other tests compare with a dense matrix.
    # With dropout it will do for the fast backends: others compare them with the reference, the same draw in both.
    fast_mode = dropout_p == 0 or backend != "reference"
    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in call.tensors], fast_mode=fast_mode)


@K_OR_NONE
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("name", ["plain", "everything_at_once", "relative_bias"])
def test_a_second_backward_pass_over_one_graph_gives_equal_gradients(backend, tiling, name, dropout_p, options):
    call = named_call(name)
    inputs = [x.requires_grad_() for x in call.tensors]
    output = call(*inputs, dropout_p=dropout_p, query_chunk_size=3, backend=backend, **options)
    grad_output = torch.randn_like(output)
    first = torch.autograd.grad(output, inputs, grad_output, retain_graph=True)
    second = torch.autograd.grad(output, inputs, grad_output)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class Attention(nn.Module):
    def __init__(self, backend, k):
        super().__init__()
        self.to_query, self.to_key = (nn.Linear(3, 3, dtype=torch.float64) for _ in range(2))
        self.options = {"backend": backend, "k": k, "query_chunk_size": 2}

    def forward(self, x):
        dropout_p = 0.5 if self.training else 0.0
        return topk_attention(self.to_query(x), self.to_key(x), x, dropout_p=dropout_p, **self.options)


@pytest.mark.parametrize("k", [3, None])
def test_backward_after_eval_is_that_of_the_training_forward(backend, tiling, k):
    layer, x = Attention(backend, k), torch.randn(1, 2, 7, 3, dtype=torch.float64)

    def gradients(call_eval):
        layer.train()
        torch.manual_seed(5)
        output = layer(x)
        if call_eval:
            layer.eval()
            layer(x)
        return torch.autograd.grad(output.sum(), list(layer.parameters()))

    assert_same(gradients(call_eval=True), gradients(call_eval=False))


@K_OR_NONE
@pytest.mark.parametrize("name", ["everything_at_once", "relative_bias"])
def test_each_input_alone_may_require_a_gradient(backend, tiling, name, options):
    call = named_call(name)
    _, *expected = call.run(backend=backend, **options)
    for wanted in itertools.chain(itertools.combinations(range(4), 1), itertools.combinations(range(4), 2)):
        tensors = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(call.tensors)]
        output = call(*tensors, backend=backend, **options)
        grad_output = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        output.backward(grad_output)
        assert_same([tensors[i].grad for i in wanted], [expected[i] for i in wanted])
        assert all(x.grad is None for i, x in enumerate(tensors) if i not in wanted)


BACKWARD_OPERATORS = {
    "topk_attention::cpu_attention_backward",
    "topk_attention::chunked_topk_attention_backward",
    "topk_attention::chunked_full_attention_backward",
}


class ComputedGradients(TorchDispatchMode):
    """Records what the backward operators return for query, key, value and the biases."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        if operator.name().removesuffix(".default") in BACKWARD_OPERATORS:
            self.are_there = [gradient.numel() > 0 for gradient in result]
        return result


@K_OR_NONE
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("wanted", [inputs for n in (1, 2, 3) for inputs in itertools.combinations(range(4), n)])
def test_gradients_of_frozen_inputs_are_not_computed_and_the_others_keep_every_bit(
    fast_backend, tiling, wanted, dropout_p, options
):
    for name in ("everything_at_once", "relative_bias"):
        call = named_call(name)
        torch.manual_seed(3)
        _, *expected = call.run(dropout_p=dropout_p, backend=fast_backend, **options)
        torch.manual_seed(3)
        tensors = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(call.tensors)]
        output = call(*tensors, dropout_p=dropout_p, backend=fast_backend, **options)
        grad_output = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        with ComputedGradients() as computed:
            output.backward(grad_output)
        assert all(torch.equal(tensors[i].grad, expected[i]) for i in wanted)
        position = 3 if name == "everything_at_once" else 4  # of the bias
        assert {i for i, is_there in enumerate(computed.are_there) if is_there} == {
            position if i == 3 else i for i in wanted
        }


@pytest.mark.parametrize("k", [3, None])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_output_is_the_same(backend, tiling, context, k):
    inputs = attention_inputs()
    expected = topk_attention(*(x.requires_grad_() for x in inputs), k=k, backend=backend)
    assert expected.requires_grad
    with context():
        output = topk_attention(*inputs, k=k, backend=backend)
    assert not output.requires_grad
    assert torch.equal(output, expected)


@pytest.mark.parametrize("k", [3, None])
def test_the_gradient_of_the_output_may_have_any_strides(backend, tiling, k):
    inputs = [x.requires_grad_() for x in attention_inputs()]
    output = topk_attention(*inputs, k=k, backend=backend)
    shape = output.shape
    for grad_output in (
        torch.tensor(1.5, dtype=torch.float64).expand(shape),
        torch.randn(shape[0], 1, shape[2], 1, dtype=torch.float64).expand(shape),
        torch.randn(shape[::-1], dtype=torch.float64).permute(3, 2, 1, 0),
    ):
        assert not grad_output.is_contiguous()
        actual = torch.autograd.grad(output, inputs, grad_output, retain_graph=True)
        assert_same(actual, torch.autograd.grad(output, inputs, grad_output.contiguous(), retain_graph=True))


@K_OR_NONE
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("name", ["everything_at_once", "relative_bias"])
def test_activation_checkpointing_changes_no_gradient(backend, tiling, name, dropout_p, options):
    call = named_call(name)

    def attend(*tensors):
        return call(*tensors, dropout_p=dropout_p, backend=backend, **options)

    torch.manual_seed(1)
    expected = output_and_gradients(attend, *call.tensors)
    torch.manual_seed(1)
    assert_same(output_and_gradients(lambda *x: checkpoint(attend, *x, use_reentrant=False), *call.tensors), expected)


@pytest.mark.parametrize("k", [3, None])
def test_one_tensor_may_be_query_key_and_value(backend, tiling, k):
    _, x, _ = attention_inputs()
    (together,) = output_and_gradients(lambda x: topk_attention(x, x, x, k=k, backend=backend), x)[1:]
    _, *parts = output_and_gradients(lambda q, key, v: topk_attention(q, key, v, k=k, backend=backend), x, x, x)
    assert_same([together], [sum(parts)])


@pytest.mark.parametrize("completion", [None, Completion()], ids=["alone", "completed"])
@pytest.mark.parametrize("k", [3, None])
def test_a_gradient_of_the_gradient_is_refused_in_words(fast_backend, k, completion):
    query, key, value = (x.requires_grad_() for x in attention_inputs())
    output = topk_attention(query, key, value, k=k, completion=completion, backend=fast_backend)
    (grad_query,) = torch.autograd.grad(output.sum(), query, create_graph=True)
    words = 'the backward pass of topk_attention cannot be differentiated again; backend="reference" can be'
    with pytest.raises(RuntimeError, match=words):
        torch.autograd.grad(grad_query.sum(), key, retain_graph=True)
    with pytest.raises(RuntimeError, match=words):
        grad_query.sum().backward()


# "auto" has PyTorch's own attention compute full attention in these sizes.
PYTORCHS = SIZES._replace(queries=SIZES.keys, value_dim=SIZES.head_dim)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"attn_mask": torch.ones(1, SIZES.keys) > 0}], ids=str)
def test_a_gradient_of_the_gradient_is_refused_in_words_where_pytorch_attends(options):
    query, key, value = (x.float().requires_grad_() for x in attention_inputs(PYTORCHS))
    output = topk_attention(query, key, value, k=SIZES.keys, **options)
    for wrt in (query, key, value):
        (gradient,) = torch.autograd.grad(output.sum(), wrt, create_graph=True)
        with pytest.raises(
            RuntimeError, match='topk_attention cannot be differentiated again; backend="reference" can'
        ):
            gradient.square().sum().backward(retain_graph=True)
    weight = torch.ones_like(output, requires_grad=True)
    (gradient,) = torch.autograd.grad(output, query, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="topk_attention cannot be differentiated again"):
        torch.autograd.grad(gradient.sum(), weight)


def test_torch_func_refuses_the_gradient_of_the_gradient_in_words():
    query, key, value = (x.float() for x in attention_inputs(PYTORCHS))

    def loss(query):
        return topk_attention(query, key, value, k="all").square().sum()

    expected = torch.autograd.grad(loss(query.requires_grad_()), query)[0]
    torch.testing.assert_close(torch.func.grad(loss)(query.detach()), expected)
    with pytest.raises(RuntimeError, match="topk_attention cannot be differentiated again"):
        torch.func.grad(lambda query: torch.func.grad(loss)(query).sum())(query.detach())


@pytest.mark.parametrize("completion", [None, Completion()], ids=["alone", "completed"])
def test_the_reference_has_the_gradient_of_the_gradient(completion):
    inputs = [x.requires_grad_() for x in attention_inputs(SIZES._replace(queries=3, keys=6))]
    assert torch.autograd.gradgradcheck(
        lambda *x: topk_attention(*x, k=3, completion=completion, backend="reference"), inputs
    )


@pytest.mark.parametrize("k", [3, None])
def test_keys_that_no_query_keeps_get_zero_gradient(backend, tiling, k):
    query, key, value = attention_inputs()
    mask = torch.ones(SIZES.keys, dtype=torch.bool)
    mask[[0, 4, SIZES.keys - 1]] = False
    _, _, grad_key, grad_value = output_and_gradients(
        lambda *x: topk_attention(*x, k=k, attn_mask=mask, backend=backend), query, key, value
    )
    for grad in (grad_key, grad_value):
        assert torch.equal(grad[:, :, ~mask], torch.zeros_like(grad[:, :, ~mask]))
        assert (grad[:, :, mask].abs().sum(-1) > 0).any()
