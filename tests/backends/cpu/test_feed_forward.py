"""The compiled feed-forward kernels where their loops end: panels of neurons, blocks of tokens, vectors."""

import contextlib
import importlib

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from comparison import (
    OTHER_NAMES,
    assert_same,
    largest_errors,
    output_and_gradients,
    small_integers,
)
from feed_forward_layers import Layer, apply, random_layer, rank_gaps
from topk_attention.backends import cpu
from topk_attention.backends.activations import ACTIVATIONS

if cpu.problem() is None:
    cpu_feed_forward = importlib.import_module("topk_attention.backends.cpu.feed_forward")

# Below 12 tokens the weights are read once by all threads; from there on tokens go in blocks of at most 192.
TOKENS = [1, 11, 12, 13, 50, 200, 400]
FEW_AND_MANY = pytest.mark.parametrize("tokens", [3, 50])
NEURONS = [31, 32, 33, 64, 65, 511, 1000]
MODELS = [8, 15, 16, 17, 64, 80, 130, 256]
KINDS = pytest.mark.parametrize("kind", ["plain with biases", "gated with biases"])
# Tokens whose k-th and next neuron are closer may choose either in float32, and are left out.
NEAR_TIE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}


def some_ks(neurons):
    return sorted({1, max(1, neurons // 5), neurons - 1, neurons})


def assert_close_to_float64(*cases, activation):
    """Cases are pairs of layer and k; the worst of them counts.

    Kernels sum one term after another, so their error grows with the root of the number of terms; the reference's
    products sum in blocks. That comes on top of twice the reference's own error in the layer's dtype.
    """
    worst, allowance = torch.zeros(2), torch.zeros(2)
    for layer, k in cases:
        (tokens, model), neurons, dtype = layer.x.shape, layer.w_in.shape[0], layer.x.dtype
        clear = torch.ones(tokens, dtype=torch.bool)
        if k < neurons:
            clear = rank_gaps(layer, k, activation) > NEAR_TIE[dtype]
            assert clear.double().mean() > 0.5

        def run(layer, backend, k=k, clear=clear):
            def masked(*tensors):
                return apply(layer.with_tensors(tensors), k=k, backend=backend, activation=activation)[clear]

            return output_and_gradients(masked, *layer.present())

        truth = run(layer.with_tensors(x.double() for x in layer.present()), "reference")
        actual, reference = run(layer, "cpu"), run(layer, "reference")
        assert all(x.dtype == dtype for x in actual)
        if dtype == torch.float64:
            assert_same(actual, truth)
            continue
        worst = torch.maximum(worst, largest_errors(actual, truth))
        one_by_one = torch.finfo(torch.float32).eps * max(model, k, tokens) ** 0.5
        allowance = torch.maximum(allowance, 2 * largest_errors(reference, truth) + torch.finfo(dtype).eps + one_by_one)
    assert (worst <= allowance).all(), f"errors {worst.tolist()} above {allowance.tolist()}"


@KINDS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("neurons", NEURONS)
def test_any_number_of_neurons_and_tokens(neurons, dtype, kind):
    for tokens in TOKENS:
        layer = random_layer(kind, tokens, model=17, neurons=neurons, outputs=9, dtype=dtype)
        assert_close_to_float64(*((layer, k) for k in some_ks(neurons)), activation="silu")


@KINDS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_any_model_and_output_size(model, dtype, kind):
    cases = [
        (random_layer(kind, tokens, model, neurons=65, outputs=outputs, dtype=dtype), 13)
        for tokens in (1, 13, 50)
        for outputs in (model, 8, 63, 129)
    ]
    assert_close_to_float64(*cases, activation="gelu")


@KINDS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_and_dtype(activation, dtype, kind):
    formula = OTHER_NAMES.get(activation, activation)
    cases = [(random_layer(kind, tokens, 24, 100, 20, dtype), k) for tokens in (2, 40) for k in (1, 25, 100)]
    assert_close_to_float64(*cases, activation=formula)
    for layer, k in cases:
        output = apply(layer, k=k, activation=activation, backend="cpu")
        assert torch.equal(output, apply(layer, k=k, activation=formula, backend="cpu"))


@KINDS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_cpu_target(cpu_target, dtype, kind):
    cases = [
        (random_layer(kind, tokens, model, neurons, outputs=80, dtype=dtype), neurons // 4)
        for tokens, model, neurons in ((1, 80, 65), (11, 17, 100), (12, 130, 33), (200, 33, 129))
    ]
    assert_close_to_float64(*cases, activation="gelu_tanh")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("neurons", [33, 511])
@FEW_AND_MANY
def test_of_tied_neurons_the_lower_index_is_kept(cpu_target, tokens, neurons, is_gated, dtype):
    layer = Layer(
        small_integers(tokens, 4, dtype=dtype),
        small_integers(neurons, 4, dtype=dtype),
        small_integers(7, neurons, dtype=dtype),
        small_integers(neurons, 4, dtype=dtype) if is_gated else None,
    )
    for k in some_ks(neurons):
        options = {"k": k, "activation": "identity"}
        output = apply(layer, backend="cpu", **options)
        assert torch.equal(output, apply(layer, backend="reference", **options))


@KINDS
@FEW_AND_MANY
@pytest.mark.parametrize("entries_at_a_time", [2**20, 40])
def test_one_seed_drops_the_same_neurons_as_in_the_reference(monkeypatch, entries_at_a_time, tokens, kind):
    monkeypatch.setattr(cpu_feed_forward, "_ENTRIES_AT_A_TIME", entries_at_a_time)
    layer, options = random_layer(kind, tokens, 17, 65, 9), {"k": 13, "activation": "gelu", "dropout_p": 0.4}
    torch.manual_seed(9)
    expected = layer.run(backend="reference", **options)
    torch.manual_seed(9)
    assert_same(layer.run(backend="cpu", **options), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["plain", "gated"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@FEW_AND_MANY
def test_a_token_that_is_not_finite_spoils_its_own_output_alone(tokens, bad, kind, dtype):
    layer = random_layer(kind, tokens, 17, 65, 9, dtype)
    options = {"k": 13, "activation": "silu"}
    before = apply(layer, backend="cpu", **options)
    layer.x[1, 5] = bad
    after, expected = (apply(layer, backend=backend, **options) for backend in ("cpu", "reference"))
    others = torch.arange(tokens) != 1
    assert torch.equal(after[others], before[others])
    assert not after[1].isfinite().any()
    assert not expected[1].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@FEW_AND_MANY
def test_a_weight_that_is_not_finite_spoils_the_outputs_it_spoils_in_the_reference(tokens, bad, dtype):
    layer = random_layer("plain", tokens, 17, 65, 9, dtype)
    layer.w_in[7, 3] = bad
    actual, expected = (apply(layer, k=13, backend=backend) for backend in ("cpu", "reference"))
    assert torch.equal(actual.isfinite(), expected.isfinite())
    torch.testing.assert_close(actual, expected, equal_nan=True)
    assert actual.isfinite().any() != (bad != bad)


@FEW_AND_MANY
def test_output_weights_of_a_neuron_nobody_keeps_are_never_read(tokens):
    layer = random_layer("plain", tokens, 17, 65, 9)
    layer.w_in[7] = 0
    layer = layer._replace(b_in=torch.zeros(65).double().index_fill_(0, torch.tensor(7), -1e6))
    before = layer.run(k=13, backend="cpu")
    layer.w_out[:, 7] = torch.nan
    assert_same(layer.run(k=13, backend="cpu"), before)


@KINDS
@FEW_AND_MANY
def test_an_output_of_no_size_has_gradients_of_zero(tokens, kind):
    layer = random_layer(kind, tokens, 17, 65, outputs=0)
    output, *gradients = layer.run(k=13, activation="silu", backend="cpu")
    assert output.shape == (tokens, 0)
    assert not any(gradient.any() for gradient in gradients)


@contextlib.contextmanager
def threads(number):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@KINDS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 11, 12, 200])
def test_the_number_of_threads_changes_no_bit(tokens, dtype, kind):
    layer = random_layer(kind, tokens, 33, 200, 150, dtype)
    results = []
    for number in (1, 2, 3):
        with threads(number):
            results.append(layer.run(k=50, activation="silu", dropout_p=0.0, backend="cpu"))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@KINDS
@FEW_AND_MANY
def test_output_weights_lie_neuron_by_neuron_or_not_with_one_result(tokens, kind):
    layer = random_layer(kind, tokens, 17, 65, 9)
    by_neuron = layer._replace(w_out=layer.w_out.t().contiguous().t())
    expected, actual = (x.run(k=13, activation="silu", backend="cpu") for x in (layer, by_neuron))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def as_part_of_wider_rows(x):
    storage = torch.full((*x.shape[:-1], 3 * x.shape[-1]), torch.nan, dtype=x.dtype)
    storage[..., x.shape[-1] : 2 * x.shape[-1]] = x
    return storage[..., x.shape[-1] : 2 * x.shape[-1]]


def with_every_other_element(x):
    storage = torch.full((*x.shape, 2), torch.nan, dtype=x.dtype)
    storage[..., 0] = x
    return storage[..., 0]


def as_columns(x):
    return x.mT.contiguous().mT


@FEW_AND_MANY
@pytest.mark.parametrize("kind", ["plain", "gated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [as_part_of_wider_rows, with_every_other_element, as_columns])
def test_any_layout_gives_the_same_bits(layout, dtype, tokens, kind):
    layer = random_layer(kind, tokens, 17, 65, 9, dtype)
    tensors = [x.requires_grad_() for x in layer.present()]
    strided = [layout(x).detach().requires_grad_() for x in tensors]
    grad_output = torch.randn(tokens, 9).to(dtype)
    results = []
    for its_tensors, its_grad_output in ((tensors, grad_output), (strided, layout(grad_output))):
        output = apply(layer.with_tensors(its_tensors), k=13, activation="silu", backend="cpu")
        results.append([output, *torch.autograd.grad(output, its_tensors, its_grad_output)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("is_gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@FEW_AND_MANY
def test_neurons_with_a_bias_of_minus_infinity_come_last(cpu_target, tokens, dtype, is_gated):
    b_in = torch.zeros(100, dtype=dtype).index_fill_(0, torch.arange(0, 100, 3), -torch.inf)
    w_gate = torch.ones(100, 5, dtype=dtype) if is_gated else None
    x, w_in = small_integers(tokens, 5, dtype=dtype), small_integers(100, 5, dtype=dtype)
    x[:, 0] = 0 if is_gated else 1  # some tokens of a gated layer have a gate of 0: NaN, counted as the best of all
    layer = Layer(x, w_in, small_integers(7, 100, dtype=dtype), w_gate, b_in)
    for k in (1, 40, 66, 67, 80):
        options = {"k": k, "activation": "relu"}
        actual, expected = (apply(layer, backend=backend, **options) for backend in ("cpu", "reference"))
        assert torch.equal(actual.isfinite(), expected.isfinite())
        assert torch.equal(actual.nan_to_num(), expected.nan_to_num())


@KINDS
def test_gradients_match_finite_differences(kind):
    layer = random_layer(kind, tokens=14, model=3, neurons=40, outputs=2)

    def function(*tensors):
        torch.manual_seed(3)  # each evaluation draws the same dropout
        return apply(layer.with_tensors(tensors), k=9, activation="gelu", dropout_p=0.3, backend="cpu")

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in layer.present()])


@KINDS
@FEW_AND_MANY
def test_a_second_backward_pass_gives_equal_gradients(tokens, kind):
    layer = random_layer(kind, tokens, 17, 65, 9, torch.float32)
    tensors = [x.requires_grad_() for x in layer.present()]
    output = apply(layer, k=13, activation="silu", dropout_p=0.3, backend="cpu")
    grad_output = torch.randn_like(output)
    first = torch.autograd.grad(output, tensors, grad_output, retain_graph=True)
    second = torch.autograd.grad(output, tensors, grad_output)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@KINDS
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_changes_no_bit(use_reentrant, kind):
    layer = random_layer(kind, 50, 17, 65, 9, torch.float32)

    def run(*tensors):
        return apply(layer.with_tensors(tensors), k=13, activation="silu", dropout_p=0.4, backend="cpu")

    tensors = [x.requires_grad_() for x in layer.present()]
    results = []
    for function in (run, lambda *tensors: checkpoint(run, *tensors, use_reentrant=use_reentrant)):
        for tensor in tensors:
            tensor.grad = None
        torch.manual_seed(1)
        function(*tensors).square().sum().backward()
        results.append([tensor.grad for tensor in tensors])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def operator_arguments(case, requires_grad, tokens=14):
    """All arguments of the forward operator but save_selection."""

    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=requires_grad)

    x, w_in, w_out = random(tokens, 3), random(40, 3), random(5, 40)
    w_gate = b_in = b_gate = b_out = seed = None
    if case == "transposed":
        x, w_in, w_out = (y.detach().mT.contiguous().mT.requires_grad_(requires_grad) for y in (x, w_in, w_out))
    if case in ("gated", "all neurons"):
        w_gate, b_in, b_gate, b_out = random(40, 3), random(40), random(40), random(5)
    if case == "dropout":
        seed = torch.tensor(17)
    k = 40 if case == "all neurons" else 9
    cut = (0.5, 1.0) if case == "gated" else (None, 0.0)
    return x, w_in, w_out, w_gate, b_in, b_gate, b_out, seed, k, "gelu", *cut, 0.3 if seed is not None else 0.0


CASES = pytest.mark.parametrize("case", ["plain", "transposed", "gated", "all neurons", "dropout"])


@CASES
@pytest.mark.parametrize("requires_grad", [False, True], ids=["constants", "with gradients"])
def test_the_forward_operator_keeps_torchs_rules(case, requires_grad):
    arguments = operator_arguments(case, requires_grad)
    torch.library.opcheck(cpu_feed_forward.feed_forward_op, (*arguments, True))
    if not requires_grad:
        torch.library.opcheck(cpu_feed_forward.feed_forward_op, (*arguments, False))


@CASES
def test_the_backward_operator_keeps_torchs_rules(case):
    forward_arguments = operator_arguments(case, False)
    tensors, seed, options = forward_arguments[:6], forward_arguments[7], forward_arguments[9:]
    output, *selection = cpu_feed_forward.feed_forward_op(*forward_arguments, True)
    for wanted in ([True, True, True], [False, True, False]):
        arguments = (torch.randn_like(output), *tensors, seed, *selection, *options, wanted)
        torch.library.opcheck(cpu_feed_forward.feed_forward_backward_op, arguments)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*isinstance.*treespec.*LeafSpec.*:FutureWarning")
@KINDS
@FEW_AND_MANY
def test_compiled_without_a_graph_break_it_does_what_it_does_eagerly(tokens, kind):
    torch.compiler.reset()
    layer = random_layer(kind, tokens, 17, 65, 9)

    def run(*tensors):
        return 2 * apply(layer.with_tensors(x.sin() for x in tensors), k=13, activation="gelu", backend="cpu").cos()

    expected = output_and_gradients(run, *layer.present())
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_same(output_and_gradients(compiled, *layer.present()), expected)
    torch.compiler.reset()
